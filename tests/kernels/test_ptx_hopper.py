"""The emulated instructions of csrc/cuda/device/ptx_hopper.cuh against the PTX ISA manual, written out here once more:
sections "Tensors" (swizzling modes, out-of-bound access), "Matrix fragments for wgmma.mma_async.m64nNk16",
"Shared memory matrix layout" and "mbarrier"; and what is refused."""

import pytest
import torch
from emulated import call

HALVES = {0: torch.float16, 1: torch.bfloat16}


def swizzled(tile):
    """A (rows, 64) tile of 16-bit elements as the 128-byte swizzle lays it out: of the address of a 16-byte chunk, bits
    4 to 6 (the chunk in its row) are xored with bits 7 to 9 (the row modulo 8)."""
    out = torch.empty_like(tile)
    for row in range(tile.shape[0]):
        for chunk in range(8):
            address = (row * 128 + chunk * 16) ^ ((row % 8) << 4)
            out[address // 128, address % 128 // 2 : address % 128 // 2 + 8] = tile[row, 8 * chunk : 8 * chunk + 8]
    return out


def results(d, n):
    """(64, n) from (128, n / 2) accumulators: di of thread T is in row 16 (T / 32) + T % 32 / 4, + 8 if i % 4 ≥ 2,
    column 8 (i / 4) + 2 (T % 4) + (i & 1)."""
    out = torch.full((64, n), torch.nan)
    for thread in range(128):
        for i in range(n // 2):
            row = 16 * (thread // 32) + thread % 32 // 4 + (8 if i % 4 >= 2 else 0)
            out[row, 8 * (i // 4) + 2 * (thread % 4) + (i & 1)] = d[thread, i]
    return out


@pytest.mark.parametrize("at", [(0, 0, 0, 0), (0, 2, 3, 1), (8, 1, 10, 0), (0, 0, -3, 1), (64, 0, 0, 0)])
def test_tensor_copy(at):
    x = torch.arange(1, 2 * 20 * 3 * 72 + 1, dtype=torch.int32).to(torch.uint16).view(torch.int16).reshape(2, 20, 3, 72)
    box = torch.zeros(16, 64, dtype=torch.int16)
    for row in range(16):
        token = at[2] + row
        if 0 <= token < 20:
            line = x[at[3], token, at[1], at[0] : at[0] + 64]
            box[row, : len(line)] = line
    got = torch.empty(16, 64, dtype=torch.int16)
    call("tensor_copy", ("in", x), ("in", torch.tensor(at, dtype=torch.int32)), ("out", got), shared=2048, number=1)
    assert torch.equal(got, swizzled(box))


@pytest.mark.parametrize("kernel", ["tensor_copy", "bulk_copy"])
def test_copies_must_be_waited_for(kernel):
    x, at = torch.zeros(2 * 20 * 3 * 72, dtype=torch.int16), torch.zeros(4, dtype=torch.int32)
    out = torch.empty(2048, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="an asynchronous copy that was not waited for"):
        call(kernel, ("in", x), ("in", at), ("out", out), shared=2048, number=0)


def test_bulk_copy():
    x, got = torch.randn(64), torch.empty(64)
    call("bulk_copy", ("in", x), None, ("out", got), shared=256, number=1)
    assert torch.equal(x, got)


@pytest.mark.parametrize("n", [64, 128])
def test_wgmma_of_tiles(n):
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, 64, generator=g).half() for rows in (64, n))
    d = torch.empty(128, n // 2)
    given = [("in", swizzled(a)), ("in", swizzled(b)), ("out", d)]
    call("wgmma", *given, block=128, shared=8192 + 128 * n, number=0 if n == 64 else 2)
    torch.testing.assert_close(results(d, n).double(), a.double() @ b.double().T, rtol=1e-6, atol=1e-5)


def test_accumulators_are_undefined_before_the_wait():
    a, d = torch.ones(64, 64).half(), torch.empty(128, 32)
    call("wgmma", ("in", a), ("in", a), ("out", d), block=128, shared=16384, number=1, build="emulated")
    assert d.isnan().all()


@pytest.mark.parametrize("is_bf16", [0, 1], ids=("f16 n64", "bf16 n128"))
def test_wgmma_of_registers(is_bf16):
    """a: element i of thread T, two to a register: row T / 4 of its warp's 16 for i = 0, 1, 4, 5, else + 8; column
    2 (T % 4) + (i & 1), + 8 for i ≥ 4. b: rows of 64 elements along n, for each k; 64 columns after another."""
    n, kind = (128 if is_bf16 else 64), HALVES[is_bf16]
    g = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(*size, generator=g) for size in ((64, 16), (16, n), (64, n)))
    a, b = a.to(kind), b.to(kind)
    registers, d = torch.empty(128, 8, dtype=kind), torch.empty(128, n // 2)
    for thread in range(128):
        for i in range(8):
            row = 16 * (thread // 32) + thread % 32 // 4 + (0 if i in (0, 1, 4, 5) else 8)
            registers[thread, i] = a[row, 2 * (thread % 4) + (i & 1) + (8 if i >= 4 else 0)]
        for i in range(n // 2):
            row = 16 * (thread // 32) + thread % 32 // 4 + (8 if i % 4 >= 2 else 0)
            d[thread, i] = c[row, 8 * (i // 4) + 2 * (thread % 4) + (i & 1)]
    panels = torch.stack([swizzled(b[:, at : at + 64].contiguous()) for at in range(0, n, 64)])
    given = [("in", registers), ("in", panels), ("inout", d)]
    call("wgmma_registers", *given, block=128, shared=32 * n, number=is_bf16)
    torch.testing.assert_close(results(d, n).double(), c.double() + a.double() @ b.double(), rtol=1e-6, atol=1e-5)
