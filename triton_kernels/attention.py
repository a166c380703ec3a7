"""Attention without its score matrix: FlashAttention-2 (Dao 2023, arXiv:2307.08691), forward and backward.

    o_i = Σ_j p_ij v_j,   p_ij = 2^(s_ij − m_i) / l_i,   s_ij = scale · log2(e) · q_i · k_j
    dv_j = Σ_i p_ij do_i        dp_ij = do_i · v_j        ds_ij = p_ij (dp_ij − δ_i)        δ_i = do_i · o_i
    dq_i = scale Σ_j ds_ij k_j  dk_j = scale Σ_i ds_ij q_i

With a softcap c, s_ij = c · log2(e) · tanh(scale / c · q_i · k_j), and ds_ij is multiplied by 1 − tanh².

The keys that a query sees are one interval [low, high), whatever hides the others: the causal rule, lengths, the bounds
of its document, a window; or those of the interval that a mask shows. Blocks of keys that are outside of the intervals
of all queries of a block are not visited; a mask's bytes are read where the interval is. A block belongs to one
document, and what lies behind a length or in another document is never loaded: it may be NaN.
Layout: (B, T, H, D) with any strides but unit stride in D (else copied); D is padded to a power of two by masks. The
forward pass gives a program BLOCK_M queries of one head; it keeps q, the running maximum m and the sums l and o on
chip, and streams k and v past them in blocks of BLOCK_N. The backward pass has three kernels: δ; dk and dv (a program
owns BLOCK_N keys of one key head and streams the queries of all its query heads past); dq (as forward). Each output
element has one owner and one order of sums: no atomics, the same bits every time. (m, l) rather than their log-sum-exp,
whose rounding grows with the scores. fp32 products are "ieee": tf32 would have 10 bits.
FLOPs: 4 D a visible (query, key, head) forward; 14 D backward (7 products, two of them recomputed scores and dp).
Bytes, times the dtype's size: q and o once, k and v once for each of Tq / BLOCK_M blocks (from L2 for the most part).
Intensity: BLOCK_M FLOP/byte or more in bf16, so from a few hundred tokens the roof is the tensor cores' rate; a single
query (decode) is bound by the bandwidth of k and v. Source: the paper; Triton's tutorial 06.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import capability, check, empty_f32


@triton.jit
def own_block(n, blocks, table, tokens, SIZE: tl.constexpr, DOCUMENTS: tl.constexpr):
    """first, low, high: where block n begins, and its document's tokens low ≤ t < high; empty if first ≥ high."""
    first, low, high = n * SIZE, 0, tokens
    if DOCUMENTS:
        first = tl.load(table + n)
        low = tl.load(table + blocks + n)
        high = tl.load(table + 2 * blocks + n)
    return first, low, high


@triton.jit
def real_keys(b, end, lengths, LENGTHS: tl.constexpr):
    """Where the keys of sequence b end, `end` at the latest."""
    if LENGTHS:
        end = tl.minimum(tl.load(lengths + b), end).to(tl.int32)
    return end


@triton.jit
def visible_end(i, stop, end, shift, CAUSAL: tl.constexpr):
    """Query i sees keys before this one, at most those before `end`; none if it is not before `stop`."""
    high = i * 0 + end
    if CAUSAL:
        high = tl.minimum(high, i + shift + 1)
    return tl.where(i < stop, high, 0)


@triton.jit
def visible_begin(i, end, shift, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Query i sees no key before this one: those are before its window. `end` of its sequence's keys."""
    low = i * 0
    if WINDOW:
        low = tl.maximum(low + ((i + shift + 1) if CAUSAL else end) - window, 0)
    return low


@triton.jit
def shown(seen, mask, i, j, query_stride, MASK: tl.constexpr):
    """Of the pairs that are `seen`, those whose byte of the mask is not 0; i and j are of seen's rank."""
    if MASK:
        seen &= tl.load(mask + i.to(tl.int64) * query_stride + j, mask=seen, other=0) != 0
    return seen


@triton.jit
def scores_of(products, factor, cap, CAPPED: tl.constexpr):
    """Scores to base 2 from q · k; with a softcap their derivative's factor 1 − tanh², too."""
    s = products * factor
    slope = s
    if CAPPED:  # tanh to about 1 ulp: Cephes' polynomial below 0.625, else 1 − 2e / (1 + e) with e = e^(−2|x|)
        size, z = tl.abs(s), s * s
        e = tl.exp2(size * -2.8853900817779268)
        p = (((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1) * z
        large = 1 - 2 * e / (1 + e)
        t = tl.where(size < 0.625, (p - 3.33332819422e-1) * z * s + s, tl.where(s < 0, -large, large))
        s = t * cap
        slope = 1 - t * t
    return s, slope


@triton.jit
def rows(x, first, end, token_stride, dim, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """BLOCK_ROWS tokens of one head from `first` on, (BLOCK_ROWS, BLOCK_D); 0 from token `end` and column `dim` on."""
    t, d = first + tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_D)
    at = x + t.to(tl.int64)[:, None] * token_stride + d[None, :]
    return tl.load(at, mask=(t < end)[:, None] & (d < dim)[None, :], other=0.0)


@triton.jit
def store_rows(x, value, first, end, token_stride, dim, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    t, d = first + tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_D)
    at = x + t.to(tl.int64)[:, None] * token_stride + d[None, :]
    tl.store(at, value, mask=(t < end)[:, None] & (d < dim)[None, :])


@triton.jit
def attention_kernel(
    q, k, v, o, m, l, lengths, mask, mask_batch, mask_query, table, blocks, queries, keys, heads, group, dim, factor,
    cap, window, q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    CAUSAL: tl.constexpr, LENGTHS: tl.constexpr, DOCUMENTS: tl.constexpr, MASK: tl.constexpr, WINDOW: tl.constexpr,
    CAPPED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // blocks // heads).to(tl.int64)
    h = (tl.program_id(0) // blocks % heads).to(tl.int64)
    n = blocks - 1 - tl.program_id(0) % blocks  # causal: the longest first
    first, low, stop = own_block(n, blocks, table, queries, BLOCK_M, DOCUMENTS)
    i = first + tl.arange(0, BLOCK_M)
    real = real_keys(b, stop if DOCUMENTS else keys, lengths, LENGTHS)
    high = visible_end(i, stop, real, keys - queries, CAUSAL)
    passed = visible_begin(i, real, keys - queries, window, CAUSAL, WINDOW)
    end = tl.max(high, 0)
    low = tl.maximum(low, visible_begin(first, real, keys - queries, window, CAUSAL, WINDOW))
    k += b * k_batch + h // group * k_head
    v += b * v_batch + h // group * v_head
    mask += b * mask_batch
    q_rows = rows(q + b * q_batch + h * q_head, first, stop, q_token, dim, BLOCK_M, BLOCK_D)

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(low, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        k_rows = rows(k, start, end, k_token, dim, BLOCK_N, BLOCK_D)
        s, _ = scores_of(tl.dot(q_rows, tl.trans(k_rows), input_precision="ieee"), factor, cap, CAPPED)
        seen = j[None, :] < high[:, None]
        if WINDOW:
            seen &= j[None, :] >= passed[:, None]
        seen = shown(seen, mask, i[:, None], j[None, :], mask_query, MASK)
        s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # nothing seen yet: not −inf − −inf
        p = tl.exp2(s - shift[:, None])
        alpha = tl.exp2(m_i - shift)
        l_i = l_i * alpha + tl.sum(p, 1)
        v_rows = rows(v, start, end, v_token, dim, BLOCK_N, BLOCK_D)
        acc = tl.dot(p.to(v_rows.dtype), v_rows, acc * alpha[:, None], input_precision="ieee")
        m_i = m_new

    row = (b * heads + h) * queries + i
    tl.store(m + row, m_i, mask=i < stop)
    tl.store(l + row, l_i, mask=i < stop)
    acc = acc / tl.where(l_i == 0, 1.0, l_i)[:, None]
    store_rows(o + (b * queries * heads + h) * dim, acc, first, stop, heads * dim, dim, BLOCK_M, BLOCK_D)


@triton.jit
def delta_kernel(
    o, do, delta, queries, heads, dim, o_batch, o_token, o_head, g_batch, g_token, g_head,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """δ by the products that make dp, in their order: where p is 1 at one key, o is its v and dp − δ exactly 0."""
    blocks = tl.cdiv(queries, BLOCK_M)
    first = tl.program_id(0) % blocks * BLOCK_M
    b = (tl.program_id(0) // blocks // heads).to(tl.int64)
    h = (tl.program_id(0) // blocks % heads).to(tl.int64)
    o_rows = rows(o + b * o_batch + h * o_head, first, queries, o_token, dim, BLOCK_M, BLOCK_D)
    do_rows = rows(do + b * g_batch + h * g_head, first, queries, g_token, dim, BLOCK_M, BLOCK_D)
    i = tl.arange(0, BLOCK_M)
    dots = tl.dot(do_rows, tl.trans(o_rows), input_precision="ieee")
    own = tl.sum(tl.where(i[:, None] == i[None, :], dots, 0.0), 1)
    tl.store(delta + (b * heads + h) * queries + first + i, own, mask=first + i < queries)


@triton.jit
def row_statistics(m, l, delta, row, exists):
    """m, 1 / l and δ of some queries; 1 / l is 0 for those that see nothing."""
    l_i = tl.load(l + row, mask=exists, other=0.0)
    m_i = tl.where(l_i == 0, 0.0, tl.load(m + row, mask=exists, other=0.0))
    return m_i, tl.where(l_i == 0, 0.0, 1 / l_i), tl.load(delta + row, mask=exists, other=0.0)


@triton.jit
def attention_backward_keys_kernel(
    q, k, v, do, dk, dv, m, l, delta, lengths, mask, mask_batch, mask_query, table, blocks, queries, keys, heads, group,
    dim, factor, cap, window, scale, q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    g_batch, g_token, g_head,
    CAUSAL: tl.constexpr, LENGTHS: tl.constexpr, DOCUMENTS: tl.constexpr, MASK: tl.constexpr, WINDOW: tl.constexpr,
    CAPPED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    kv_heads = heads // group
    b = (tl.program_id(0) // blocks // kv_heads).to(tl.int64)
    g = (tl.program_id(0) // blocks % kv_heads).to(tl.int64)
    first, low, stop = own_block(tl.program_id(0) % blocks, blocks, table, keys, BLOCK_N, DOCUMENTS)
    end = real_keys(b, stop, lengths, LENGTHS)
    mask += b * mask_batch
    j = first + tl.arange(0, BLOCK_N)
    k_rows = rows(k + b * k_batch + g * k_head, first, end, k_token, dim, BLOCK_N, BLOCK_D)
    v_rows = rows(v + b * v_batch + g * v_head, first, end, v_token, dim, BLOCK_N, BLOCK_D)
    begin, last = low, stop if DOCUMENTS else queries  # of the queries that may see a key of this block
    if CAUSAL:
        begin = tl.maximum(low, first - (keys - queries))
    if WINDOW:
        newest = tl.minimum(first + BLOCK_N, end) - 1  # the block's last real key
        if CAUSAL:
            last = tl.minimum(last, newest - (keys - queries) + window)
        else:
            last = tl.where(newest >= end - window, last, 0)
    last = tl.where(first < end, last, 0)

    dk_rows = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_rows = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for each in range(group):
        h = g * group + each  # of 64 bits, as g
        for start in range(begin, last, BLOCK_M):
            i = start + tl.arange(0, BLOCK_M)
            high = visible_end(i, last, end, keys - queries, CAUSAL)
            row = (b * heads + h) * queries + i
            m_i, inverse_l, d = row_statistics(m, l, delta, row, i < last)
            q_rows = rows(q + b * q_batch + h * q_head, start, last, q_token, dim, BLOCK_M, BLOCK_D)
            do_rows = rows(do + b * g_batch + h * g_head, start, last, g_token, dim, BLOCK_M, BLOCK_D)
            if MASK:  # what a query holds that sees no key is not multiplied, not by 0 either
                q_rows = tl.where(inverse_l[:, None] == 0, 0.0, q_rows)
            products = tl.dot(k_rows, tl.trans(q_rows), input_precision="ieee")  # (BLOCK_N, BLOCK_M)
            s, slope = scores_of(products, factor, cap, CAPPED)
            seen = j[:, None] < high[None, :]
            if WINDOW:
                passed = visible_begin(i, end, keys - queries, window, CAUSAL, WINDOW)
                seen &= j[:, None] >= passed[None, :]
            seen = shown(seen, mask, i[None, :], j[:, None], mask_query, MASK)
            p = tl.where(seen, tl.exp2(s - m_i[None, :]) * inverse_l[None, :], 0.0)
            dv_rows = tl.dot(p.to(do_rows.dtype), do_rows, dv_rows, input_precision="ieee")
            if CAPPED:  # before dp, which then finds one tile in registers instead of two
                p *= slope
            dp = tl.dot(v_rows, tl.trans(do_rows), input_precision="ieee")
            ds = tl.where(seen, p * (dp - d[None, :]), 0.0)
            dk_rows = tl.dot(ds.to(q_rows.dtype), q_rows, dk_rows, input_precision="ieee")
    to = (b * keys * kv_heads + g) * dim
    store_rows(dk + to, dk_rows * scale, first, stop, kv_heads * dim, dim, BLOCK_N, BLOCK_D)
    store_rows(dv + to, dv_rows, first, stop, kv_heads * dim, dim, BLOCK_N, BLOCK_D)


@triton.jit
def attention_backward_queries_kernel(
    q, k, v, do, dq, m, l, delta, lengths, mask, mask_batch, mask_query, table, blocks, queries, keys, heads, group,
    dim, factor, cap, window, scale, q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    g_batch, g_token, g_head,
    CAUSAL: tl.constexpr, LENGTHS: tl.constexpr, DOCUMENTS: tl.constexpr, MASK: tl.constexpr, WINDOW: tl.constexpr,
    CAPPED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // blocks // heads).to(tl.int64)
    h = (tl.program_id(0) // blocks % heads).to(tl.int64)
    n = blocks - 1 - tl.program_id(0) % blocks
    first, low, stop = own_block(n, blocks, table, queries, BLOCK_M, DOCUMENTS)
    i = first + tl.arange(0, BLOCK_M)
    real = real_keys(b, stop if DOCUMENTS else keys, lengths, LENGTHS)
    high = visible_end(i, stop, real, keys - queries, CAUSAL)
    passed = visible_begin(i, real, keys - queries, window, CAUSAL, WINDOW)
    end = tl.max(high, 0)
    low = tl.maximum(low, visible_begin(first, real, keys - queries, window, CAUSAL, WINDOW))
    m_i, inverse_l, d = row_statistics(m, l, delta, (b * heads + h) * queries + i, i < stop)
    k += b * k_batch + h // group * k_head
    v += b * v_batch + h // group * v_head
    mask += b * mask_batch
    q_rows = rows(q + b * q_batch + h * q_head, first, stop, q_token, dim, BLOCK_M, BLOCK_D)
    do_rows = rows(do + b * g_batch + h * g_head, first, stop, g_token, dim, BLOCK_M, BLOCK_D)

    dq_rows = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(low, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        k_rows = rows(k, start, end, k_token, dim, BLOCK_N, BLOCK_D)
        s, slope = scores_of(tl.dot(q_rows, tl.trans(k_rows), input_precision="ieee"), factor, cap, CAPPED)
        seen = j[None, :] < high[:, None]
        if WINDOW:
            seen &= j[None, :] >= passed[:, None]
        seen = shown(seen, mask, i[:, None], j[None, :], mask_query, MASK)
        p = tl.where(seen, tl.exp2(s - m_i[:, None]) * inverse_l[:, None], 0.0)
        if CAPPED:
            p *= slope
        dp = tl.dot(do_rows, tl.trans(rows(v, start, end, v_token, dim, BLOCK_N, BLOCK_D)), input_precision="ieee")
        ds = tl.where(seen, p * (dp - d[:, None]), 0.0)
        dq_rows = tl.dot(ds.to(k_rows.dtype), k_rows, dq_rows, input_precision="ieee")
    store_rows(dq + (b * queries * heads + h) * dim, dq_rows * scale, first, stop, heads * dim, dim, BLOCK_M, BLOCK_D)


# (bits of the dtype, padded D at most) → own × stream tile, warps and stages, of the forward pass, of that for queries
# and of that for keys: without spills and with at most 100 KB of shared memory on every target
# (tests/ops/test_triton_compile.py). fp32 products occupy registers.
TILES = {
    (16, 64): ((128, 64, 8, 2), (64, 32, 4, 2), (64, 32, 4, 2)),
    (16, 128): ((64, 32, 4, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
    (16, 256): ((64, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    (32, 64): ((32, 16, 4, 1), (32, 16, 4, 1), (32, 16, 4, 1)),
    (32, 128): ((32, 16, 8, 2), (32, 16, 8, 2), (32, 16, 8, 2)),
    (32, 256): ((16, 16, 8, 2), (16, 16, 8, 2), (16, 16, 8, 2)),
}
# Compute capability 9.0, up to 227 KB: a warp group's product has 64 rows and as many columns as the stream tile has
# rows, or as D is divided among the groups. Those above give it 16 and 32, and every operand is read the more often.
# A window's bounds, a softcap's tanh and a mask need registers that these leave none for: such calls have those above.
# The backward passes have no registers for more: keys' holds dK and dV, and D = 256 spills with any tile that is wider.
HOPPER = {
    (16, 64): ((128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 4, 1)),
    (16, 128): ((128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2)),
    (16, 256): ((128, 64, 8, 1), *TILES[16, 256][1:]),
}
# Calls with a window, a softcap or a mask, whose kernels for keys spill with the tiles above.
WITH_RULES = {
    (16, 64): (*TILES[16, 64][:2], (64, 32, 8, 2)),
    (32, 128): (*TILES[32, 128][:2], (16, 16, 8, 2)),
    (32, 256): (*TILES[32, 256][:2], (16, 16, 8, 1)),
}
# Calls with a mask: its bytes and their addresses spill with the tiles above.
WITH_MASK = {
    (16, 64): (*TILES[16, 64][:2], (32, 32, 4, 2)),
    (16, 128): (*TILES[16, 128][:2], (32, 32, 4, 2)),
    (16, 256): (TILES[16, 256][0], (32, 16, 8, 1), TILES[16, 256][2]),
}
FORWARD, QUERIES, KEYS = range(3)


def tiles(t: Tensor, kernel: int, rows: int, rules: bool, masked: bool) -> dict[str, int]:
    """Block sizes, warps and stages of a kernel whose programs own BLOCK_M queries or (KEYS) BLOCK_N keys of `rows`;
    rules: it has a window or a softcap."""
    wide, bits = max(triton.next_power_of_2(t.shape[3]), 16), 8 * t.element_size()
    key = bits, min(max(wide, 64), 256)
    kind = TILES[key]
    if rules or masked:
        kind = (WITH_MASK if masked and key in WITH_MASK else WITH_RULES).get(key, kind)
    elif capability() == 90:
        kind = HOPPER.get(key, kind)
    mine, stream, warps, stages = kind[kernel] if wide <= 256 else (16, 16, 8, 1)
    mine = min(mine, max(triton.next_power_of_2(rows), 16))
    sizes = {"BLOCK_M": stream, "BLOCK_N": mine} if kernel == KEYS else {"BLOCK_M": mine, "BLOCK_N": stream}
    return {**sizes, "BLOCK_D": wide, "num_warps": warps, "num_stages": stages}


def unit_stride(t: Tensor) -> Tensor:
    return t if t.shape[3] <= 1 or t.stride(3) == 1 else t.contiguous()


def blocks_of(tokens: int, size: int, ends: Tensor | None, none: Tensor) -> tuple[Tensor, int]:
    """The table that own_block reads, (3, blocks), and how many blocks of `size` tokens there are: with documents as
    many as there may be, some of them empty, for the host does not wait to know."""
    if ends is None:
        return none, triton.cdiv(tokens, size)
    starts, stops = ends[:-1], ends[1:]
    each = ((stops - starts).clamp(min=0) + size - 1) // size
    after = each.cumsum(0)
    n = torch.arange(triton.cdiv(tokens, size) + len(starts), device=ends.device)
    document = torch.searchsorted(after, n, right=True).clamp(max=len(starts) - 1)
    first = starts[document] + (n - (after - each)[document]) * size
    return torch.stack([first, starts[document], stops[document]]).to(torch.int32), len(n)


def who_sees_what(
    q: Tensor, k: Tensor, causal: bool, lengths: Tensor | None, cu_seqlens: Tensor | None, window: int,
    mask: Tensor | None,
) -> tuple[tuple[Tensor, Tensor, int, int], Tensor | None, Tensor, dict[str, bool]]:  # fmt: skip
    """lengths and the mask with its strides as kernel arguments, the documents' bounds, a tensor that is never read,
    and the constants that say what hides keys. A window of all keys and more hides none."""
    check(q.dim() == k.dim() == 4 and q.shape[3] == k.shape[3], "attention", "q and k must be (B, T, H, D) of one D")
    check(q.shape[2] % k.shape[2] == 0, "attention", "q's heads must be a multiple of k's")
    none = empty_f32(q, 1)  # never read
    ends = None
    if lengths is not None:
        check(lengths.shape == q.shape[:1], "attention", "lengths must be (batch,)")
    if cu_seqlens is not None:
        check(q.shape[0] == 1 and q.shape[1] == k.shape[1], "attention", "cu_seqlens needs batch 1 and Tq = Tk")
        ends = cu_seqlens.to(q.device, torch.int32).clamp(0, q.shape[1])
        check(mask is None, "attention", "mask excludes cu_seqlens")
    hidden = {"CAUSAL": causal, "LENGTHS": lengths is not None, "DOCUMENTS": cu_seqlens is not None}
    hidden |= {"MASK": mask is not None, "WINDOW": 0 < window < k.shape[1]}
    real = none if lengths is None else lengths.to(q.device).contiguous()
    if mask is None:
        return (real, none, 0, 0), ends, none, hidden
    fits = mask.dtype == torch.bool and mask.shape in {(n, q.shape[1], k.shape[1]) for n in (1, q.shape[0])}
    check(fits, "attention", "mask must be bool, (batch or 1, Tq, Tk)")
    mask = mask if mask.shape[2] <= 1 or mask.stride(2) == 1 else mask.contiguous()
    batch = mask.stride(0) if mask.shape[0] > 1 else 0
    return (real, mask.view(torch.uint8), batch, mask.stride(1)), ends, none, hidden


def score_factors(scale: float, softcap: float) -> tuple[float, float]:
    """What q · k is multiplied by, and what tanh of it is, if there is a softcap: scores to base 2."""
    return (scale / softcap, softcap * math.log2(math.e)) if softcap else (scale * math.log2(math.e), 0.0)


def attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, lengths: Tensor | None, cu_seqlens: Tensor | None,
    window: int = 0, softcap: float = 0.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v = (unit_stride(t) for t in (q, k, v))
    real, ends, none, hidden = who_sees_what(q, k, causal, lengths, cu_seqlens, window, mask)
    (batch, queries, heads, dim), (_, keys, kv_heads, _) = q.shape, k.shape
    o, m, l = q.new_empty(q.shape), *(empty_f32(q, batch, heads, queries) for _ in range(2))
    if ends is not None:  # tokens of no document, if cu_seqlens is wrong
        o.zero_()
    if m.numel():
        chosen = tiles(q, FORWARD, queries, window > 0 or softcap > 0, mask is not None)
        table, blocks = blocks_of(queries, chosen["BLOCK_M"], ends, none)
        attention_kernel[(blocks * batch * heads,)](
            q, k, v, o, m, l, *real, table, blocks, queries, keys, heads, heads // kv_heads, dim,
            *score_factors(scale, softcap), window if hidden["WINDOW"] else 0,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], **hidden, CAPPED=softcap > 0, **chosen,
        )  # fmt: skip
    return o, m, l


def attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, m: Tensor, l: Tensor, causal: bool, scale: float,
    lengths: Tensor | None, cu_seqlens: Tensor | None, window: int = 0, softcap: float = 0.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    do, q, k, v, o = (unit_stride(t) for t in (do, q, k, v, o))
    m, l = m.contiguous(), l.contiguous()
    real, ends, none, hidden = who_sees_what(q, k, causal, lengths, cu_seqlens, window, mask)
    (batch, queries, heads, dim), (_, keys, kv_heads, _) = q.shape, k.shape
    dq, dk, dv = ((t.new_empty if ends is None else t.new_zeros)(t.shape) for t in (q, k, v))
    delta = torch.empty_like(m)
    if not dq.numel():
        return dq, dk.zero_(), dv.zero_()
    hidden["CAPPED"], near = softcap > 0, window if hidden["WINDOW"] else 0
    sizes = (queries, keys, heads, heads // kv_heads, dim, *score_factors(scale, softcap), near, scale)
    strides = [s for t in (q, k, v, do) for s in t.stride()[:3]]
    wide, rules = max(triton.next_power_of_2(dim), 16), (window > 0 or softcap > 0, mask is not None)
    delta_kernel[(triton.cdiv(queries, 32) * batch * heads,)](
        o, do, delta, queries, heads, dim, *o.stride()[:3], *do.stride()[:3], BLOCK_M=32, BLOCK_D=wide, num_warps=8
    )
    if keys:
        chosen = tiles(q, KEYS, keys, *rules)
        table, blocks = blocks_of(keys, chosen["BLOCK_N"], ends, none)
        attention_backward_keys_kernel[(blocks * batch * kv_heads,)](
            q, k, v, do, dk, dv, m, l, delta, *real, table, blocks, *sizes, *strides, **hidden, **chosen
        )
    chosen = tiles(q, QUERIES, queries, *rules)
    table, blocks = blocks_of(queries, chosen["BLOCK_M"], ends, none)
    attention_backward_queries_kernel[(blocks * batch * heads,)](
        q, k, v, do, dq, m, l, delta, *real, table, blocks, *sizes, *strides, **hidden, **chosen
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
    for dim in (64, 128, 256):
        q, k = torch.empty(2, 512, 8, dim, dtype=dtype), torch.empty(2, 512, 4, dim, dtype=dtype)
        stat = empty_f32(q, 2, 8, 512)
        for rules in ((100, 0.0), (100, 50.0)):
            yield "attention", (q, k, k, True, dim**-0.5, None, None, *rules)
            yield "attention_backward", (q, q, k, k, q, stat, stat, True, dim**-0.5, None, None, *rules)
        masked = (False, dim**-0.5, None, None, 0, 0.0, torch.ones(1, 512, 512, dtype=torch.bool))
        yield "attention", (q, k, k, *masked)
        yield "attention_backward", (q, q, k, k, q, stat, stat, *masked)
