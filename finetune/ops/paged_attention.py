"""Attention of the newest tokens of many sequences over a paged key–value cache (Kwon et al. 2023, arXiv:2309.06180),
with split keys (Dao et al. 2023, Flash-Decoding). Query i of Tq is token lengths[b] − Tq + i of its sequence:

    o[b, i, h] = Σ_j p_j v[j],   p = softmax over the visible j of  s_j = scale · q[b, i, h] · k[j]
    k[j], v[j]: token j of kv head h // (H / Hkv), in block table[b, j // block_size], times its scale if it has 8 bits
    visible(i, j) = j <= i + lengths[b] − Tq and, with a window, j > i + lengths[b] − Tq − window
    softcap c > 0 (Gemma 2, 2024, arXiv:2408.00118):  c · tanh(s_j / c) in place of s_j, log-sum-exps of it too

A query that sees nothing gives 0 and a log-sum-exp of −inf. The rest of a block behind lengths[b], and blocks of no
sequence, may hold anything, NaN too. Arithmetic in fp32; the result is rounded once. The native kernels cut a sequence
into pieces of 256 tokens, attend to each separately, and combine the pieces by their log-sum-exps, so a result depends
on its own sequence only: not on the rest of the batch, the width of the table, or the threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from finetune.ops._backends import native_float, wrong_device
from finetune.ops._op import op
from finetune.ops._samples import Sample
from finetune.ops.attention import capped
from finetune.ops.kv_cache import LARGEST, as_integers, check_scale, contiguous_blocks, kv_cache, quantize, raw

MOST_DIM = 256  # of the kernels for GPUs


@op
def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    table: Tensor,
    lengths: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
    lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """q (B, H, D) or (B, Tq, H, D), caches (blocks, block_size, Hkv, D) of q's dtype or 8 bits, H a multiple of Hkv,
    table (B, max_blocks), lengths (B,) with the queries' own tokens counted → like q; with `lse` also fp32 log-sum-exps
    (B, H) or (B, Tq, H), by which results over parts of a cache can be combined. No gradients.

    k_scale, v_scale: fp32 (blocks, block_size, Hkv) of caches of int8 or float8_e4m3fn. scale: 1/√D. window w > 0: a
    query sees that many tokens, itself included. softcap c > 0: scores s become c · tanh(s / c). 0 turns either off.
    Entries of the table behind the last token are never looked at.
    """
    queries = q if q.dim() == 4 else q[:, None]
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    k = dense(queries, k_cache, table, lengths, k_scale, queries.shape[2])
    v = dense(queries, v_cache, table, lengths, v_scale, queries.shape[2])
    hidden = ~visible(queries, k.shape[1], lengths, window)[:, None]  # (B, 1, Tq, T)
    scores = capped(torch.einsum("bihd,bjhd->bhij", queries.to(k.dtype), k) * scale, softcap)
    scores = scores.masked_fill(hidden, -math.inf)
    p = scores.softmax(-1).masked_fill(hidden, 0)
    out = torch.einsum("bhij,bjhd->bihd", p, v).to(q.dtype)
    return shaped((out, scores.logsumexp(-1).transpose(1, 2)), q, lse)


@paged_attention.results
def shaped(output: tuple[Tensor, Tensor], q: Tensor, lse: bool, **_) -> Tensor | tuple[Tensor, Tensor]:
    out, sums = output if q.dim() == 4 else (x[:, 0] for x in output)
    return (out, sums) if lse else out


def dense(q: Tensor, cache: Tensor, table: Tensor, lengths: Tensor, scale: Tensor | None, heads: int) -> Tensor:
    """(B, T, H, D) in the arithmetic's dtype: the cache gathered, kv heads repeated."""
    wide = torch.promote_types(q.dtype, torch.float32)
    x = kv_cache.reference("gather", cache, table, lengths, scale, None if scale is None else wide)
    return x.to(wide).repeat_interleave(heads // x.shape[2], dim=2)


def visible(q: Tensor, keys: int, lengths: Tensor, window: int) -> Tensor:
    """(B, Tq, T) bool: which token each query sees."""
    j = torch.arange(keys, device=q.device)
    last = lengths[:, None].clamp(max=keys) - q.shape[1] + torch.arange(q.shape[1], device=q.device)  # (B, Tq)
    seen = j <= last[..., None]
    return seen & (j > last[..., None] - window) if window else seen


@paged_attention.check
def _(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor, lengths: Tensor, window: int, softcap: float, **_
) -> None:
    if q.dim() not in (3, 4) or k_cache.dim() != 4 or k_cache.shape != v_cache.shape or q.shape[-1] != k_cache.shape[3]:
        raise ValueError(
            "paged_attention: q must be (B, H, D) or (B, Tq, H, D) and the caches (blocks, block_size, Hkv, D), got "
            f"{[*q.shape]}, {[*k_cache.shape]}, {[*v_cache.shape]}"
        )
    if q.shape[-2] % k_cache.shape[2]:
        raise ValueError(
            f"paged_attention: {q.shape[-2]} query heads are not a multiple of {k_cache.shape[2]} key heads"
        )
    if table.dim() != 2 or lengths.shape != table.shape[:1] or q.shape[0] != table.shape[0]:
        raise ValueError("paged_attention: table must be (B, max_blocks) and lengths (B,)")
    if window < 0:
        raise ValueError(f"paged_attention: window must be 0 (none) or a number of tokens, got {window}")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"paged_attention: softcap must be 0 (none) or positive and finite, got {softcap}")


@paged_attention.supports
def _(backend: str, q: Tensor, k_cache: Tensor, v_cache: Tensor, softcap: float, **_) -> str | None:
    if softcap and "softcap" not in dict(paged_attention.schemas["paged_attention"].arguments):
        return "the native library is older than its softcap: pip install -e . builds it again"
    if k_cache.dtype != v_cache.dtype:
        return "it takes keys and values of one dtype"
    if reason := native_float(backend, q, *(c for c in (k_cache, v_cache) if c.dtype not in LARGEST)):
        return reason
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k_cache, v_cache)):
        return "it has no backward pass"
    if backend != "cpp" and q.shape[-1] > MOST_DIM:
        return f"it takes heads of at most {MOST_DIM}"
    return wrong_device(backend, k_cache, v_cache) or contiguous_blocks(k_cache, v_cache)


@paged_attention.operands
def _(q, k_cache, v_cache, table, lengths, k_scale, v_scale, scale, **_):
    check_scale("paged_attention", k_cache, k_scale)
    check_scale("paged_attention", v_cache, v_scale)
    return {
        "q": q if q.dim() == 4 else q[:, None],
        "k_cache": raw(k_cache),
        "v_cache": raw(v_cache),
        "table": as_integers("paged_attention: table", table, torch.int32),
        "lengths": as_integers("paged_attention: lengths", lengths, torch.int32),
        "scale": 1 / math.sqrt(q.shape[-1]) if scale is None else scale,
    }


@paged_attention.fake()
def _(q: Tensor, **_) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@paged_attention.sampled
def samples() -> Iterator[Sample]:
    g = torch.Generator().manual_seed(0)
    int8, fp8 = torch.int8, torch.float8_e4m3fn

    def make(
        name: str,
        lengths: list[int],
        block_size: int,
        heads: int,
        kv_heads: int,
        dim: int,
        *,
        queries: int | None = None,
        dtype: torch.dtype | None = None,
        size: float = 1.0,
        width: int = 0,  # of the table, at least
        shared: int = 0,  # leading blocks that all sequences share
        bench: bool = False,
        **kwargs,
    ) -> Sample:
        """Blocks in random order; those of no sequence, block 0 among them, are NaN except in benches, where torch's
        composition may then look at it."""
        rows = len(lengths)
        needed = [-(-n // block_size) for n in lengths]
        blocks = 1 + sum(needed)
        order = (torch.randperm(blocks - 1, generator=g) + 1).tolist()
        table = torch.zeros(rows, max([width, *needed], default=0), dtype=torch.int32)
        for b, n in enumerate(needed):
            table[b, :n] = torch.tensor([order.pop() for _ in range(n)])
            common = min(shared, n, needed[0])
            table[b, :common] = table[0, :common]
        shape = (blocks, block_size, kv_heads, dim)
        k, v = (torch.randn(shape, generator=g, dtype=torch.float64) * s for s in (size, 1.0))
        used = torch.zeros(shape[:2], dtype=torch.bool)
        for b, n in enumerate(lengths):
            j = torch.arange(n)
            used[table[b, j // block_size].long(), j % block_size] = True
        (k, k_scale), (v, v_scale) = ((x, None) if dtype is None else quantize(x, dtype) for x in (k, v))
        for x, s in () if bench else ((k, k_scale), (v, v_scale)):
            (x if s is None else s)[~used] = torch.nan
            if dtype == fp8:
                x.view(torch.uint8)[~used] = 0x7F
        q = torch.randn(rows, *([queries] if queries else []), heads, dim, generator=g, dtype=torch.float64) * size
        moved = sum(lengths) * 2 * kv_heads * (dim * (1.0 if dtype else 4.0) + (4 if dtype else 0)) + 8.0 * q.numel()
        given = (q, k, v, table, torch.tensor(lengths, dtype=torch.int32), k_scale, v_scale)
        flops = 4.0 * heads * dim * sum(lengths) * (queries or 1)
        return Sample(name, given, kwargs, bench=bench, flops=flops, bytes=moved)

    yield make("small", [5, 3], 4, 2, 1, 8)
    yield make("ragged", [37, 0, 1, 16, 17], 16, 2, 2, 16)
    yield make("int8", [19, 8], 8, 6, 2, 32, dtype=int8)
    yield make("fp8", [21, 0, 8], 8, 3, 1, 24, dtype=fp8)
    yield make("one", [1], 1, 1, 1, 1)
    yield make("prime", [29, 41], 13, 3, 3, 37)
    yield make("grouped by 3", [33, 6], 32, 6, 2, 40, lse=True)
    yield make("grouped by 8", [50, 2], 16, 8, 1, 64)
    yield make("grouped by 11", [23], 7, 11, 1, 12, scale=0.1)
    yield make("shared prefix", [40, 44, 17, 33], 16, 2, 1, 16, shared=2)
    yield make("split", [256, 257, 0], 16, 4, 2, 16)
    yield make("split, wide table", [300, 5], 32, 2, 1, 8, width=18)
    yield make("split int8", [513], 16, 3, 1, 20, dtype=int8, lse=True)
    yield make("window", [40, 270, 3], 16, 2, 1, 16, window=30)
    yield make("window of 1", [17, 1], 16, 2, 1, 8, window=1, lse=True)
    yield make("queries", [258, 3, 0], 16, 2, 1, 16, queries=5)
    yield make("queries, window, int8", [31, 50], 16, 2, 1, 24, queries=3, window=20, dtype=int8)
    yield make("softcap", [45, 3, 0], 16, 4, 2, 16, size=2.0, softcap=3.0, lse=True)
    yield make("softcap, large logits", [60, 7], 16, 4, 2, 16, size=12.0, softcap=50.0)
    yield make("softcap, negative scale", [41], 16, 2, 1, 24, scale=-0.5, softcap=2.0)
    yield make("softcap, one head", [41, 9], 16, 2, 2, 24, size=2.0, softcap=4.0)
    yield make("softcap, split, window, queries", [600, 31], 16, 4, 2, 16, softcap=2.0, window=300, queries=3, lse=True)
    yield make("softcap, int8", [270, 5], 16, 6, 2, 24, size=2.0, softcap=3.0, dtype=int8, lse=True)
    yield make("wide", [20], 16, 2, 1, 256)
    yield make("wide, odd, fp8", [18], 5, 8, 1, 251, dtype=fp8)
    yield make("large logits", [60, 7], 16, 4, 2, 16, size=70.0)
    yield make("no batch", [], 16, 2, 1, 8)
    yield make("no tokens", [0, 0], 16, 2, 1, 8)
    q, k, v, table, lengths, *_ = make("", [20, 9], 8, 4, 2, 24).args
    fused = torch.stack([k, v], 1)  # keys and values of a block side by side
    yield Sample(
        "strided",
        (q.transpose(0, 1).contiguous().transpose(0, 1), fused[:, 0], fused[:, 1], table, lengths, None, None),
    )

    # blocks an odd number of elements apart, and those of v farther than those of k
    apart = [x.new_empty(len(x), x[0].numel() + gap)[:, : x[0].numel()].view(x.shape) for x, gap in ((k, 3), (v, 5))]
    yield Sample("odd blocks", (q, apart[0].copy_(k), apart[1].copy_(v), table, lengths, None, None))
    blocks = [(0, 0), (0, 1), (1, 0), (2, 0)]
    yield from make("aligned", [37, 5], 16, 2, 1, 64).at_odd_addresses()
    yield from make("aligned int8", [37, 5], 16, 2, 1, 64, dtype=int8).at_odd_addresses()
    yield from make("blocks", [19, 5], 8, 2, 1, 16).far_apart(*blocks)
    yield from make("blocks int8", [19, 5], 8, 2, 1, 16, dtype=int8).far_apart(*blocks[2:], (5, 0), (6, 0))

    many = [int(n) for n in torch.randint(64, 513, (8,), generator=g)]
    yield make("bench", many, 16, 9, 3, 64, bench=True)
    yield make("bench one sequence", [4096], 16, 8, 8, 64, bench=True)
    yield make("bench grouped by 8", [1024, 2048], 16, 32, 4, 128, bench=True)
    yield make("bench int8", many, 16, 9, 3, 64, dtype=int8, bench=True)
    yield make("bench softcap", many, 16, 8, 4, 128, softcap=50.0, bench=True)
    yield make("bench fp8", many, 16, 9, 3, 64, dtype=fp8, bench=True)
