"""The emulated instructions of device/ptx.cuh against the PTX ISA manual's fragment tables, written out here once
more from the manual: sections "Matrix load instruction: ldmatrix", "Matrix fragments for mma.m16n8k16 with floating
point type" and "cp.async"."""

import pytest
import torch
from emulated import call, library

HALVES = {0: torch.float16, 1: torch.bfloat16}


@pytest.mark.parametrize("trans", [0, 1], ids=("as stored", "trans"))
def test_ldmatrix_x4(trans):
    """Register m of thread T: of matrix m the elements 2 (T % 4) and + 1 of row T / 4; .trans: of column T / 4."""
    matrices = torch.arange(256, dtype=torch.int32).mul_(257).to(torch.uint16).reshape(4, 8, 8)
    got = torch.empty(32, 4, dtype=torch.int32)
    call("ldmatrix", ("in", matrices), None, ("out", got), block=32, number=trans)
    for thread in range(32):
        for m in range(4):
            matrix = matrices[m].to(torch.int64)
            line = matrix[:, thread // 4] if trans else matrix[thread // 4]
            low, high = line[thread % 4 * 2].item(), line[thread % 4 * 2 + 1].item()
            assert got[thread, m].item() & 0xFFFFFFFF == low | high << 16


def fragments(a, b):
    """Registers (32, 6) of a (16, 16) and b (16, 8), 16-bit elements. The manual numbers a thread's elements a0 … a7
    and b0 … b3, two to a register, with groupID = T >> 2 and place = threadID_in_group = T % 4:
      a: row = groupID for ai where i is 0, 1, 4, 5, else groupID + 8; column = 2 place + (i & 1), + 8 for i ≥ 4
      b: row = 2 place + (i & 1), + 8 for i ≥ 2; column = groupID"""
    a, b = (t.view(torch.int16).to(torch.int64) & 0xFFFF for t in (a, b))
    out = torch.empty(32, 6, dtype=torch.int64)
    for thread in range(32):
        group, place = thread >> 2, thread % 4
        elements = []
        for i in range(8):
            row = group if i in (0, 1, 4, 5) else group + 8
            elements.append(a[row, place * 2 + (i & 1) + (8 if i >= 4 else 0)])
        for i in range(4):
            elements.append(b[place * 2 + (i & 1) + (8 if i >= 2 else 0), group])
        out[thread] = torch.stack(elements[0::2]) | torch.stack(elements[1::2]) << 16
    return (out - (out >> 31 << 32)).to(torch.int32)


@pytest.mark.parametrize("is_bf16", [0, 1], ids=("f16", "bf16"))
def test_mma_m16n8k16(is_bf16):
    """c0, c1: row groupID; c2, c3: row groupID + 8; column 2 threadID_in_group + (i & 1)."""
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*size, generator=g).to(HALVES[is_bf16]) for size in ((16, 16), (16, 8)))
    c = torch.randn(16, 8, generator=g)
    place = torch.empty(32, 4, 2, dtype=torch.int64)
    for thread in range(32):
        for i in range(4):
            place[thread, i, 0] = (thread >> 2) + (8 if i >= 2 else 0)
            place[thread, i, 1] = (thread % 4) * 2 + (i & 1)
    d = c[place[..., 0], place[..., 1]].contiguous()
    call("mma", ("in", fragments(a, b)), None, ("inout", d), block=32, number=is_bf16)
    exact = c.double() + a.double() @ b.double()
    torch.testing.assert_close(d.double(), exact[place[..., 0], place[..., 1]], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("is_bf16", [0, 1], ids=("f16", "bf16"))
def test_pack(is_bf16):
    x = torch.randn(32, 2, generator=torch.Generator().manual_seed(0)) * 3
    got = torch.empty(32, dtype=torch.int32)
    call("pack", ("in", x), None, ("out", got), block=32, number=is_bf16)
    assert torch.equal(got.view(HALVES[is_bf16]).reshape(32, 2), x.to(HALVES[is_bf16]))  # little-endian: low half first


def test_permute_bytes():
    """prmt: half i of the selector names the byte of {b, a} that becomes byte i; its bit 3, that byte's sign alone."""
    g = torch.Generator().manual_seed(0)
    words = torch.randint(-(2**31), 2**31, (64, 3), generator=g).to(torch.int32)
    got = torch.empty(64, dtype=torch.int32)
    call("permute_bytes", ("in", words), None, ("out", got), block=64)
    for (a, b, selector), result in zip((words.long() & 0xFFFFFFFF).tolist(), got.tolist(), strict=True):
        given = [*a.to_bytes(4, "little"), *b.to_bytes(4, "little")]
        halves = [selector >> (4 * i) & 15 for i in range(4)]
        want = [(255 if given[h & 7] >= 128 else 0) if h >= 8 else given[h] for h in halves]
        assert list((result & 0xFFFFFFFF).to_bytes(4, "little")) == want


@pytest.mark.parametrize("is_bf16", [0, 1], ids=("f16", "bf16"))
def test_subtract(is_bf16):
    pairs = (torch.randn(32, 2, 2, generator=torch.Generator().manual_seed(0)) * 3).to(HALVES[is_bf16])
    got = torch.empty(32, dtype=torch.int32)
    call("subtract", ("in", pairs), None, ("out", got), block=32, number=is_bf16)
    assert torch.equal(got.view(HALVES[is_bf16]).reshape(32, 2), pairs[:, 0] - pairs[:, 1])


@pytest.mark.parametrize("eager", [False, True], ids=("lazy", "eager"))
def test_cp_async(eager):
    """Sixteen bytes each, zeros where nothing is read (odd lanes here), group by group."""
    x, got = torch.randn(2, 32, 4, generator=torch.Generator().manual_seed(0)), torch.empty(2, 32, 4)
    library("checked").set_eager(eager)
    try:
        call("copies", ("in", x), None, ("out", got), block=32)
    finally:
        library("checked").set_eager(False)
    want = x.clone()
    want[:, 1::2] = 0
    assert torch.equal(got, want)


def test_exp2():
    x = torch.linspace(-20, 20, 32)
    got = torch.empty(32)
    call("exp2", ("in", x), None, ("out", got), block=32)
    torch.testing.assert_close(got, torch.exp2(x), rtol=2.4e-7, atol=0)
