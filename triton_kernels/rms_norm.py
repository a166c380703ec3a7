"""RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467):  y = x · r · w,  r = 1 / sqrt(mean(x²) + eps)

    dx = r · (dy · w − x · r² · mean(dy · w · x))          dw = Σ over rows of dy · x · r

Layout: contiguous (rows, C). Forward: a program takes a ROWS × BLOCK tile of whole rows; rows of more than WIDEST
columns are swept twice, BLOCK columns at a time. Backward: a program takes one of PARTS parts of the rows and a block
of columns, keeps its share of dw in registers and writes it once; a second kernel sums the shares in a fixed order.
Where a row is wider than a block, a kernel before makes the rows' means.
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
PARTS = 256  # of the rows, in the backward pass: a few for each processor of a large GPU


@triton.jit
def rms_norm_kernel(x, weight, y, rstd, rows, columns, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    x += row[:, None] * columns
    y += row[:, None] * columns
    here = (row < rows)[:, None]
    squares = tl.zeros([ROWS], tl.float32)
    for first in range(0, columns, BLOCK):
        inside = here & (first + column < columns)[None, :]
        block = tl.load(x + first + column[None, :], mask=inside, other=0.0).to(tl.float32)
        squares += tl.sum(block * block, 1)
    r = 1 / tl.sqrt_rn(squares / columns + eps)
    tl.store(rstd + row, r, mask=row < rows)
    for first in range(0, columns, BLOCK):
        exists = first + column < columns
        w = tl.load(weight + first + column, mask=exists, other=0.0).to(tl.float32)
        inside = here & exists[None, :]
        block = tl.load(x + first + column[None, :], mask=inside, other=0.0).to(tl.float32)  # from a cache
        tl.store(y + first + column[None, :], block * r[:, None] * w[None, :], mask=inside)


@triton.jit
def rms_norm_means_kernel(dy, x, weight, means, rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """means (rows,) = mean over the columns of dy · w · x, for rows wider than a block."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    sums = tl.zeros([ROWS], tl.float32)
    for first in range(0, columns, BLOCK):
        exists = first + column < columns
        inside = (row < rows)[:, None] & exists[None, :]
        at = row[:, None] * columns + first + column[None, :]
        w = tl.load(weight + first + column, mask=exists, other=0.0).to(tl.float32)
        g = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        sums += tl.sum(g * w[None, :] * tl.load(x + at, mask=inside, other=0.0).to(tl.float32), 1)
    tl.store(means + row, sums / columns, mask=row < rows)


@triton.jit
def rms_norm_backward_kernel(
    dy, x, weight, rstd, means, dx, dweight_parts, rows, columns, rows_of_part,
    WEIGHT_GRAD: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = column < columns
    w = tl.load(weight + column, mask=exists, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK], tl.float32)
    end = tl.minimum((part + 1) * rows_of_part, rows)
    for first in range(part * rows_of_part, end, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < end)[:, None] & exists[None, :]
        at = row[:, None] * columns + column[None, :]
        g = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        block = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(rstd + row, mask=row < end, other=0.0)
        gw = g * w[None, :]
        if WHOLE:
            mean = tl.sum(gw * block, 1) / columns
        else:
            mean = tl.load(means + row, mask=row < end, other=0.0)
        tl.store(dx + at, r[:, None] * (gw - block * (r * r * mean)[:, None]), mask=inside)
        if WEIGHT_GRAD:
            dw += tl.sum(g * block * r[:, None], 0)
    if WEIGHT_GRAD:
        tl.store(dweight_parts + part * columns + column, dw, mask=exists)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    check(weight.shape == x.shape[-1:] and weight.dtype == x.dtype, "rms_norm", "weight must be (dim,) of x (..., dim)")
    x, weight = x.contiguous(), weight.contiguous()
    columns = x.shape[-1]
    rows = x.numel() // max(columns, 1)
    y, rstd = torch.empty_like(x), empty_f32(x, rows)
    if rows:
        shape = tile(rows, columns, widest=WIDEST)
        grid = (triton.cdiv(rows, shape["ROWS"]),)
        rms_norm_kernel[grid](x, weight, y, rstd, rows, columns, eps, **shape)
    return y, rstd


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, weight_grad: bool) -> tuple[Tensor, Tensor]:
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    rows, columns = rstd.numel(), x.shape[-1]
    dx, dweight = torch.empty_like(x), weight.new_empty(columns if weight_grad else 0)
    if not rows:
        return dx, dweight.zero_()
    shape = tile(rows, columns, widest=WIDEST)
    rows_of_part = triton.cdiv(triton.cdiv(rows, shape["ROWS"]), PARTS) * shape["ROWS"]
    parts, blocks = triton.cdiv(rows, rows_of_part), triton.cdiv(columns, shape["BLOCK"])
    dweight_parts = empty_f32(x, parts if weight_grad else 0, columns)
    means = empty_f32(x, rows if blocks > 1 else 0)
    if blocks > 1:
        grid = (triton.cdiv(rows, shape["ROWS"]),)
        rms_norm_means_kernel[grid](dy, x, weight, means, rows, columns, **shape)
    rms_norm_backward_kernel[parts, blocks](
        dy, x, weight, rstd, means, dx, dweight_parts, rows, columns, rows_of_part,
        WEIGHT_GRAD=weight_grad, WHOLE=blocks == 1, **shape,
    )  # fmt: skip
    return dx, sum_parts(dweight_parts, dweight) if weight_grad else dweight


OPERATORS = {"rms_norm": rms_norm, "rms_norm_backward": rms_norm_backward}


def typical(dtype: torch.dtype):
    for columns in (576, 4096, 16384):  # several rows a tile, one, part of one
        x = torch.empty(2048, columns, dtype=dtype)
        yield "rms_norm", (x, x[0], 1e-5)
        yield "rms_norm_backward", (x, x, x[0], empty_f32(x, 2048), True)
