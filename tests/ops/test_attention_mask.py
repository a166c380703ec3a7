"""Attention's mask by its meaning: it is what each other rule is as a mask; what it hides; what it refuses. Its numbers
are tested in test_ops.py, test_cuda.py and test_triton.py."""

import pytest
import torch

from finetune.kernels import emulator
from finetune.ops import attention

BACKENDS = pytest.mark.parametrize("backend", ["reference", "cpp", "emulated"])
KERNELS = pytest.mark.parametrize("backend", ["cpp", "emulated"])


@pytest.fixture(scope="module", autouse=True)
def emulated():
    return emulator.load("emulated")


def qkv(b=2, tq=40, tk=None, heads=4, kv_heads=2, dim=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = ((tq, heads), (tk or tq, kv_heads), (tk or tq, kv_heads))
    return [torch.randn(b, t, h, dim, generator=g).requires_grad_() for t, h in shapes]


def all_of(out, inputs):
    """The result and the gradients."""
    do = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    return [out.detach(), *torch.autograd.grad(out, inputs, do)]


def close(a, b):
    return (a - b).abs().max() <= 2e-6 * b.abs().max().clamp(min=1)


LENGTHS = torch.tensor([29, 0])
QUERY, KEY = torch.arange(40)[:, None], torch.arange(40)
AS_MASKS = {
    "causal": ({"causal": True}, (KEY <= QUERY)[None]),
    "window": ({"causal": True, "window": 7}, ((KEY <= QUERY) & (KEY > QUERY - 7))[None]),
    "lengths": ({"causal": False, "lengths": LENGTHS}, (LENGTHS[:, None, None] > KEY).expand(2, 40, 40)),
    "nothing": ({"causal": False}, torch.ones(1, 40, 40, dtype=torch.bool)),
}


@BACKENDS
@pytest.mark.parametrize("rule", AS_MASKS)
def test_a_rule_and_the_mask_of_it_are_one(backend, rule):
    inputs, (rules, mask) = qkv(), AS_MASKS[rule]
    want = all_of(attention(*inputs, **rules, backend=backend), inputs)
    got = all_of(attention(*inputs, causal=False, mask=mask, backend=backend), inputs)
    assert all(map(close, got, want))
    both = all_of(attention(*inputs, **rules, mask=mask, backend=backend), inputs)
    assert all(map(close, both, want))


@BACKENDS
def test_a_mask_and_the_other_rules_hide_together(backend):
    inputs, rules = qkv(), {"causal": True, "lengths": LENGTHS, "window": 9}
    pairs = torch.rand(2, 40, 40, generator=torch.Generator().manual_seed(1)) < 0.6
    together = pairs & AS_MASKS["causal"][1] & AS_MASKS["lengths"][1] & (KEY > QUERY - 9)
    got = all_of(attention(*inputs, **rules, mask=pairs, backend=backend), inputs)
    want = all_of(attention(*inputs, causal=False, mask=together, backend="reference"), inputs)
    assert all(map(close, got, want))


@BACKENDS
def test_a_query_that_sees_nothing_gives_0_and_gets_0(backend):
    """As text before the first image does: in the middle of others, at the start of a tile, all of a sequence."""
    inputs = qkv(tq=150, tk=70, dim=24)
    mask = torch.rand(2, 150, 70, generator=torch.Generator().manual_seed(2)) < 0.5
    mask[0, [5, 64, 65, 149]] = False
    mask[1] = False
    mask[:, :, 11] = False
    out, dq, dk, dv = all_of(attention(*inputs, causal=False, mask=mask, backend=backend), inputs)
    blind = ~mask.any(2)
    assert not out[blind].any()
    assert not dq[blind].any()
    assert (out[~blind] != 0).all()
    assert not dk[:, 11].any()
    assert not dv[:, 11].any()
    assert not dk[1].any()
    assert all(x.isfinite().all() for x in (out, dq, dk, dv))


@BACKENDS
def test_one_mask_for_all_sequences(backend):
    inputs = qkv(b=3)
    mask = torch.rand(1, 40, 40, generator=torch.Generator().manual_seed(3)) < 0.3
    shared = all_of(attention(*inputs, mask=mask, backend=backend), inputs)
    for each in (mask.expand(3, 40, 40), mask.repeat(3, 1, 1), mask.mT.contiguous().mT):
        assert all(map(torch.equal, all_of(attention(*inputs, mask=each, backend=backend), inputs), shared))


@KERNELS
@pytest.mark.parametrize("tq", [1, 130])
def test_tiles_that_no_query_of_a_tile_sees_are_not_multiplied(backend, tq):
    """Keys 64 to 191 of 256 hidden from all: NaN there is not met, which 0 · NaN would be."""
    inputs = qkv(b=1, tq=tq, tk=256)
    mask = torch.rand(1, tq, 256, generator=torch.Generator().manual_seed(4)) < 0.7
    mask[..., 64:192] = False
    clean = all_of(attention(*inputs, causal=False, mask=mask, backend=backend), inputs)
    dirty = [inputs[0], *(x.detach().clone().requires_grad_() for x in inputs[1:])]
    with torch.no_grad():
        for x in dirty[1:]:
            x[:, 64:192] = torch.nan
    got = attention(*dirty, causal=False, mask=mask, backend=backend)
    assert torch.equal(got, clean[0])
    if tq > 1:  # the gradients of one query are not made where keys are read in place
        assert all(map(torch.equal, all_of(got, dirty), clean))


def test_a_warp_makes_products_for_the_tiles_it_sees():
    """160 queries of 64 × 3 keys; a query sees the 64 keys of its image, the first 64 queries none. Forward, of 16-bit
    tiles: 6 warps see one tile of the three each, with dim 64 2 · 32 products; all tiles would be 10 · 3."""
    q, k, v = (x.detach().to(torch.bfloat16) for x in qkv(b=1, tq=160, tk=192, heads=1, kv_heads=1, dim=64))
    image = (torch.arange(160)[:, None] >= torch.tensor([64, 96, 128])).sum(1) - 1
    mask = (image[:, None] == torch.arange(192) // 64)[None]
    emulator.load("checked")
    rows = emulator.trace(lambda: attention(q, k, v, causal=False, mask=mask, backend="checked"))
    assert sum(row["requests"] for row in rows if row["kind"] == "mma") == 6 * (2 * 32)


def test_what_a_mask_refuses():
    q, k, v = (x.detach() for x in qkv(b=2, tq=4, tk=6))
    good = torch.ones(2, 4, 6, dtype=torch.bool)
    for bad in (good.float(), good[0], good[:, :3], good.repeat(2, 1, 1), good[..., :1]):
        with pytest.raises(ValueError, match=r"mask must be bool, \(B, Tq, Tk\) = \[2, 4, 6\] or \[1, 4, 6\], got"):
            attention(q, k, v, mask=bad)
        with pytest.raises(RuntimeError, match=r"mask must be bool, \(batch or 1, Tq, Tk\)"):
            torch.ops.finetune.attention(q, k, v, False, 1.0, None, None, 0, 0.0, bad)
    ends = torch.tensor([0, 4])
    with pytest.raises(ValueError, match="mask excludes cu_seqlens"):
        attention(q[:1], q[:1], q[:1], cu_seqlens=ends, mask=good[:1, :, :4])
    with pytest.raises(RuntimeError, match="mask excludes cu_seqlens"):
        torch.ops.finetune.attention(q[:1], q[:1], q[:1], False, 1.0, None, ends, 0, 0.0, good[:1, :, :4])
