"""The CUDA kernels of quantized_linear by the emulator: bits that depend on a row alone, bytes that are read, banks;
and the layout of the weight, written out here once more from mma's fragment table."""

import pytest
import torch

from finetune import ops
from finetune.kernels import emulator, faults
from finetune.ops import _fragments
from finetune.ops.quantized_linear import FORMATS, random_weight

KINDS = {
    "bf16": ("bf16", {}),
    "int8 a row": ("int8", {}),
    "int8 16": ("int8", {"group": 16, "half": False}),
    "int8 32": ("int8", {"group": 32}),
    "int4": ("int4", {}),
    "int4 fp32": ("int4", {"half": False}),
    "int4 no minima": ("int4", {"minima": False}),
    "nf4": ("nf4", {}),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind, n, k):
    name, how = KINDS[kind]
    return random_weight(name, n, k, torch.Generator().manual_seed(0), **how).laid_out("cuda")


def product(x, weight, backend="emulated"):
    return ops.quantized_linear(x, weight, backend=backend)


@pytest.fixture(scope="module", autouse=True)
def emulated():
    return emulator.load("emulated")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("n", "k"), [(40, 70), (64, 96), (1, 1), (5, 0), (0, 5)])
def test_the_layout_loses_nothing(format, n, k):
    for group in (None, 16, 32) if format == "int8" else (None,):
        for minima, half in ((True, True), (False, False)):
            weight = random_weight(format, n, k, torch.Generator().manual_seed(1), group, minima, half)
            packed = weight.laid_out("cuda")
            again = packed.laid_out("rows")
            assert (again.format, again.group, again.shape) == (format, weight.group, (n, k))
            for name in ("codes", "scale", "minimum"):
                mine, other = getattr(weight, name), getattr(again, name)
                assert (mine is None and other is None) or torch.equal(mine, other), name
            assert torch.equal(packed.dequantize(), weight.dequantize())


@pytest.mark.parametrize("format", ["int4", "nf4", "int8", "bf16"])
def test_a_lanes_bytes_are_its_fragments(format):
    """Register r of a lane's mma (i, step): rows 16 i + lane / 4 (+ 8 for odd r) and terms 16 step + 2 (lane % 4) (+ 8
    for r >= 2) in its lower half, the next term in the upper one (PTX ISA, mma.m16n8k16, matrix A)."""
    codes = torch.arange(32 * 32).view(32, 32) % 251
    codes = {"int8": codes.to(torch.int8), "bf16": codes.bfloat16()}.get(format, (codes % 16).to(torch.uint8))
    packed = _fragments.pack(codes, format)
    words = packed.view(torch.int32).reshape(-1, 32, 4).long() & 0xFFFFFFFF  # (chunks, lanes, words)
    for lane in range(32):
        for i in range(2):
            for step in range(2):
                for r in range(4):
                    row, term = 16 * i + lane // 4 + 8 * (r % 2), 16 * step + 2 * (lane % 4) + 8 * (r // 2)
                    if format == "int4":
                        pair = words[0, lane, 2 * i + step].item() >> 4 * r
                        found = [pair & 15, pair >> 16 & 15]
                    elif format == "nf4":
                        pair = words[0, lane, 2 * i + step].item() >> 8 * r
                        found = [pair & 15, pair >> 4 & 15]
                    elif format == "int8":
                        pair = words[i, lane, 2 * step + r // 2].item() >> 8 * (r % 2)
                        found = [pair & 255, pair >> 16 & 255]
                    else:
                        pair = words[2 * i + step, lane, r].item()
                        found = [pair & 0xFFFF, pair >> 16]
                    want = codes[row, term : term + 2]
                    want = want.view({"int8": torch.uint8, "bf16": torch.uint16}.get(format, torch.uint8))
                    assert found == want.tolist(), (lane, i, step, r)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=("bf16", "f16", "f32"))
@each_kind
def test_a_rows_bits_depend_on_it_and_the_weight_alone(kind, dtype):
    """In any company: 1 to 70 rows, by all kernels, wherever the row stands."""
    weight = make(kind, 40, 300)
    x = torch.randn(70, 300, generator=torch.Generator().manual_seed(2)).to(dtype)
    want = product(x, weight)
    for first, last in ((0, 1), (3, 4), (2, 10), (60, 69), (37, 70), (5, 70)):
        assert torch.equal(product(x[first:last], weight), want[first:last]), (first, last)


@each_kind
def test_fp32_multiplies_the_dequantized_values(kind):
    weight = make(kind, 33, 96)
    assert torch.equal(product(torch.eye(96), weight).t(), weight.dequantize())


@pytest.mark.parametrize("rows", [1, 20, 40])
@pytest.mark.parametrize("format", FORMATS)
def test_without_terms_the_bias_remains(format, rows):
    weight, bias = random_weight(format, 5, 0, torch.Generator()), torch.randn(5)
    for dtype in (torch.float32, torch.bfloat16):
        got = ops.quantized_linear(torch.empty(rows, 0, dtype=dtype), weight, bias.to(dtype), backend="emulated")
        assert torch.equal(got, bias.to(dtype).expand(rows, 5))


@each_kind
@pytest.mark.parametrize("rows", [1, 8, 32, 64])
def test_bytes_and_banks(kind, rows):
    """The weight is read once, 16 bytes a lane, and no access takes more sectors or wavefronts than it must."""
    n, k = 128, 576
    weight = make(kind, n, k)
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(2)).bfloat16()
    trace = emulator.trace(lambda: product(x, weight, "checked"))
    assert not emulator.excess(trace)
    copies = [row for row in trace if row["kind"] == "cp.async from global"]
    assert {row["width"] for row in copies} == {16}
    rows_of_block = 32 if rows <= 8 else 64
    expected = weight.nbytes + x.nbytes * (n // rows_of_block)
    if kind == "nf4":  # a group's scales for each of its tiles
        expected += weight.scale.nbytes
    if kind == "int8 a row":  # loaded at the end
        expected -= weight.scale.nbytes
    if kind.startswith("int4") and rows > 32:  # the sums of x: from x once, then for each block
        expected += x.nbytes + rows * k // 32 * 4 * (n // 64)
    assert sum(32 * row["units"] for row in copies) == expected


@pytest.mark.parametrize("fault", faults.listed("quantized_linear", slow=True))
def test_what_costs_time_is_seen(fault):
    checked = emulator.load("checked")
    x = torch.randn(40, 96).bfloat16()
    checked.set_bug(fault)
    try:
        assert emulator.excess(emulator.trace(lambda: product(x, make("int4", 64, 96), "checked")))
        assert checked.bug_reached()
    finally:
        checked.set_bug("")


def test_what_is_not_packed_for_a_gpu_is_refused():
    weight, x = make("int4", 32, 64), torch.randn(1, 64)
    op = torch.ops.finetune_emulated.quantized_linear
    args = (None, 3, 32, 32)  # bias, format, rows, group
    assert torch.equal(op(x, weight.codes, weight.scale, None, *args), product(x, weight))
    memory = torch.empty(weight.codes.numel() + 4, dtype=torch.uint8)
    odd = memory[4:].view_as(weight.codes).copy_(weight.codes)
    with pytest.raises(RuntimeError, match="must begin at a multiple of 16 bytes"):
        op(x, odd, weight.scale, None, *args)
    with pytest.raises(RuntimeError, match="the codes are not those of a weight packed for a GPU"):
        op(x, weight.codes[:, :1].contiguous(), weight.scale, None, *args)
    with pytest.raises(RuntimeError, match="the scales are not those of a weight packed for a GPU"):
        op(x, weight.codes, weight.scale[:, :1].contiguous(), None, *args)
    with pytest.raises(RuntimeError, match="the minima are among them"):
        op(x, weight.codes, weight.scale, weight.scale, *args)
    with pytest.raises(RuntimeError, match="groups are 16 or 32"):
        op(x, weight.codes, weight.scale, None, None, 3, 32, 16)
