"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), rotate-half convention:

    y1 = x1 · cos − x2 · sin,   y2 = x2 · cos + x1 · sin,   x1 = x[..., :D/2], x2 = x[..., D/2:]

cos and sin are rows of two fp32 tables, chosen by the tokens' positions; the gradient is the rotation by the opposite
angle (`inverse`). Layout: x (B, T, H, D) with any strides but unit stride in D, y contiguous; a program takes
BLOCK_ROWS heads (b, t, h) × D/2 pairs. A position outside the tables reads nothing and makes its token NaN.
Bytes: 2 an element (read x, write y) times the dtype's size; a token's table rows (4 · D bytes) serve all its heads
from the cache. FLOPs: 3 an element. Intensity: 0.75 FLOP/byte in bf16; the roof is memory bandwidth.
Source: the formulas; Liger-Kernel's rope.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import check, tile


@triton.jit
def rope_kernel(
    x, cos, sin, positions, y, n_rows, length, heads, half, limit, batch_stride, token_stride, head_stride,
    INVERSE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # (batch, token, head)
    column = tl.program_id(1) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    here, inside = row < n_rows, (row < n_rows)[:, None] & (column < half)[None, :]
    token = row // heads
    position = tl.load(positions + token, mask=here, other=0)
    known = inside & ((position >= 0) & (position < limit))[:, None]
    c = tl.load(cos + position[:, None] * half + column[None, :], mask=known, other=float("nan"))
    s = tl.load(sin + position[:, None] * half + column[None, :], mask=known, other=float("nan"))
    if INVERSE:
        s = -s
    start = (token // length) * batch_stride + (token % length) * token_stride + (row % heads) * head_stride
    at = x + start[:, None] + column[None, :]
    x1 = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
    to = y + row[:, None] * (2 * half) + column[None, :]
    tl.store(to, x1 * c - x2 * s, mask=inside)
    tl.store(to + half, x2 * c + x1 * s, mask=inside)


def rope(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, inverse: bool = False) -> Tensor:
    check(x.dim() == 4 and x.shape[3] % 2 == 0, "rope", "x must be (B, T, H, D) and the head dimension D must be even")
    fits = cos.shape == sin.shape == (cos.shape[0], x.shape[3] // 2) and cos.dtype == sin.dtype == torch.float32
    check(fits, "rope", "cos and sin must be (max_T, D/2) float32 for x (B, T, H, D)")
    check(positions.shape == x.shape[:2], "rope", "positions must be (B, T) for x (B, T, H, D)")
    _, length, heads, dim = x.shape
    y = x.new_empty(x.shape)
    if not y.numel():
        return y
    x = x if x.stride(3) == 1 else x.contiguous()
    n_rows = y.numel() // dim
    shape = tile(n_rows, dim // 2, 1024)
    grid = (triton.cdiv(n_rows, shape["BLOCK_ROWS"]), triton.cdiv(dim // 2, shape["BLOCK_SIZE"]))
    rope_kernel[grid](
        x, cos.contiguous(), sin.contiguous(), positions.contiguous(), y, n_rows, length, heads, dim // 2, len(cos),
        *x.stride()[:3], INVERSE=inverse, **shape,
    )  # fmt: skip
    return y


OPERATORS = {"rope": rope}


def typical(dtype: torch.dtype):
    table, positions = torch.empty(4096, 64), torch.zeros(2, 512, dtype=torch.int64)
    fused = torch.empty(2, 512, 48, 128, dtype=dtype)
    yield "rope", (fused[:, :, :32], table, table, positions, False)
    yield "rope", (fused[:, :, :32], table, table, positions, True)
