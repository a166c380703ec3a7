"""Attention of a few queries over a paged cache (Kwon et al. 2023, arXiv:2309.06180) with split keys (Dao et al. 2023,
Flash-Decoding). With s_j = scale · log2(e) · q·k_j, or with a softcap c · log2(e) · tanh(scale / c · q·k_j), over a
piece of 256 tokens:
    m = max s_j,  l = Σ 2^(s_j − m),  acc = Σ 2^(s_j − m) v_j;   then the pieces are combined by their maxima.

A program takes a piece of a sequence and kv head for up to BLOCK_ROWS rows (queries of all heads that share the kv
head), so keys and values come from memory once, BLOCK_TOKENS at a time, by an online softmax. Products run on tensor
cores in the dtype of q, in which 8-bit elements are exact; their scales multiply scores and probabilities.
Bytes: 2 · tokens · Hkv · (D · bytes [+ 4 with 8 bits]) of the cache, and 8 · D a row and piece of sums. 4 · rows FLOPs
an element of the cache: with 8 rows 16 FLOPs a byte in bf16. The roof is memory bandwidth.
Source: the definition, finetune/ops/paged_attention.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import check, empty_f32
from ._eight_bit import is_fp8, widen
from .attention import scores_of

PIECE = 256
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def write(out, lse, row, element, exists, acc, m, l, dim):
    """Results of rows whose pieces are all in (acc, m, l)."""
    factor = tl.where(l == 0, 0.0, 1 / tl.where(l == 0, 1.0, l))
    tl.store(out + row[:, None] * dim + element[None, :], acc * factor[:, None], mask=exists)
    seen = l != 0
    acc_parts = tl.where(seen, (tl.where(seen, m, 0.0) + tl.log2(tl.where(seen, l, 1.0))) / LOG2E, float("-inf"))
    tl.store(lse + row, acc_parts, mask=tl.max(exists.to(tl.int32), 1) == 1)


@triton.jit
def attend_kernel(
    q, k_cache, v_cache, k_scale, v_scale, table, lengths, out, lse, acc_parts, m_and_l, q_batch, q_query, q_head,
    k_block, v_block, k_scale_block, v_scale_block, queries, heads, kv_heads, dim, block_size, width,
    pieces, scale, softcap, window, SCALED: tl.constexpr, FP8: tl.constexpr, CAPPED: tl.constexpr,
    JOINED: tl.constexpr, PIECE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    group = heads // kv_heads
    row_blocks = tl.cdiv(queries * group, BLOCK_ROWS)
    index, piece = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    b, kv_head, row0 = index // (kv_heads * row_blocks), index // row_blocks % kv_heads, index % row_blocks * BLOCK_ROWS
    row, element = row0 + tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_D)
    query, head = row // group, kv_head * group + row % group
    wanted = (element < dim)[None, :]
    exists = (row < queries * group)[:, None] & wanted
    length = tl.minimum(tl.load(lengths + b).to(tl.int64), width * block_size)
    last = length - queries + query + 1  # the tokens [first, last) that a row sees
    first = tl.maximum(tl.where(window > 0, last - window, 0), 0)
    begin = tl.maximum(piece * PIECE, tl.min(first, 0))
    end = tl.minimum((piece + 1) * PIECE, tl.max(tl.where(row < queries * group, last, 0), 0))
    at = b * q_batch + query * q_query + head * q_head
    q_tile = tl.load(q + at[:, None] + element[None, :], mask=exists, other=0.0)
    m = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_ROWS], tl.float32)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_TOKENS):
        token = start + tl.arange(0, BLOCK_TOKENS)
        here = token < end
        block = tl.load(table + b * width + token // block_size, mask=here, other=0).to(tl.int64)
        slot = token % block_size * kv_heads + kv_head
        inside = here[:, None] & wanted
        k = tl.load(k_cache + (block * k_block + slot * dim)[:, None] + element[None, :], mask=inside, other=0)
        if SCALED:
            k = widen(k, FP8).to(q_tile.dtype)
        score = tl.dot(q_tile, tl.trans(k), input_precision="ieee") * (scale if CAPPED else scale * LOG2E)
        if SCALED:
            score *= tl.load(k_scale + block * k_scale_block + slot, mask=here, other=0.0)[None, :]
        if CAPPED:
            score, _ = scores_of(score, 1 / softcap, softcap * LOG2E, CAPPED)
        seen = (token[None, :] >= first[:, None]) & (token[None, :] < tl.minimum(last, end)[:, None])
        score = tl.where(seen, score, float("-inf"))
        m_new = tl.maximum(m, tl.max(score, 1))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row that sees nothing yet
        p = tl.exp2(score - base[:, None])
        alpha = tl.exp2(m - base)
        l = l * alpha + tl.sum(p, 1)
        m = m_new
        v = tl.load(v_cache + (block * v_block + slot * dim)[:, None] + element[None, :], mask=inside, other=0)
        if SCALED:
            v = widen(v, FP8).to(q_tile.dtype)
            p *= tl.load(v_scale + block * v_scale_block + slot, mask=here, other=0.0)[None, :]
        acc = acc * alpha[:, None] + tl.dot(p.to(q_tile.dtype), v, input_precision="ieee")
    result = (b * queries + query) * heads + head
    if JOINED:
        write(out, lse, result, element, exists, acc, m, l, dim)
    else:
        part = result * pieces + piece
        tl.store(acc_parts + part[:, None] * dim + element[None, :], acc, mask=exists)
        tl.store(m_and_l + 2 * part, m, mask=row < queries * group)
        tl.store(m_and_l + 2 * part + 1, l, mask=row < queries * group)


@triton.jit
def join_kernel(
    out, lse, lengths, acc_parts, m_and_l, n_rows, queries, heads, dim, longest, pieces, window,
    PIECE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row, element = tl.program_id(0).to(tl.int64) + tl.arange(0, 1), tl.arange(0, BLOCK_D)
    exists = (row < n_rows)[:, None] & (element < dim)[None, :]
    b, query = tl.program_id(0) // (queries * heads), tl.program_id(0) // heads % queries
    length = tl.minimum(tl.load(lengths + b).to(tl.int64), longest)
    end = tl.maximum(length - queries + query + 1, 0)
    begin = tl.maximum(tl.where(window > 0, end - window, 0), 0)
    m = tl.full([1], float("-inf"), tl.float32)
    for piece in range(begin // PIECE, tl.cdiv(end, PIECE)):
        m = tl.maximum(m, tl.load(m_and_l + 2 * (row * pieces + piece)))
    l = tl.zeros([1], tl.float32)
    acc = tl.zeros([1, BLOCK_D], tl.float32)
    for piece in range(begin // PIECE, tl.cdiv(end, PIECE)):
        part = row * pieces + piece
        weight = tl.exp2(tl.load(m_and_l + 2 * part) - m)
        l += tl.load(m_and_l + 2 * part + 1) * weight
        acc += tl.load(acc_parts + part[:, None] * dim + element[None, :], mask=exists, other=0.0) * weight[:, None]
    write(out, lse, row, element, exists, acc, m, l, dim)


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor, lengths: Tensor, k_scale: Tensor | None,
    v_scale: Tensor | None, scale: float, window: int, softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check(q.dim() == 4 and k_cache.shape == v_cache.shape, "paged_attention", "q must be (B, Tq, H, D)")
    (batch, queries, heads, dim), (_, block_size, kv_heads, _) = q.shape, k_cache.shape
    q = q if q.stride(3) == 1 or dim == 1 else q.contiguous()
    table, lengths, width = table.contiguous(), lengths.contiguous(), table.shape[1]
    pieces = max(1, triton.cdiv(width * block_size, PIECE))
    out, lse = q.new_empty(q.shape), empty_f32(q, batch, queries, heads)
    if not out.numel():
        return out, lse
    n_rows = batch * queries * heads
    acc_parts, m_and_l = (empty_f32(q, n_rows * pieces if pieces > 1 else 0, n) for n in (dim, 2))
    block, wide = max(16, triton.next_power_of_2(dim)), q.dtype == torch.float32
    tokens = 16 if wide else 64 if block <= 128 else 32  # products in fp32 hold their operands in registers
    grid = (batch * kv_heads * triton.cdiv(queries * (heads // kv_heads), 16), pieces)
    scales = [(cache, 0) if s is None else (s, s.stride(0)) for cache, s in ((k_cache, k_scale), (v_cache, v_scale))]
    attend_kernel[grid](
        q, k_cache, v_cache, scales[0][0], scales[1][0], table, lengths, out, lse, acc_parts, m_and_l,
        q.stride(0), q.stride(1), q.stride(2), k_cache.stride(0), v_cache.stride(0), scales[0][1], scales[1][1],
        queries, heads, kv_heads, dim,
        block_size, width, pieces, scale, softcap, window, SCALED=k_scale is not None, FP8=is_fp8(k_cache),
        CAPPED=softcap > 0, JOINED=pieces == 1, PIECE=PIECE, BLOCK_ROWS=16, BLOCK_TOKENS=tokens, BLOCK_D=block,
        num_warps=8 if wide else 4,
    )  # fmt: skip
    if pieces > 1:
        join_kernel[(n_rows,)](
            out, lse, lengths, acc_parts, m_and_l, n_rows, queries, heads, dim, width * block_size, pieces, window,
            PIECE=PIECE, BLOCK_D=block, num_warps=1,
        )  # fmt: skip
    return out, lse


OPERATORS = {"paged_attention": paged_attention}


def typical(dtype: torch.dtype):
    table = torch.empty(8, 128, dtype=torch.int32)
    for heads, kv_heads, dim, stored in ((32, 8, 128, dtype), (32, 8, 128, torch.int8), (9, 3, 64, torch.uint8)):
        cache = torch.empty(512, 16, kv_heads, dim, dtype=stored)
        scale = None if stored == dtype else torch.empty(512, 16, kv_heads)
        q = torch.empty(8, 1, heads, dim, dtype=dtype)
        for softcap in (0.0, 50.0):
            yield "paged_attention", (q, cache, cache, table, table[:, 0], scale, scale, 0.1, 0, softcap)
