"""What nvcc makes of the CUDA kernels, against the golden table and against what each kind of kernel must have."""

import json

import pytest

from finetune.cli import main
from finetune.kernels import cuda_toolkit, static_table

pytestmark = pytest.mark.skipif(
    not all(map(cuda_toolkit.tool, ("nvcc", "ptxas", "cuobjdump"))), reason="no nvcc: pip install -e '.[test]'"
)
# Rows still to be made: python -m finetune kernels static OP --write, then the name goes.
PENDING: set[str] = set()
OPS = [op for op in static_table.sources() if op not in PENDING]
SLOW = {"attention"}  # half a minute an architecture


def each_op():
    return [pytest.param(op, marks=[pytest.mark.slow] if op in SLOW else []) for op in OPS]


# Kernels that only move and add up: their vector path must be there, one access of 16 bytes a lane.
STREAMING = (
    *("rms_norm", "layer_norm", "group_norm_silu", "modulate", "gate_residual"),
    *("swiglu", "gelu", "rope", "adamw", "clip_grad_norm"),
)


def default(op: str) -> str:
    return static_table.archs_of(op)[0]


def check(op: str, arch: str) -> None:
    toolkit, before = static_table.golden()
    now = static_table.table([op], (arch,))
    assert not (found := static_table.differences(now, before, toolkit == static_table.toolkit())), "\n".join(found)


@pytest.mark.parametrize("op", each_op())
def test_golden(op):
    check(op, default(op))


@pytest.mark.long
@pytest.mark.parametrize("arch", static_table.ARCHS)
@pytest.mark.parametrize("op", OPS)
def test_golden_of_the_other_architectures(op, arch):
    if arch == default(op) or arch not in static_table.archs_of(op):
        pytest.skip("in the default suite, or not for this architecture")
    check(op, arch)


def test_the_golden_table_is_of_these_kernels():
    _, rows = static_table.golden()
    assert set(static_table.sources()) >= PENDING
    found = {op: set(by_arch) for op, by_arch in rows.items() if op not in PENDING}
    assert found == {op: set(static_table.archs_of(op)) for op in OPS}


def test_nothing_spills():
    _, rows = static_table.golden()
    seen = 0
    for op, by_arch in rows.items():
        for arch, found in by_arch.items():
            for name, row in found.items():
                seen += 1
                assert not row["spills"], f"{op} sm_{arch} {name}"
                assert 0 < row["registers"] <= 255
                assert row["occupancy"] > 0, "a block must fit"
    assert seen > 20


@pytest.mark.parametrize("op", [op for op in STREAMING if op in OPS])
def test_streaming_kernels_move_16_bytes_a_lane(op):
    rows = static_table.table([op], ("80",))[op]["80"]
    wide = [name for name, row in rows.items() if row["load"].get("16")]
    assert wide, "no kernel of it loads 16 bytes"
    assert any(rows[name]["store"].get("16") for name in wide) or op == "clip_grad_norm"
    for kind in ("float", "bf16", "f16"):
        assert any(kind in name for name in wide) or not any(kind in name for name in rows), f"none for {kind}"


@pytest.mark.parametrize(("op", "statistics"), [("rms_norm", 2), ("layer_norm", 4), ("modulate", 4)])
def test_backward_of_the_norms_adds_up_in_registers(op, statistics):
    """Where rows allow 16 bytes, nothing else is moved but a row's statistics; sums over rows that went through memory
    made it 22 and 44 stores of 4 bytes."""
    _, rows = static_table.golden()
    for arch, found in rows[op].items():
        whole = {name: row for name, row in found.items() if name.startswith("backward<") and name.endswith(", true>")}
        assert len(whole) == 3, arch
        for name, row in whole.items():
            assert set(row["store"]) == {"16"}, (arch, name)
            assert row["load"] == {"16": 6 if "float" in name else 3, "4": statistics}, (arch, name)


@pytest.mark.slow
def test_attention_uses_the_tensor_cores_and_asynchronous_copies():
    rows = static_table.table(["attention"], ("80",))["attention"]["80"]
    flash = {name: row for name, row in rows.items() if row["code"].get("HMMA")}
    assert flash
    for name, row in flash.items():
        assert row["code"].get("LDSM"), f"{name} feeds the tensor cores without ldmatrix"
        assert row["code"].get("LDGSTS"), f"{name} loads without cp.async"


def test_tiles_in_shared_memory_are_not_stored_as_global_ones():
    """What linear_cross_entropy stores 16 bytes at a time are zeros of a shared tile: st.global would fault there."""
    _, rows = static_table.golden()
    for arch, found in rows["linear_cross_entropy"].items():
        tiled = {name: row for name, row in found.items() if row["code"].get("LDGSTS")}
        assert len(tiled) == 12, arch
        for name, row in tiled.items():
            assert not row["store"].get("16"), f"sm_{arch} {name}"
            assert row["code"].get("STS", 0) >= 8, f"sm_{arch} {name}"


@pytest.mark.parametrize("kernel", ["statistics", "make_dlogits", "multiply_dx", "multiply_dweight"])
def test_linear_cross_entropy_makes_four_mma_of_each_ldmatrix(kernel):
    """With squares of 64 × 64 it made two, and shared memory was the roof. Registers hold the square: no spills."""
    _, rows = static_table.golden()
    for arch, found in rows["linear_cross_entropy"].items():
        for kind in ("bf16", "f16"):
            row = found[f"{kernel}<{kind}>"]
            assert (row["code"]["HMMA"], row["code"]["LDSM"], row["code"]["BAR"]) == (64, 16, 2), arch
            assert row["spills"] == row["stack"] == 0, arch


MMA_OF_A_TILE = {"Few": (4, 1), "Some": (16, 4), "Many": (32, 8)}  # a warp's mma and ldmatrix


@pytest.mark.parametrize("shape", MMA_OF_A_TILE)
def test_quantized_linear_multiplies_codes_and_scales_the_sums_of_groups(shape):
    """Each 16 bytes of 4-bit codes are 4 mma with 8 tokens, 32 with 64, and an ldmatrix serves four mma. A group's sums
    are folded by one FMA each (int4: two), whatever the number of its weights; int8 codes become bf16 by two LOP3 a
    register of the left operand, of which a tile has 16."""
    _, rows = static_table.golden()
    mma, ldmatrix = MMA_OF_A_TILE[shape]
    seen = 0
    for arch, found in rows["quantized_linear"].items():
        for name, row in found.items():
            assert row["stack"] == row["spills"] == 0, (arch, name)
            if not name.endswith(f", {shape}>"):
                continue
            seen += 1
            kind = name.removeprefix("multiply<").partition(",")[0]
            sums = 2 * ldmatrix if kind == "Int4" and shape != "Many" else 0  # Σ x by products with ones
            assert (row["code"]["HMMA"], row["code"]["LDSM"]) == (mma + sums, ldmatrix), (arch, name)
            assert row["code"]["LDGSTS"] >= 2, (arch, name)
            folds = {"Int4": 4, "Int8<16>": 4, "Int8<32>": 2, "Nf4": 2}.get(kind, 0)  # FMA an mma
            assert mma * folds <= row["around"].get("FFMA", 0) <= mma * folds + 8, (arch, name)
            if kind == "Int8<0>":
                assert row["around"]["LOP3"] <= 2 * 16 + 8, (arch, name)
    assert seen == 11 * len(static_table.ARCHS)


def test_quantized_linear_loads_16_bytes_of_codes_a_lane_for_fused_multiply_adds():
    _, rows = static_table.golden()
    chunks = {"Fp32": 8, "Bf16": 4, "Int8<0>": 2, "Int8<16>": 2, "Int8<32>": 2, "Int4": 1, "Nf4": 1}
    for arch, found in rows["quantized_linear"].items():
        kernels = {name: row for name, row in found.items() if name.startswith("multiply_by_fma<")}
        assert len(kernels) == 10, arch
        for name, row in kernels.items():
            kind = name.removeprefix("multiply_by_fma<").partition(",")[0]
            assert row["load"]["16"] >= chunks[kind], (arch, name)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_attention_has_one_fma_for_each_exponential_and_no_mask_in_the_main_loop(kind, dim):
    """A lane has 32 scores of a tile. Beside products and exponentials it had 64 FMUL, 66 FADD, 34 FSEL and 34 ISETP
    a tile, masks and scale included; 32 of the FMUL were the scale, 32 of the FADD the maximum."""
    _, rows = static_table.golden()
    for arch, found in rows["attention"].items():
        around = found[f"attention::forward<{kind}, {dim}, 0>"]["around"]
        assert around["FFMA"] == 32, (arch, around)  # the usual branch; the one of large scores has 32 FMUL and FADD
        assert around["MUFU"] == 64
        assert around["FMUL"] <= 32
        assert around.get("FSEL", 0) <= 2
        assert around["ISETP"] <= 4


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_hopper_attention_has_one_fma_for_each_exponential_and_no_mask_in_the_main_loop(kind, dim):
    """A lane has 64 scores of a tile. It had 64 FMUL, 126 FADD, 66 FSEL and 66 ISETP a tile in addition to products,
    maxima and exponentials; now 64 FFMA and 64 FADD, and the branch of large scores."""
    _, rows = static_table.golden()
    around = rows["attention_hopper"]["90a"][f"forward<{kind}, {dim}, false>"]["around"]
    assert around["FFMA"] == 64, around
    assert around["MUFU"] == 128
    assert around["FMUL"] <= 64
    assert around.get("FSEL", 0) <= 2
    assert around["ISETP"] <= 4


def test_around_counts_straight_lines_with_products():
    code = ["FMUL R1", "ISETP P0", "@P0 BRA 0x50", "HMMA.16816 R1", "FFMA R1", "MUFU.EX2 R1", "@!PT HMMA R1", "EXIT"]
    sass = "".join(f"        /*{16 * i:04x}*/ {line} ;\n" for i, line in enumerate(code))
    assert static_table.around(sass) == {"HMMA": 1, "FFMA": 1}, "0x50 starts another line, which has one exponential"


# --- the reader itself

REPORT = """ptxas info    : Compiling entry function '_Z1kPf' for 'sm_80'
ptxas info    : Function properties for _Z1kPf
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 2048 bytes smem, 360 bytes cmem[0]
"""
PTX = ".visible .entry _Z1kPf(\n\t.param .u64 k_param_0\n)\n.maxntid 64, 2, 1\n{\n}\n"
SASS = """
	Function : _Z1kPf
	.headerflags	@"EF_CUDA_SM80"
        /*0000*/                   LDG.E.128.CONSTANT R4, [R2.64] ;   /* 0x000 */
        /*0010*/              @!P0 LDG.E.U16 R4, [R2.64] ;            /* 0x000 */
        /*0020*/                   LDGSTS.E.BYPASS.128 [R1], [R2.64] ;
        /*0030*/              @!PT LDS RZ, [RZ] ;
        /*0040*/              @UP1 STG.E R4, [R2.64] ;
        /*0050*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0060*/              @!PT LDS.64 RZ, [RZ] ;
"""


def test_reading():
    row = static_table.read(REPORT, PTX, SASS, "80")["k"]
    assert row["code"] == {"HMMA": 1, "LDGSTS": 1, "LDG": 2, "STG": 1}, "no LDS: those never run"
    assert row["load"] == {"16": 1, "2": 1}
    assert row["store"] == {"4": 1}
    assert (row["threads"], row["registers"], row["stack"], row["spills"], row["shared"]) == (128, 40, 8, 16, 2048)
    assert row["occupancy"] == pytest.approx(12 * 4 / 64), "40 registers × 128 threads: 12 blocks of 65536 registers"


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "expected"),
    [
        ("80", 256, 32, 0, 1.0),
        ("80", 128, 128, 0, 0.25),
        ("80", 128, 32, 40 * 1024, 4 * 4 / 64),  # 164 KiB ÷ (40 + 1)
        ("90a", 384, 168, 0, 12 / 64),
        ("120", 256, 32, 48 * 1024, 2 * 8 / 48),
        ("120", 1024, 32, 0, 32 / 48),
    ],
)
def test_occupancy(arch, threads, registers, shared, expected):
    """By hand, from the tables of compute capabilities."""
    assert static_table.occupancy(arch, threads, registers, shared) == pytest.approx(expected, abs=1e-3)


def test_differences_are_told():
    row = {
        "threads": 128,
        "registers": 40,
        "spills": 0,
        "shared": 0,
        "code": {"LDG": 4},
        "load": {"16": 4},
        "store": {},
    }

    def told(same=True, **changed):
        return static_table.differences({"op": {"80": {"k": row | changed}}}, {"op": {"80": {"k": row}}}, same)

    assert told() == []
    assert told(registers=48) == []
    assert told(registers=49) == ["op sm_80 k: 49 registers, were 40"]
    assert told(spills=4) == ["op sm_80 k: 4 bytes spilled, were 0"]
    assert told(code={"LDG": 5}) == ["op sm_80 k: 5 LDG, were 4"]
    assert told(same=False, code={"LDG": 5}) == []
    assert told(same=False, load={"4": 4}) == [
        "op sm_80 k: 0 loads of 16 bytes, were 4",
        "op sm_80 k: 4 loads of 4 bytes, were 0",
    ]
    assert static_table.differences({"op": {"80": {"new": row}}}, {}, True) == ["op sm_80 new: new"]


def test_command(capsys):
    assert main(["kernels", "static", "rms_norm", "--arch", "80", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kernels"]["rms_norm"]["80"]["forward<float>"]["spills"] == 0
    assert main(["kernels", "static", "rms_norm", "--arch", "80"]) == 0
    assert "rms_norm sm_80" in capsys.readouterr().out
    assert main(["kernels", "static", "rope", "--arch", "70"]) == 2
    assert "--arch 70: choose of 80, 90a, 100a, 120" in capsys.readouterr().err
    assert main(["kernels", "static", "nothing"]) == 2
    assert main(["kernels", "static", "rope", "--write", "--arch", "80"]) == 2
