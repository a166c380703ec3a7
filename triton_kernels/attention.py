"""Attention without its score matrix: FlashAttention-2 (Dao 2023, arXiv:2307.08691), forward and backward.

    o_i = Σ_j p_ij v_j,   p_ij = 2^(s_ij − top_i) / total_i,   s_ij = scale · log2(e) · q_i · k_j
    dv_j = Σ_i p_ij do_i        dp_ij = do_i · v_j        ds_ij = p_ij (dp_ij − δ_i)        δ_i = do_i · o_i
    dq_i = scale Σ_j ds_ij k_j  dk_j = scale Σ_i ds_ij q_i

The keys that a query sees are one interval [low, high), whatever hides the others: the causal rule, lengths, the bounds
of its document. Blocks of keys that no query of a block sees are not visited.
Layout: (B, T, H, D) with any strides but unit stride in D (else copied); D is padded to a power of two by masks. The
forward pass gives a program BM queries of one head; it keeps q, the sums and the running top and total on chip, and
streams k and v past them in blocks of BN. The backward pass has three kernels: δ; dk and dv (a program owns BN keys of
one key head and streams the queries of all its query heads past); dq (as forward). Each output element has one owner
and one order of sums: no atomics, the same bits every time. (top, total) rather than their log-sum-exp, whose rounding
grows with the scores. fp32 products are "ieee": tf32 would have 10 bits.
FLOPs: 4 D a visible (query, key, head) forward; 14 D backward (7 products, two of them recomputed scores and dp).
Bytes, times the dtype's size: q and o once, k and v once for each of Tq / BM blocks (from L2 for the most part).
Intensity: BM FLOP/byte or more in bf16, so from a few hundred tokens the roof is the tensor cores' rate; a single query
(decode) is bound by the bandwidth of k and v. Source: the paper; Triton's tutorial 06.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels._common import check, empty_f32


@triton.jit
def visible_keys(
    i, b, queries, keys, lengths, starts, ends, CAUSAL: tl.constexpr, LENGTHS: tl.constexpr, DOCUMENTS: tl.constexpr
):
    """low, high: query i of sequence b sees the keys low ≤ j < high; none if there is no such query."""
    exists = i < queries
    low, high = i * 0, i * 0 + keys
    if LENGTHS:
        high = tl.minimum(high, tl.minimum(tl.load(lengths + b), keys).to(tl.int32))
    if DOCUMENTS:
        low = tl.load(starts + i, mask=exists, other=0)
        high = tl.load(ends + i, mask=exists, other=0)
    if CAUSAL:
        high = tl.minimum(high, i + (keys - queries) + 1)
    return tl.where(exists, low, keys), tl.where(exists, high, 0)


@triton.jit
def rows(x, first, end, token_stride, dim, ROWS: tl.constexpr, BD: tl.constexpr):
    """Tokens first … first + ROWS − 1 of one head, (ROWS, BD); 0 from token `end` and column `dim` on."""
    t, d = first + tl.arange(0, ROWS), tl.arange(0, BD)
    at = x + t.to(tl.int64)[:, None] * token_stride + d[None, :]
    return tl.load(at, mask=(t < end)[:, None] & (d < dim)[None, :], other=0.0)


@triton.jit
def store_rows(x, value, first, end, token_stride, dim, ROWS: tl.constexpr, BD: tl.constexpr):
    t, d = first + tl.arange(0, ROWS), tl.arange(0, BD)
    at = x + t.to(tl.int64)[:, None] * token_stride + d[None, :]
    tl.store(at, value, mask=(t < end)[:, None] & (d < dim)[None, :])


@triton.jit
def attention_kernel(
    q, k, v, o, top, total, lengths, starts, ends, queries, keys, heads, group, dim, log2_scale,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    CAUSAL: tl.constexpr, LENGTHS: tl.constexpr, DOCUMENTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(queries, BM)
    first = (blocks - 1 - tl.program_id(0) % blocks) * BM  # causal: the longest first
    b = (tl.program_id(0) // blocks // heads).to(tl.int64)
    h = (tl.program_id(0) // blocks % heads).to(tl.int64)
    i = first + tl.arange(0, BM)
    low, high = visible_keys(i, b, queries, keys, lengths, starts, ends, CAUSAL, LENGTHS, DOCUMENTS)
    end = tl.max(high, 0)
    k += b * k_batch + h // group * k_head
    v += b * v_batch + h // group * v_head
    q_rows = rows(q + b * q_batch + h * q_head, first, queries, q_token, dim, BM, BD)

    best = tl.full([BM], float("-inf"), tl.float32)
    sums = tl.zeros([BM], tl.float32)
    out = tl.zeros([BM, BD], tl.float32)
    for start in range(tl.min(low, 0) // BN * BN, end, BN):
        j = start + tl.arange(0, BN)
        s = tl.dot(q_rows, tl.trans(rows(k, start, end, k_token, dim, BN, BD)), input_precision="ieee") * log2_scale
        seen = (j[None, :] >= low[:, None]) & (j[None, :] < high[:, None])
        s = tl.where(seen, s, float("-inf"))
        best_now = tl.maximum(best, tl.max(s, 1))
        shift = tl.where(best_now == float("-inf"), 0.0, best_now)  # nothing seen yet: not −inf − −inf
        p = tl.exp2(s - shift[:, None])
        decay = tl.exp2(best - shift)
        sums = sums * decay + tl.sum(p, 1)
        v_rows = rows(v, start, end, v_token, dim, BN, BD)
        out = tl.dot(p.to(v_rows.dtype), v_rows, out * decay[:, None], input_precision="ieee")
        best = best_now

    row = (b * heads + h) * queries + i
    tl.store(top + row, best, mask=i < queries)
    tl.store(total + row, sums, mask=i < queries)
    out = out / tl.where(sums > 0, sums, 1.0)[:, None]
    store_rows(o + (b * queries * heads + h) * dim, out, first, queries, heads * dim, dim, BM, BD)


@triton.jit
def delta_kernel(
    o, grad_o, delta, queries, heads, dim, o_batch, o_token, o_head, g_batch, g_token, g_head,
    BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """δ by the products that make dp, in their order: where p is 1 at one key, o is its v and dp − δ exactly 0."""
    blocks = tl.cdiv(queries, BM)
    first = tl.program_id(0) % blocks * BM
    b = (tl.program_id(0) // blocks // heads).to(tl.int64)
    h = (tl.program_id(0) // blocks % heads).to(tl.int64)
    out = rows(o + b * o_batch + h * o_head, first, queries, o_token, dim, BM, BD)
    grad = rows(grad_o + b * g_batch + h * g_head, first, queries, g_token, dim, BM, BD)
    i = tl.arange(0, BM)
    dots = tl.dot(grad, tl.trans(out), input_precision="ieee")
    own = tl.sum(tl.where(i[:, None] == i[None, :], dots, 0.0), 1)
    tl.store(delta + (b * heads + h) * queries + first + i, own, mask=first + i < queries)


@triton.jit
def row_statistics(top, total, delta, row, exists):
    """top, 1 / total and δ of some queries; 1 / total is 0 for those that see nothing."""
    sums = tl.load(total + row, mask=exists, other=0.0)
    best = tl.where(sums > 0, tl.load(top + row, mask=exists, other=0.0), 0.0)
    return best, tl.where(sums > 0, 1 / sums, 0.0), tl.load(delta + row, mask=exists, other=0.0)


@triton.jit
def attention_backward_keys_kernel(
    q, k, v, grad_o, dk, dv, top, total, delta, lengths, starts, ends, queries, keys, heads, group, dim, log2_scale,
    scale, q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, g_batch, g_token, g_head,
    CAUSAL: tl.constexpr, LENGTHS: tl.constexpr, DOCUMENTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    blocks, kv_heads = tl.cdiv(keys, BN), heads // group
    first = tl.program_id(0) % blocks * BN
    b = (tl.program_id(0) // blocks // kv_heads).to(tl.int64)
    g = (tl.program_id(0) // blocks % kv_heads).to(tl.int64)
    j = first + tl.arange(0, BN)
    k_rows = rows(k + b * k_batch + g * k_head, first, keys, k_token, dim, BN, BD)
    v_rows = rows(v + b * v_batch + g * v_head, first, keys, v_token, dim, BN, BD)
    begin, end = 0, queries  # of the queries that may see a key of this block
    if CAUSAL:
        begin = tl.maximum(first - (keys - queries), 0)
    if LENGTHS:
        end = tl.where(tl.load(lengths + b) > first, queries, 0)
    if DOCUMENTS:
        begin = tl.maximum(begin, tl.load(starts + first))
        end = tl.load(ends + tl.minimum(first + BN, keys) - 1)

    dk_rows = tl.zeros([BN, BD], tl.float32)
    dv_rows = tl.zeros([BN, BD], tl.float32)
    for h in range(g * group, (g + 1) * group):
        for start in range(begin // BM * BM, end, BM):
            i = start + tl.arange(0, BM)
            low, high = visible_keys(i, b, queries, keys, lengths, starts, ends, CAUSAL, LENGTHS, DOCUMENTS)
            row = (b * heads + h) * queries + i
            best, inverse, d = row_statistics(top, total, delta, row, i < queries)
            q_rows = rows(q + b * q_batch + h * q_head, start, queries, q_token, dim, BM, BD)
            grad = rows(grad_o + b * g_batch + h * g_head, start, queries, g_token, dim, BM, BD)
            s = tl.dot(k_rows, tl.trans(q_rows), input_precision="ieee") * log2_scale  # (BN, BM)
            seen = (j[:, None] >= low[None, :]) & (j[:, None] < high[None, :])
            p = tl.where(seen, tl.exp2(s - best[None, :]) * inverse[None, :], 0.0)
            dv_rows = tl.dot(p.to(grad.dtype), grad, dv_rows, input_precision="ieee")
            dp = tl.dot(v_rows, tl.trans(grad), input_precision="ieee")
            ds = p * (dp - d[None, :])
            dk_rows = tl.dot(ds.to(q_rows.dtype), q_rows, dk_rows, input_precision="ieee")
    to = (b * keys * kv_heads + g) * dim
    store_rows(dk + to, dk_rows * scale, first, keys, kv_heads * dim, dim, BN, BD)
    store_rows(dv + to, dv_rows, first, keys, kv_heads * dim, dim, BN, BD)


@triton.jit
def attention_backward_queries_kernel(
    q, k, v, grad_o, dq, top, total, delta, lengths, starts, ends, queries, keys, heads, group, dim, log2_scale,
    scale, q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, g_batch, g_token, g_head,
    CAUSAL: tl.constexpr, LENGTHS: tl.constexpr, DOCUMENTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(queries, BM)
    first = (blocks - 1 - tl.program_id(0) % blocks) * BM
    b = (tl.program_id(0) // blocks // heads).to(tl.int64)
    h = (tl.program_id(0) // blocks % heads).to(tl.int64)
    i = first + tl.arange(0, BM)
    low, high = visible_keys(i, b, queries, keys, lengths, starts, ends, CAUSAL, LENGTHS, DOCUMENTS)
    end = tl.max(high, 0)
    best, inverse, d = row_statistics(top, total, delta, (b * heads + h) * queries + i, i < queries)
    k += b * k_batch + h // group * k_head
    v += b * v_batch + h // group * v_head
    q_rows = rows(q + b * q_batch + h * q_head, first, queries, q_token, dim, BM, BD)
    grad = rows(grad_o + b * g_batch + h * g_head, first, queries, g_token, dim, BM, BD)

    dq_rows = tl.zeros([BM, BD], tl.float32)
    for start in range(tl.min(low, 0) // BN * BN, end, BN):
        j = start + tl.arange(0, BN)
        k_rows = rows(k, start, end, k_token, dim, BN, BD)
        s = tl.dot(q_rows, tl.trans(k_rows), input_precision="ieee") * log2_scale
        seen = (j[None, :] >= low[:, None]) & (j[None, :] < high[:, None])
        p = tl.where(seen, tl.exp2(s - best[:, None]) * inverse[:, None], 0.0)
        dp = tl.dot(grad, tl.trans(rows(v, start, end, v_token, dim, BN, BD)), input_precision="ieee")
        ds = p * (dp - d[:, None])
        dq_rows = tl.dot(ds.to(k_rows.dtype), k_rows, dq_rows, input_precision="ieee")
    store_rows(dq + (b * queries * heads + h) * dim, dq_rows * scale, first, queries, heads * dim, dim, BM, BD)


# (bits of the dtype, padded D at most) → own × stream tile, warps and stages, forward and backward: without spills and
# with at most 100 KB of shared memory on every target (tests/test_triton_compile.py). fp32 products occupy registers.
TILES = {
    (16, 64): ((128, 64, 8, 2), (64, 32, 4, 2)),
    (16, 128): ((64, 32, 4, 2), (64, 32, 8, 2)),
    (16, 256): ((64, 32, 8, 1), (32, 32, 8, 1)),
    (32, 64): ((32, 16, 4, 1), (32, 16, 4, 1)),
    (32, 128): ((32, 16, 8, 2), (32, 16, 8, 2)),
    (32, 256): ((16, 16, 8, 2), (16, 16, 8, 2)),
}


def tiles(t: Tensor, own: str, rows: int, backward: bool = False) -> dict[str, int]:
    """BM, BN, BD, warps and stages for a kernel whose programs own `own` (BM queries or BN keys) of `rows`."""
    wide, bits = max(triton.next_power_of_2(t.shape[3]), 16), 8 * t.element_size()
    kind = TILES[bits, min(max(wide, 64), 256)]
    mine, stream, warps, stages = kind[backward] if wide <= 256 else (16, 16, 8, 1)
    mine = min(mine, max(triton.next_power_of_2(rows), 16))
    sizes = {"BM": mine, "BN": stream} if own == "BM" else {"BM": stream, "BN": mine}
    return {**sizes, "BD": wide, "num_warps": warps, "num_stages": stages}


def unit_stride(t: Tensor) -> Tensor:
    return t if t.shape[3] <= 1 or t.stride(3) == 1 else t.contiguous()


def who_sees_what(
    q: Tensor, k: Tensor, causal: bool, lengths: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[list[Tensor], dict[str, bool]]:
    """lengths, starts and ends as kernel arguments, and the constants that say which of them count."""
    check(q.dim() == k.dim() == 4 and q.shape[3] == k.shape[3], "attention", "q and k must be (B, T, H, D) of one D")
    check(q.shape[2] % k.shape[2] == 0, "attention", "q's heads must be a multiple of k's")
    none = empty_f32(q, 1)  # never read
    tables = [none, none, none]
    if lengths is not None:
        check(lengths.shape == q.shape[:1], "attention", "lengths must be (batch,)")
        tables[0] = lengths.to(q.device).contiguous()
    if cu_seqlens is not None:
        check(q.shape[0] == 1 and q.shape[1] == k.shape[1], "attention", "cu_seqlens needs batch 1 and Tq = Tk")
        ends = cu_seqlens.to(q.device, torch.int32)
        token = torch.arange(q.shape[1], device=q.device, dtype=torch.int32)
        document = torch.searchsorted(ends, token, right=True).clamp(1, len(ends) - 1)
        tables[1:] = ends[document - 1].contiguous(), ends[document].contiguous()
    hidden = {"CAUSAL": causal, "LENGTHS": lengths is not None, "DOCUMENTS": cu_seqlens is not None}
    return tables, hidden


def attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, lengths: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (unit_stride(t) for t in (q, k, v))
    tables, hidden = who_sees_what(q, k, causal, lengths, cu_seqlens)
    (batch, queries, heads, dim), (_, keys, kv_heads, _) = q.shape, k.shape
    o, top, total = q.new_empty(q.shape), *(empty_f32(q, batch, heads, queries) for _ in range(2))
    if top.numel():
        chosen = tiles(q, "BM", queries)
        attention_kernel[(triton.cdiv(queries, chosen["BM"]) * batch * heads,)](
            q, k, v, o, top, total, *tables, queries, keys, heads, heads // kv_heads, dim, scale * math.log2(math.e),
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], **hidden, **chosen,
        )  # fmt: skip
    return o, top, total


def attention_backward(
    grad_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, top: Tensor, total: Tensor, causal: bool, scale: float,
    lengths: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad_o, q, k, v, o = (unit_stride(t) for t in (grad_o, q, k, v, o))
    top, total = top.contiguous(), total.contiguous()
    tables, hidden = who_sees_what(q, k, causal, lengths, cu_seqlens)
    (batch, queries, heads, dim), (_, keys, kv_heads, _) = q.shape, k.shape
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    delta = torch.empty_like(top)
    if not dq.numel():
        return dq, dk.zero_(), dv.zero_()
    sizes = (queries, keys, heads, heads // kv_heads, dim, scale * math.log2(math.e), scale)
    strides = [s for t in (q, k, v, grad_o) for s in t.stride()[:3]]
    wide = max(triton.next_power_of_2(dim), 16)
    delta_kernel[(triton.cdiv(queries, 32) * batch * heads,)](
        o, grad_o, delta, queries, heads, dim, *o.stride()[:3], *grad_o.stride()[:3], BM=32, BD=wide, num_warps=8
    )
    if keys:
        chosen = tiles(q, "BN", keys, backward=True)
        attention_backward_keys_kernel[(triton.cdiv(keys, chosen["BN"]) * batch * kv_heads,)](
            q, k, v, grad_o, dk, dv, top, total, delta, *tables, *sizes, *strides, **hidden, **chosen
        )
    chosen = tiles(q, "BM", queries, backward=True)
    attention_backward_queries_kernel[(triton.cdiv(queries, chosen["BM"]) * batch * heads,)](
        q, k, v, grad_o, dq, top, total, delta, *tables, *sizes, *strides, **hidden, **chosen
    )
    return dq, dk, dv


OPERATORS = {"attention": attention, "attention_backward": attention_backward}


def typical(dtype: torch.dtype):
    for dim, causal in ((64, True), (128, True), (128, False), (256, True)):
        q, k = torch.empty(2, 512, 16, dim, dtype=dtype), torch.empty(2, 512, 4, dim, dtype=dtype)
        stat = empty_f32(q, 2, 16, 512)
        yield "attention", (q, k, k, causal, dim**-0.5, None, None)
        yield "attention_backward", (q, q, k, k, q, stat, stat, causal, dim**-0.5, None, None)
    q, lengths = torch.empty(4, 1, 8, 80, dtype=dtype), torch.ones(4, dtype=torch.int64)
    k = torch.empty(4, 300, 2, 80, dtype=dtype)
    yield "attention", (q, k, k, True, 0.1, lengths, None)
    q, ends = torch.empty(1, 500, 9, 64, dtype=dtype), torch.tensor([0, 100, 500])
    stat = empty_f32(q, 1, 9, 500)
    yield "attention", (q, q, q, True, 0.1, None, ends)
    yield "attention_backward", (q, q, q, q, q, stat, stat, True, 0.1, None, ends)
