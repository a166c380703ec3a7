"""Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762) with grouped key/value heads (Ainslie et al.
2023, arXiv:2305.13245), padding by lengths, packed documents, a sliding window (Longformer: Beltagy et al. 2020,
arXiv:2004.05150; as Mistral 7B has it: Jiang et al. 2023, arXiv:2310.06825), a softcap of the scores (Gemma 2, 2024,
arXiv:2408.00118) and a mask of (query, key) pairs (Q-Former: Li et al. 2023, arXiv:2301.12597; Flamingo, where text
sees the image before it: Alayrac et al. 2022, arXiv:2204.14198).

    o[b, i, h] = Σ_j p_j v[b, j, g],   p = softmax over the visible j of  s_j = scale · q[b, i, h] · k[b, j, g]
    g = h // (H / Hkv)
    softcap c > 0:  c · tanh(s_j / c) in place of s_j;  its derivative is 1 − tanh²(s_j / c)
    visible(b, i, j) = (j < lengths[b]) and (not causal or j <= i + Tk − Tq) and (i and j of one document)
                       and (no window or j > place − window) and (no mask or mask[b, i, j])
    place = i + Tk − Tq if causal, else the sequence's last key: lengths[b] − 1, Tk − 1 or the document's last

A query that sees no key gives 0 and gets gradient 0. Tokens that no query of a sequence may see (keys behind `lengths`,
tokens of other documents, the padding of a tile) add exactly 0 to every sum and get gradient 0, whatever they hold, NaN
and infinity too. The causal rule, the window and the mask do not promise that: there a hidden key has weight 0, and 0 ·
NaN is NaN. (The kernels skip tiles of keys that no query of a tile sees, so what NaN does there depends on the tiles.)

Arithmetic in fp32 whatever the dtype; the result is rounded once. The reference makes the whole (Tq, Tk) score matrix;
the kernels never do (FlashAttention-2, arXiv:2307.08691).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.ops._backends import native_float
from finetune.ops._op import op
from finetune.ops._samples import Sample


@op
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    window: int = 0,
    softcap: float = 0.0,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """q (B, Tq, H, D), k and v (B, Tk, Hkv, D) of one dtype, H a multiple of Hkv → (B, Tq, H, D). Gradients for all.

    causal: query i sees keys j <= i + Tk − Tq. lengths (B,): query rows of b see keys j < lengths[b] only.
    cu_seqlens (N + 1,): B = 1 and Tq = Tk; tokens cu_seqlens[n] … cu_seqlens[n+1] − 1 are document n and see only it.
    window w > 0: a query sees the last w keys up to its own place, of those that the rules above show; not causal, the
    sequence's last w keys, which is what one token of each of several sequences of different lengths needs in decoding.
    softcap c > 0: scores s become c · tanh(s / c), after the scale and before the masks. 0 turns either off.
    mask (B, Tq, Tk) or (1, Tq, Tk), bool: of the keys that the rules above show, a query sees those where it is True.
    It excludes cu_seqlens and has no gradient.
    A query that sees no key gives 0. scale defaults to 1/√D.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if cu_seqlens is not None:  # one document after another
        ends = cu_seqlens.tolist()
        check_documents(ends, q.shape[1])
        documents = (tuple(x[:, i:j] for x in (q, k, v)) for i, j in itertools.pairwise(ends))
        rules = {"causal": causal, "scale": scale, "window": window, "softcap": softcap}
        parts = [attention.reference(*each, **rules) for each in documents]
        return torch.cat([q[:, :0], *parts], 1)
    hidden = ~visible(q, k, causal, lengths, None, window, mask)  # (B, Tq, Tk)
    q = q.masked_fill(hidden.all(2)[..., None, None], 0)
    k, v = (x.masked_fill(behind(x, lengths), 0) for x in (k, v)) if lengths is not None else (k, v)
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[2] // k.shape[2]
    k, v = (x.to(wide).repeat_interleave(group, dim=2) for x in (k, v))  # (B, Tk, H, D)
    scores = torch.einsum("bihd,bjhd->bhij", q.to(wide), k) * scale
    scores = capped(scores, softcap)
    hidden = hidden[:, None]  # (B, 1, Tq, Tk)
    p = scores.masked_fill(hidden, -math.inf).softmax(-1).masked_fill(hidden, 0)  # a row without keys: NaN, then 0
    return torch.einsum("bhij,bjhd->bihd", p, v).to(q.dtype)


def behind(keys: Tensor, lengths: Tensor) -> Tensor:
    """(B, Tk, 1, 1) bool: which keys lie behind their sequence's length."""
    token = torch.arange(keys.shape[1], device=keys.device)
    return (token >= lengths.to(keys.device)[:, None])[..., None, None]


def capped(scores: Tensor, softcap: float) -> Tensor:
    return softcap * (scores / softcap).tanh() if softcap else scores


def visible(
    q: Tensor,
    k: Tensor,
    causal: bool,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    window: int = 0,
    mask: Tensor | None = None,
) -> Tensor:
    """(B, Tq, Tk) bool: which key each query sees."""
    (b, tq), tk = q.shape[:2], k.shape[1]
    i = torch.arange(tq, device=q.device)[:, None]
    j = torch.arange(tk, device=q.device)
    seen = torch.ones(b, tq, tk, dtype=torch.bool, device=q.device)
    last: Tensor | int = tk - 1  # key of the sequence
    if lengths is not None:
        last = lengths.to(q.device)[:, None, None] - 1
        seen = seen & (j <= last)
    if cu_seqlens is not None:
        ends = cu_seqlens.to(q.device).long()
        document = torch.searchsorted(ends, j, right=True)  # (T,)
        last = ends[document][:, None] - 1
        seen = seen & (document[:, None] == document)
    if causal:
        last = i + tk - tq
        seen = seen & (j <= last)
    if mask is not None:
        seen = seen & mask
    return seen & (j > last - window) if window else seen


def check_documents(ends: list[int], tokens: int) -> None:
    if not ends or ends[0] != 0 or ends[-1] != tokens or any(i > j for i, j in itertools.pairwise(ends)):
        raise ValueError(f"attention: cu_seqlens must rise from 0 to the number of tokens, {tokens}, got {ends}")


@attention.check
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    window: int,
    softcap: float,
    mask: Tensor | None,
    **_,
) -> None:
    if q.dim() != 4 or k.shape != v.shape or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[-1]):
        raise ValueError(
            f"attention: q must be (B, Tq, H, D), k and v (B, Tk, Hkv, D), got {[*q.shape]}, {[*k.shape]}, {[*v.shape]}"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"attention: {q.shape[2]} query heads are not a multiple of {k.shape[2]} key heads")
    if lengths is not None and (cu_seqlens is not None or lengths.shape != q.shape[:1]):
        raise ValueError("attention: lengths must be (B,), and excludes cu_seqlens")
    if cu_seqlens is not None and (q.shape[0] != 1 or q.shape[1] != k.shape[1]):
        raise ValueError("attention: cu_seqlens needs B = 1 and as many queries as keys")
    if window < 0:
        raise ValueError(f"attention: window must be 0 (none) or a number of keys, got {window}")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"attention: softcap must be 0 (none) or positive and finite, got {softcap}")
    if mask is None:
        return
    if cu_seqlens is not None:
        raise ValueError("attention: mask excludes cu_seqlens")
    b, *pairs = q.shape[0], q.shape[1], k.shape[1]
    if mask.dtype is not torch.bool or mask.dim() != 3 or mask.shape[0] not in (1, b) or [*mask.shape[1:]] != pairs:
        raise ValueError(
            f"attention: mask must be bool, (B, Tq, Tk) = {[b, *pairs]} or {[1, *pairs]}, got {mask.dtype}, "
            f"{[*mask.shape]}"
        )


@attention.fused
def _(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None, lengths, cu_seqlens, window, softcap, mask
) -> Tensor:
    seen = visible(q, k, causal, lengths, cu_seqlens, window, mask)[:, None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if softcap:  # torch has no fused form of it: scores in fp32, and weights in v's dtype as its kernels have them
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = capped(q.to(wide) @ k.to(wide).mT * scale, softcap)
        p = scores.masked_fill(~seen, -math.inf).softmax(-1).masked_fill(~seen, 0)
        return (p.to(v.dtype) @ v).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=True).transpose(1, 2)


attention.on_host = ("lengths", "cu_seqlens")


@attention.supports
def _(
    backend: str, q: Tensor, k: Tensor, v: Tensor, window: int, softcap: float, mask: Tensor | None, **_
) -> str | None:
    newer = {"window": window, "softcap": softcap, "mask": mask is not None}
    if any(newer.values()):
        known = dict(attention.schemas["attention"].arguments)
        if older := [name for name, used in newer.items() if used and name not in known]:
            return f"the native library is older than its {older[0]}: pip install -e . builds it again"
    if backend not in ("cpp", "triton") and q.shape[-1] > 256:
        return f"it takes head dims up to 256, got {q.shape[-1]}"
    return native_float(backend, q, k, v)


@attention.operands
def _(q: Tensor, scale: float | None, **_) -> dict[str, float]:
    return {"scale": 1 / math.sqrt(q.shape[-1]) if scale is None else scale}


@attention.fake()
def _(q: Tensor, **_) -> tuple[Tensor, Tensor, Tensor]:
    b, t, h, _d = q.shape
    m, l = (q.new_empty(b, h, t, dtype=torch.float32) for _ in range(2))
    return q.new_empty(q.shape), m, l


def keep(ctx, inputs, output) -> tuple[Tensor, ...]:
    ctx.mark_non_differentiable(*output[1:])
    return output


@attention.backward(keep=keep)
def _(operators, ctx, do: Tensor, *_):
    q, k, v, lengths, cu_seqlens, *mask, o, m, l = ctx.saved_tensors
    options = (ctx.rest["causal"], ctx.rest["scale"], lengths, cu_seqlens)
    rules = [ctx.rest[name] for name in ("window", "softcap") if name in ctx.rest]
    grads = operators.attention_backward(do, q, k, v, o, m, l, *options, *rules, *mask)
    return *grads, *[None] * (len(ctx.needs_input_grad) - 3)


@attention.sampled
def samples() -> Iterator[Sample]:
    g = torch.Generator().manual_seed(0)

    def make(
        name: str,
        b: int,
        tq: int,
        tk: int,
        heads: int,
        kv_heads: int,
        dim: int,
        *,
        size: float = 1.0,
        bench: bool = False,
        grad: bool = True,
        **kwargs,
    ) -> Sample:
        q, k, v = (
            torch.randn(b, t, h, dim, generator=g, dtype=torch.float64) * s
            for t, h, s in ((tq, heads, size), (tk, kv_heads, size), (tk, kv_heads, 1.0))
        )
        if not bench and (lengths := kwargs.get("lengths")) is not None:
            unseen = behind(k, lengths)
            k, v = k.masked_fill(unseen, torch.nan), v.masked_fill(unseen, torch.inf)
        pairs = 0.0  # (query, key, head) triples in which the query sees the key
        if bench:
            causal, lengths, documents = kwargs.get("causal", True), kwargs.get("lengths"), kwargs.get("cu_seqlens")
            window, mask = kwargs.get("window", 0), kwargs.get("mask")
            pairs = heads * visible(q, k, causal, lengths, documents, window, mask).sum().item()
        return Sample(
            name,
            (q, k, v),
            kwargs,
            grad=(0, 1, 2) if grad else (),
            bench=bench,
            flops=(4.0 + 10.0 * grad) * dim * pairs,
            bytes=4.0 * (2 + 4 * grad) * (q.numel() + k.numel()),  # q k v → o; then do q k v o → dq dk dv
        )

    def ints(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype)

    def bits(*shape: int, share: float = 0.5) -> Tensor:
        return torch.rand(*shape, generator=g) < share

    def images_before(text: int, starts: list[int], latents: int) -> Tensor:
        """(1, text, images · latents): a token sees the latents of the last image that starts at or before it."""
        image = (torch.arange(text)[:, None] >= torch.tensor(starts)).sum(1) - 1  # −1: none
        return (image[:, None] == torch.arange(len(starts) * latents) // latents)[None]

    yield make("small", 1, 3, 3, 2, 1, 8)
    yield make("one", 1, 1, 1, 1, 1, 1)
    yield make("causal", 2, 37, 37, 2, 2, 16)
    yield make("full", 1, 70, 70, 3, 1, 33, causal=False)
    yield make("blocks", 1, 131, 131, 2, 1, 64)
    yield make("grouped", 2, 67, 67, 6, 2, 24)
    yield make("fewer queries", 2, 5, 83, 4, 2, 20)
    yield make("many keys", 1, 21, 150, 2, 1, 7)
    yield make("more queries", 1, 41, 29, 2, 1, 12)  # the first 12 rows see nothing
    yield make("decode", 3, 1, 71, 4, 2, 40, lengths=ints(71, 13, 0))
    # what the CUDA kernels split over blocks: packed heads; a split that sees nothing; two tiles of fp32 rows
    yield make("decode long", 2, 1, 600, 4, 2, 16, lengths=ints(600, 300))
    yield make("decode several", 1, 5, 530, 6, 2, 40)
    yield make("decode rows", 1, 10, 270, 4, 1, 8, causal=False)
    yield make("decode wide", 1, 2, 300, 1, 1, 200)
    yield make("lengths", 3, 45, 45, 2, 1, 16, lengths=ints(45, 17, 0, dtype=torch.int32))
    yield make("full lengths", 3, 45, 50, 2, 1, 16, causal=False, lengths=ints(50, 1, 0))
    yield make("packed", 1, 90, 90, 4, 2, 16, cu_seqlens=ints(0, 1, 1, 40, 67, 90))
    yield make("packed full", 1, 90, 90, 2, 2, 10, causal=False, cu_seqlens=ints(0, 70, 90, dtype=torch.int32))
    yield make("wide", 1, 19, 19, 2, 1, 256)
    yield make("scaled", 1, 24, 24, 1, 1, 17, scale=0.05)
    yield make("negative scale", 1, 41, 41, 2, 1, 16, scale=-0.3)
    yield make("no scale", 1, 20, 23, 1, 1, 8, scale=0.0)
    yield make("large logits", 1, 50, 50, 1, 1, 16, size=70.0)
    yield make("no queries", 1, 0, 5, 2, 1, 8)
    yield make("no batch", 0, 4, 4, 2, 1, 8)
    q, k, v = make("", 2, 4, 23, 4, 4, 9).args
    # (B, H, T, D) tensors seen as (B, T, H, D), and one whose D is not adjacent
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    yield Sample("strided", (*heads_first, v.transpose(1, 3).contiguous().transpose(1, 3)), grad=(0, 1, 2))

    yield make("few of each", 1, 2, 3, 4, 2, 4)
    yield make("padded dim", 1, 75, 75, 2, 1, 96)
    yield make("odd dim", 1, 40, 67, 1, 1, 129, causal=False)

    q, k, v = make("", 1, 41, 29, 2, 1, 12).args
    yield Sample("blind NaN", (q.masked_fill(torch.arange(41)[:, None, None] < 12, torch.nan), k, v), grad=(0, 1, 2))
    documents = ints(0, 33, 50, 50, 83)  # in one tile: one whose every key is NaN, and one whose every value is
    q, k, v = make("", 1, 83, 83, 2, 1, 24).args
    token = torch.arange(83)[:, None, None]
    k = k.masked_fill((token >= 33) & (token < 50), torch.nan)
    for causal in (True, False):
        kwargs = {"cu_seqlens": documents, "causal": causal}
        name = "packed NaN" + (", full" if not causal else "")
        yield Sample(name, (q, k, v.masked_fill(token >= 50, torch.nan)), kwargs, grad=(0, 1, 2))

    yield from make("aligned", 1, 20, 40, 2, 1, 64, lengths=ints(33)).at_odd_addresses()
    fused = torch.randn(1, 45, 3, 2, 64, generator=g, dtype=torch.float64)  # every tensor with different strides
    q, k, v = fused[:, :, 0], fused[:, :, 1], torch.randn(1, 2, 45, 64, generator=g, dtype=torch.float64)
    yield Sample("strides", (q, k, v.transpose(1, 2)), grad=(0, 1, 2))
    every = [(argument, dimension) for argument in range(3) for dimension in range(3)]
    yield from make("heads", 2, 17, 17, 4, 2, 24).far_apart(*every)

    # a window: of 1, wider than the keys, past whole tiles, and where it hides every key (rows past the length)
    yield make("window", 1, 37, 37, 2, 1, 16, window=9)
    yield make("window of one", 2, 21, 21, 2, 1, 8, window=1)
    yield make("wide window", 1, 19, 19, 2, 2, 8, window=40)
    yield make("window of two tiles", 1, 100, 100, 1, 1, 8, window=60)  # of fp32: the first is masked on its own
    yield make("window over tiles", 1, 210, 210, 1, 1, 40, window=70)
    yield make("window, fewer queries", 1, 7, 83, 4, 2, 20, window=20)
    yield make("window, more queries", 1, 41, 29, 2, 1, 12, window=5)
    yield make("window, lengths", 3, 45, 45, 6, 2, 16, window=6, lengths=ints(45, 17, 0))
    yield make("window, packed", 1, 190, 190, 4, 2, 16, window=12, cu_seqlens=ints(0, 1, 1, 40, 117, 190))
    yield make("window, packed full", 1, 90, 90, 2, 1, 10, window=30, causal=False, cu_seqlens=ints(0, 70, 90))
    yield make("window, full", 3, 45, 150, 2, 1, 16, window=20, causal=False, lengths=ints(150, 100, 3))
    yield make("window decode", 4, 1, 171, 6, 2, 24, window=40, causal=False, lengths=ints(171, 60, 9, 0))
    yield make("window decode long", 2, 1, 600, 4, 2, 16, window=250, causal=False, lengths=ints(600, 310))
    yield make("window decode several", 1, 5, 530, 6, 2, 24, window=100)
    yield make("softcap", 1, 45, 45, 2, 1, 16, size=2.0, softcap=3.0)
    yield make("softcap, large logits", 1, 50, 50, 1, 1, 16, size=12.0, softcap=50.0, causal=False)
    yield make("softcap, negative scale", 1, 41, 41, 2, 1, 24, scale=-0.5, softcap=2.0)
    yield make("softcap, window, packed", 1, 150, 150, 2, 2, 64, softcap=2.0, window=37, cu_seqlens=ints(0, 20, 150))
    yield make("softcap decode", 2, 1, 600, 4, 2, 16, softcap=2.0, window=300, causal=False, lengths=ints(600, 31))

    # a mask: of pairs at random, shared by the batch, with each other rule, and hiding whole rows, keys, tiles, splits
    yield make("mask", 2, 37, 45, 4, 2, 16, causal=False, mask=bits(2, 37, 45))
    yield make("mask of all", 2, 70, 70, 2, 2, 8, mask=bits(1, 70, 70, share=0.9) | (torch.arange(70) < 64))
    yield make("mask, lengths", 3, 45, 50, 2, 1, 16, causal=False, lengths=ints(50, 21, 0), mask=bits(3, 45, 50))
    yield make("mask, window, softcap", 1, 90, 131, 2, 1, 24, window=30, softcap=2.0, mask=bits(1, 90, 131))
    before = images_before(150, [20, 90, 91], 64)
    yield make("mask of images", 2, 150, 192, 2, 1, 64, causal=False, mask=before)
    yield make(
        "mask of small images", 1, 75, 80, 2, 1, 129, causal=False, mask=images_before(75, [5, 9, 40, 50, 74], 16)
    )
    q, k, v = make("", 1, 21, 26, 2, 1, 8).args
    unseen = (torch.arange(21) % 3 == 0) | (torch.arange(21) < 8)
    blind = {"causal": False, "mask": bits(1, 21, 26) & ~unseen[:, None] & (torch.arange(26) % 5 > 0)}
    yield Sample("mask, blind NaN", (q.masked_fill(unseen[:, None, None], torch.nan), k, v), blind, grad=(0, 1, 2))
    hides: dict[str, Any] = {"lengths": ints(600, 310), "mask": bits(2, 1, 600) & (torch.arange(600) >= 290)}
    yield make("mask decode", 2, 1, 600, 4, 2, 16, causal=False, **hides)
    yield make("mask decode several", 1, 5, 530, 6, 2, 40, mask=bits(1, 5, 530, share=0.1))
    yield make("mask of columns", 2, 20, 33, 2, 1, 8, causal=False, mask=bits(2, 33, 20).transpose(1, 2))
    yield make("mask of keys", 2, 41, 33, 2, 2, 8, mask=bits(2, 1, 33).expand(2, 41, 33))
    yield from (
        s for s in make("mask", 1, 20, 40, 2, 1, 64, mask=bits(1, 20, 40)).at_odd_addresses() if "mask" in s.odd
    )

    yield make("bench", 1, 1024, 1024, 8, 8, 64, bench=True)
    yield make("bench grouped", 4, 512, 512, 9, 3, 64, bench=True)
    yield make("bench short", 32, 128, 128, 4, 4, 64, bench=True)
    ends = [0, 118, 241, 359, 483, 600, 724, 841, 960]
    yield make("bench packed", 1, 960, 960, 9, 3, 64, bench=True, cu_seqlens=ints(*ends))
    yield make("bench window", 1, 1024, 1024, 9, 3, 64, bench=True, window=256)
    before = images_before(512, [*range(0, 512, 64)], 64)
    yield make("bench mask", 4, 512, 512, 8, 8, 64, bench=True, causal=False, mask=before)
    tokens = ints(*range(64, 513, 64))
    yield make("bench decode", 8, 1, 512, 9, 3, 64, bench=True, grad=False, lengths=tokens, causal=False)
