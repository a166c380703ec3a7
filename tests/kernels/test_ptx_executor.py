"""The compiled PTX of every CUDA kernel against the float64 references, by an executor that knows nothing of the
emulator (tests/ptx_executor.py); and that executor's own faults and roundings, on PTX written by hand."""

import os
import re
import struct
import subprocess
import sys
from fractions import Fraction

import numpy as np
import ptx_library
import ptx_machine
import pytest
import torch
from ptx_executor import Fault, convert, fma, parse

from finetune import ops
from finetune.kernels import cuda_toolkit, faults
from finetune.ops._check import check, flat

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
MOST = 20_000  # elements of a sample: a second or two


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not cuda_toolkit.tool("nvcc"), reason="needs nvcc")
@pytest.mark.parametrize("op", faults.kernels())
def test_compiled_kernels(op):
    """Values and gradients, on the op's samples as far as they are small, by the launchers that a GPU gets."""
    loaded, ran = ptx_library.load(op), 0
    for sample in ops.REGISTRY[op].samples():
        if sample.bench or sum(leaf.numel() for leaf in flat(sample.args)) > MOST:
            continue
        for dtype in (torch.bfloat16,) if sample.placed else DTYPES.values():
            if not ops.REGISTRY[op].why_not("ptx", *sample.cast(dtype), **sample.kwargs):
                check(op, sample, dtype, "ptx")
                ran += 1
    assert ran >= 9
    assert loaded.launches


FAULTY = """
import sys, ptx_library, torch
from finetune import ops
from finetune.ops._check import run
op, _, _ = sys.argv[1].partition(".")
ptx_library.load(op, sys.argv[1])
for sample in ops.REGISTRY[op].samples():
    if sample.name in ("small", "odd"):
        run(op, sample, torch.bfloat16, "ptx")
"""


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not cuda_toolkit.tool("nvcc"), reason="needs nvcc")
@pytest.mark.parametrize(
    ("fault", "what", "where"),
    [
        (
            "linear_cross_entropy.global_store",  # what every GPU would stop at
            "a generic address of shared memory given to an access of global memory",
            r"`st\.global\.wb\.v4.*vector\.cuh:\d+ < linear_cross_entropy\.cu:\d+",
        ),
        (
            "rms_norm.past_the_end",
            "reads global memory that it was not given for that",
            r"`ld\.global.*rms_norm\.cu:\d+",
        ),
    ],
)
def test_a_deliberate_fault_is_named_with_its_source(fault, what, where):
    path = os.pathsep.join([str(ptx_library.ROOT), str(ptx_library.ROOT / "tests")])
    command = [sys.executable, "-c", FAULTY, fault]  # a process may register an op's library once
    out = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert what in out.stderr, out.stderr[-2000:]
    assert re.search(where, out.stderr)


HEAD = ".version 9.0\n.target sm_80\n.address_size 64\n.visible .entry k(\n\t.param .u64 k_param_0\n)\n{\n"
REGISTERS = (
    ".reg .pred %p<4>;\n.reg .b32 %r<9>;\n.reg .b64 %rd<9>;\n.reg .f32 %f<9>;\n.shared .align 16 .b8 tile[64];\n"
)
LANE = "ld.param.u64 %rd1, [k_param_0];\nmov.u32 %r1, %tid.x;\nmul.wide.u32 %rd2, %r1, 4;\nadd.s64 %rd3, %rd1, %rd2;\n"


def execute(folder, body, array, block=32, use=2):
    (folder / "k.ptx").write_text(f"{HEAD}{REGISTERS}{LANE}{body}\nret;\n}}\n")
    kernel = parse(folder / "k.ptx")["k"]
    regions = ptx_machine.Regions([(array.ctypes.data, array.nbytes, use)])
    ptx_machine.launch(kernel, (1, 1, 1), (block, 1, 1), 0, struct.pack("<Q", array.ctypes.data), regions)
    return array


def test_lanes_part_and_meet_again(tmp_path):
    """Each goes round its loop as often as its number says; all meet at the barrier."""
    loop = "$L1:\nsetp.ge.u32 %p1, %r2, %r1;\n@%p1 bra $L2;\n"
    loop += "add.s32 %r2, %r2, 1;\nadd.s32 %r3, %r3, %r2;\nbra.uni $L1;\n$L2:"
    body = f"mov.u32 %r2, 0;\nmov.u32 %r3, 0;\n{loop}\nbar.sync 0;\nst.global.u32 [%rd3], %r3;"
    got = execute(tmp_path, body, np.zeros(40, np.uint32), block=40)
    assert got.tolist() == [n * (n + 1) // 2 for n in range(40)]


def test_a_warp_sums_by_shuffles(tmp_path):
    steps = "\n".join(
        f"shfl.sync.bfly.b32 %r2|%p1, %r1, {bits}, 31, -1;\nadd.s32 %r1, %r1, %r2;" for bits in (16, 8, 4, 2, 1)
    )
    got = execute(tmp_path, f"{steps}\nst.global.u32 [%rd3], %r1;", np.zeros(64, np.uint32), block=64)
    assert got.tolist() == [sum(range(32))] * 32 + [sum(range(32, 64))] * 32


SHARED = "mov.u32 %r4, tile;\ncvt.u64.u32 %rd4, %r4;\ncvta.shared.u64 %rd5, %rd4;\n"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            SHARED + "cvta.to.global.u64 %rd6, %rd5;\nst.global.u32 [%rd6], %r1;",
            r"a generic address of shared memory given to an access of global memory at k.ptx:21 `st.global.u32 \[%rd6",
        ),
        ("cvta.to.shared.u64 %rd5, %rd3;", "cvta.to.shared of an address that is not shared memory's"),
        ("add.s64 %rd3, %rd3, 2;\nst.global.u32 [%rd3], %r1;", "a misaligned address of 4 bytes"),
        ("ld.global.u32 %r2, [%rd3+4];", "reads global memory that it was not given"),
        ("shl.b32 %r2, %r1, 2;\nst.shared.u32 [%r2], %r1;", "outside of the block's 64 bytes of shared memory"),
        (
            "setp.gt.u32 %p1, %r1, 3;\n@%p1 bra $L1;\nbar.sync 0;\n$L1:\nbar.sync 0;",
            "lanes wait for others that never come",
        ),
        ("frobnicate.b32 %r2, %r1;", "unknown at k.ptx:17 `frobnicate"),
        ("mov.u32 %r2, %clock;", "unknown operand %clock"),
    ],
)
def test_a_fault_is_named(tmp_path, body, message):
    with pytest.raises(Fault, match=message):
        execute(tmp_path, body, np.zeros(32, np.uint32))


def test_a_tensor_that_is_only_read_is_not_written(tmp_path):
    with pytest.raises(Fault, match="writes global memory that it was not given for that"):
        execute(tmp_path, "st.global.u32 [%rd3], %r1;", np.zeros(32, np.uint32), use=0)


@pytest.mark.parametrize("waits", [True, False])
def test_an_asynchronous_copy_is_there_when_it_was_waited_for(tmp_path, waits):
    copy = "@!%p1 bra $L1;\ncp.async.cg.shared.global [%r4], [%rd1], 16;\ncp.async.commit_group;\n"
    wait = "cp.async.wait_group 0;\n" if waits else ""
    body = f"mov.u32 %r4, tile;\nsetp.eq.u32 %p1, %r1, 0;\n{copy}{wait}"
    body += "ld.shared.u32 %r5, [tile+8];\nst.global.u32 [%rd1+64], %r5;\n$L1:"
    array = np.zeros(32 + 4, np.uint32)
    array = array[-array.ctypes.data % 16 // 4 :]  # 16 bytes need an aligned address
    array[2] = 7
    assert execute(tmp_path, body, array)[16] == (7 if waits else 0xFFFFFFFF)


def test_fma_rounds_once():
    g = np.random.default_rng(0)
    a, b = (g.standard_normal(2000).astype(np.float32) for _ in range(2))
    c = np.where(g.random(2000) < 0.5, -(a * b), g.standard_normal(2000)).astype(np.float32)
    for mode in ("rn", "rz", "rm", "rp"):
        got = fma(a, b, c, mode)
        for x, y, z, mine in zip(a, b, c, got, strict=True):
            exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
            below, above = (Fraction(float(np.nextafter(mine, np.float32(to)))) for to in (-np.inf, np.inf))
            value = Fraction(float(mine))
            if mode == "rn":
                assert abs(value - exact) <= min(abs(below - exact), abs(above - exact))
            elif mode == "rm" or (mode == "rz" and exact > 0):
                assert value <= exact < above
            else:
                assert below < exact <= value


def test_conversions_are_torchs():
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0)) * 100
    x = torch.cat([x, x * 1e-6, x * 1e36, torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 65519.9, 65520.0])])
    bits = torch.from_numpy(convert(["cvt", "rn"], x.numpy(), "bf16", "f32").view(np.int16))
    assert torch.equal(bits.view(torch.bfloat16), x.bfloat16())
    with np.errstate(over="ignore"):
        assert torch.equal(torch.from_numpy(convert(["cvt", "rn"], x.numpy(), "f16", "f32")), x.half())
    whole = convert(["cvt", "rni"], np.array([2.5, -3.5, 1e20, -1e20, np.nan], np.float32), "s32", "f32")
    assert whole.tolist() == [2, -4, 2**31 - 1, -(2**31), 0]
