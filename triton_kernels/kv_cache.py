"""The paged key–value cache (Kwon et al. 2023, arXiv:2309.06180): append, gather, copy of blocks.

append, gather: a program takes a token, all heads, as a (heads, dim) tile; 8 bits have a scale a head, from the largest
magnitude of its row. Maxima are taken of the bits of |x| as integers, where NaN is above everything, so that a token
that is not finite gets a scale that is not. copy: a program takes a piece of a block, a launch a pool.
Bytes: each element is read once and written once, 4 more a head with 8 bits. At most 3 FLOPs an element, below 1 FLOP a
byte: the roof is memory bandwidth.
Source: the definition, finetune/ops/kv_cache.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import check, warps
from ._eight_bit import LARGEST, is_fp8, narrow, widen


@triton.jit
def append_kernel(
    x, cache, scale, slots, x_token, x_head, cache_block, scale_block, heads, dim, blocks, block_size, largest,
    SCALED: tl.constexpr, FP8: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if (slot >= 0) & (slot < blocks.to(tl.int64) * block_size):
        head = tl.arange(0, HEADS).to(tl.int64)
        element = tl.arange(0, DIM)
        inside = (head < heads)[:, None] & (element < dim)[None, :]
        block, offset = slot // block_size, slot % block_size
        to = cache + block * cache_block + (offset * heads + head[:, None]) * dim + element[None, :]
        value = tl.load(x + token * x_token + head[:, None] * x_head + element[None, :], mask=inside, other=0.0)
        if SCALED:
            value = value.to(tl.float32)
            top = tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1).to(tl.float32, bitcast=True)
            s = tl.div_rn(top, tl.zeros_like(top) + largest)
            tl.store(scale + block * scale_block + offset * heads + head, s, mask=head < heads)
            usable = ((s > 0) & (s <= 3.4028235e38))[:, None]
            quotient = tl.div_rn(tl.where(usable, value, 0.0), tl.where(usable, s[:, None], 1.0) + tl.zeros_like(value))
            bounded = tl.minimum(tl.maximum(tl.where(usable, quotient, 0.0), -largest), largest)
            tl.store(to, narrow(bounded, FP8), mask=inside)
        else:
            tl.store(to, value, mask=inside)


@triton.jit
def gather_kernel(
    cache, scale, table, lengths, out, cache_block, scale_block, width, block_size, heads, dim,
    SCALED: tl.constexpr, FP8: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    b, j = row // (width * block_size), row % (width * block_size)
    seen = j < tl.load(lengths + b)
    block = tl.load(table + b * width + j // block_size, mask=seen, other=0).to(tl.int64)
    head = tl.arange(0, HEADS).to(tl.int64)
    element = tl.arange(0, DIM)
    inside = (head < heads)[:, None] & (element < dim)[None, :]
    at = (j % block_size) * heads + head
    here = inside & seen[:, None]
    value = tl.load(cache + (block * cache_block + at * dim)[:, None] + element[None, :], mask=here, other=0)
    if SCALED:
        s = tl.load(scale + block * scale_block + at, mask=(head < heads) & seen, other=0.0)
        value = widen(value, FP8) * s[:, None]
    tl.store(out + (row * heads + head)[:, None] * dim + element[None, :], value, mask=inside)


@triton.jit
def copy_kernel(cache, pairs, stride, size, BLOCK: tl.constexpr):
    pair = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    source, destination = tl.load(pairs + 2 * pair), tl.load(pairs + 2 * pair + 1)
    value = tl.load(cache + source * stride + at, mask=at < size)
    tl.store(cache + destination * stride + at, value, mask=at < size)


def tile(heads: int, dim: int) -> dict[str, int]:
    heads, dim = triton.next_power_of_2(heads), triton.next_power_of_2(dim)
    return {"HEADS": heads, "DIM": dim, "num_warps": warps(heads * dim)}


def kv_cache_(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    check(k.shape == v.shape and k.shape[1:] == k_cache.shape[2:], "kv_cache", "k and v must be (tokens, Hkv, D)")
    if not k.numel():
        return
    slots, (blocks, block_size, heads, dim) = slots.contiguous(), k_cache.shape
    for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        x = x if x.stride(2) == 1 or dim == 1 else x.contiguous()
        append_kernel[(len(x),)](
            x, cache, cache if scale is None else scale, slots, x.stride(0), x.stride(1), cache.stride(0),
            0 if scale is None else scale.stride(0), heads, dim, blocks, block_size, LARGEST.get(cache.dtype, 1.0),
            SCALED=scale is not None, FP8=is_fp8(cache), **tile(heads, dim),
        )  # fmt: skip


def kv_cache_gather(cache: Tensor, table: Tensor, lengths: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    table, lengths, (_, block_size, heads, dim) = table.contiguous(), lengths.contiguous(), cache.shape
    rows, width = table.shape
    out = cache.new_empty(rows, width * block_size, heads, dim, dtype=dtype)
    if out.numel():
        gather_kernel[(rows * width * block_size,)](
            cache, cache if scale is None else scale, table, lengths, out, cache.stride(0),
            0 if scale is None else scale.stride(0), width, block_size, heads, dim,
            SCALED=scale is not None, FP8=is_fp8(cache), **tile(heads, dim),
        )  # fmt: skip
    return out


def kv_cache_copy_(caches: list[Tensor], pairs: Tensor) -> None:
    pairs = pairs.contiguous()
    for cache in caches:
        if pairs.numel() and cache.numel():
            size = cache[0].numel()
            block = min(triton.next_power_of_2(size), 4096)
            grid = (len(pairs), triton.cdiv(size, block))
            copy_kernel[grid](cache, pairs, cache.stride(0), size, BLOCK=block, num_warps=warps(block))


OPERATORS = {"kv_cache_": kv_cache_, "kv_cache_gather": kv_cache_gather, "kv_cache_copy_": kv_cache_copy_}


def typical(dtype: torch.dtype):
    x, ids = torch.empty(64, 8, 128, dtype=dtype), torch.empty(4, 8, dtype=torch.int32)
    for stored in (dtype, torch.int8, torch.uint8):
        cache = torch.empty(128, 16, 8, 128, dtype=stored)
        scale = None if stored == dtype else torch.empty(128, 16, 8)
        yield "kv_cache_", (x, x, cache, cache, torch.empty(64, dtype=torch.int64), scale, scale)
        yield "kv_cache_gather", (cache, ids, ids[:, 0], scale, dtype)
    yield "kv_cache_copy_", ([cache, torch.empty(128, 16, 8)], torch.empty(3, 2, dtype=torch.int64))
