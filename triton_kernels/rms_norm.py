"""RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467):  y = x · rstd · w,  rstd = 1 / sqrt(mean(x²) + eps)

    dx = rstd · (dy · w − x · rstd² · mean(dy · w · x))          dw = Σ over rows of dy · x · rstd

Layout: contiguous (rows, C). Forward: a program takes a BLOCK_ROWS × BLOCK_SIZE tile of whole rows; rows of more than
WIDEST columns are swept twice, BLOCK_SIZE columns at a time. Backward: a program takes one of ROW_BLOCKS blocks of rows
and a block of columns, keeps its share of dw in registers and writes it once; a second kernel sums the shares in a
fixed order. Where a row is wider than a block of columns, a kernel before makes the rows' means.
Bytes, times the dtype's size: forward 2 an element (read x, write y), backward 3 (read dy and x, write dx); 3 and 5 for
wide rows. FLOPs: 4 forward, 10 backward. Intensity: about 1 FLOP/byte in bf16; the roof is memory bandwidth.
Source: the formulas; the split of dw is that of Liger-Kernel's rms_norm.py, without its atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import check, empty_f32, sum_parts, tile

WIDEST = 8192  # columns that one tile may hold
ROW_BLOCKS = 256  # of the rows, in the backward pass: a few for each processor of a large GPU


@triton.jit
def rms_norm_kernel(x, weight, y, rstd, n_rows, n_cols, eps, BLOCK_ROWS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_SIZE)
    x += row[:, None] * n_cols
    y += row[:, None] * n_cols
    here = (row < n_rows)[:, None]
    squares = tl.zeros([BLOCK_ROWS], tl.float32)
    for first in range(0, n_cols, BLOCK_SIZE):
        inside = here & (first + column < n_cols)[None, :]
        block = tl.load(x + first + column[None, :], mask=inside, other=0.0).to(tl.float32)
        squares += tl.sum(block * block, 1)
    rstd_row = 1 / tl.sqrt_rn(squares / n_cols + eps)
    tl.store(rstd + row, rstd_row, mask=row < n_rows)
    for first in range(0, n_cols, BLOCK_SIZE):
        exists = first + column < n_cols
        w = tl.load(weight + first + column, mask=exists, other=0.0).to(tl.float32)
        inside = here & exists[None, :]
        block = tl.load(x + first + column[None, :], mask=inside, other=0.0).to(tl.float32)  # from a cache
        tl.store(y + first + column[None, :], block * rstd_row[:, None] * w[None, :], mask=inside)


@triton.jit
def rms_norm_means_kernel(dy, x, weight, means, n_rows, n_cols, BLOCK_ROWS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """means (n_rows,) = mean over the columns of dy · w · x, for rows wider than a block."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_SIZE)
    sums = tl.zeros([BLOCK_ROWS], tl.float32)
    for first in range(0, n_cols, BLOCK_SIZE):
        exists = first + column < n_cols
        inside = (row < n_rows)[:, None] & exists[None, :]
        at = row[:, None] * n_cols + first + column[None, :]
        w = tl.load(weight + first + column, mask=exists, other=0.0).to(tl.float32)
        g = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        sums += tl.sum(g * w[None, :] * tl.load(x + at, mask=inside, other=0.0).to(tl.float32), 1)
    tl.store(means + row, sums / n_cols, mask=row < n_rows)


@triton.jit
def rms_norm_backward_kernel(
    dy, x, weight, rstd, means, dx, dweight_parts, n_rows, n_cols, rows_of_block,
    WEIGHT_GRAD: tl.constexpr, WHOLE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    row_block = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    exists = column < n_cols
    w = tl.load(weight + column, mask=exists, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK_SIZE], tl.float32)
    end = tl.minimum((row_block + 1) * rows_of_block, n_rows)
    for first in range(row_block * rows_of_block, end, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        inside = (row < end)[:, None] & exists[None, :]
        at = row[:, None] * n_cols + column[None, :]
        g = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        block = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        rstd_row = tl.load(rstd + row, mask=row < end, other=0.0)
        gw = g * w[None, :]
        if WHOLE:
            mean = tl.sum(gw * block, 1) / n_cols
        else:
            mean = tl.load(means + row, mask=row < end, other=0.0)
        tl.store(dx + at, rstd_row[:, None] * (gw - block * (rstd_row * rstd_row * mean)[:, None]), mask=inside)
        if WEIGHT_GRAD:
            dw += tl.sum(g * block * rstd_row[:, None], 0)
    if WEIGHT_GRAD:
        tl.store(dweight_parts + row_block * n_cols + column, dw, mask=exists)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    check(weight.shape == x.shape[-1:] and weight.dtype == x.dtype, "rms_norm", "weight must be (dim,) of x (..., dim)")
    x, weight = x.contiguous(), weight.contiguous()
    n_cols = x.shape[-1]
    n_rows = x.numel() // max(n_cols, 1)
    y, rstd = torch.empty_like(x), empty_f32(x, n_rows)
    if n_rows:
        shape = tile(n_rows, n_cols, widest=WIDEST)
        grid = (triton.cdiv(n_rows, shape["BLOCK_ROWS"]),)
        rms_norm_kernel[grid](x, weight, y, rstd, n_rows, n_cols, eps, **shape)
    return y, rstd


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, weight_grad: bool) -> tuple[Tensor, Tensor]:
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    n_rows, n_cols = rstd.numel(), x.shape[-1]
    dx, dweight = torch.empty_like(x), weight.new_empty(n_cols if weight_grad else 0)
    if not n_rows:
        return dx, dweight.zero_()
    shape = tile(n_rows, n_cols, widest=WIDEST)
    rows_of_block = triton.cdiv(triton.cdiv(n_rows, shape["BLOCK_ROWS"]), ROW_BLOCKS) * shape["BLOCK_ROWS"]
    row_blocks, blocks = triton.cdiv(n_rows, rows_of_block), triton.cdiv(n_cols, shape["BLOCK_SIZE"])
    dweight_parts = empty_f32(x, row_blocks if weight_grad else 0, n_cols)
    means = empty_f32(x, n_rows if blocks > 1 else 0)
    if blocks > 1:
        grid = (triton.cdiv(n_rows, shape["BLOCK_ROWS"]),)
        rms_norm_means_kernel[grid](dy, x, weight, means, n_rows, n_cols, **shape)
    rms_norm_backward_kernel[row_blocks, blocks](
        dy, x, weight, rstd, means, dx, dweight_parts, n_rows, n_cols, rows_of_block,
        WEIGHT_GRAD=weight_grad, WHOLE=blocks == 1, **shape,
    )  # fmt: skip
    return dx, sum_parts(dweight_parts, dweight) if weight_grad else dweight


OPERATORS = {"rms_norm": rms_norm, "rms_norm_backward": rms_norm_backward}


def typical(dtype: torch.dtype):
    for n_cols in (576, 4096, 16384):  # several rows a tile, one, part of one
        x = torch.empty(2048, n_cols, dtype=dtype)
        yield "rms_norm", (x, x[0], 1e-5)
        yield "rms_norm_backward", (x, x, x[0], empty_f32(x, 2048), True)
