"""LayerNorm (Ba, Kiros & Hinton 2016, arXiv:1607.06450):  y = x̂ · w + b,  x̂ = (x − mean) · rstd,  rstd = 1/√(var + eps)

    dx = rstd · (dy · w − mean(dy · w) − x̂ · mean(dy · w · x̂))     dw = Σ over rows of dy · x̂     db = Σ over rows of dy

Layout: contiguous (rows, C). Forward: a program takes a BLOCK_ROWS × BLOCK_SIZE tile of whole rows and centers it
before it squares (one-pass variance loses the digits that a large mean takes); rows of more than WIDEST columns are
swept three times, BLOCK_SIZE columns at a time. Backward: a program takes one of ROW_BLOCKS blocks of rows and a block
of columns, keeps its share of dw and db in registers and writes it once; a second kernel sums the shares in a fixed
order. Where a row is wider than a block of columns, a kernel before makes the rows' two means.
Bytes, times the dtype's size: forward 2 an element (read x, write y), backward 3 (read dy and x, write dx); 4 and 5 for
wide rows. FLOPs: 7 forward, 14 backward. Intensity: about 2 FLOP/byte in bf16; the roof is memory bandwidth.
Source: the formulas; Triton's tutorial 05 has the same split, with locks where here is a second kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import check, empty_f32, row_statistics, sum_parts, tile

WIDEST = 8192  # columns that one tile may hold
ROW_BLOCKS = 256  # of the rows, in the backward pass: a few for each processor of a large GPU


@triton.jit
def layer_norm_kernel(
    x, weight, bias, y, means, rstd, n_rows, n_cols, eps,
    BIAS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_SIZE)
    x += row[:, None] * n_cols
    y += row[:, None] * n_cols
    here = (row < n_rows)[:, None]
    mean, rstd_row = row_statistics(x, here, n_cols, eps, BLOCK_ROWS, BLOCK_SIZE)
    tl.store(means + row, mean, mask=row < n_rows)
    tl.store(rstd + row, rstd_row, mask=row < n_rows)
    for first in range(0, n_cols, BLOCK_SIZE):
        exists = first + column < n_cols
        inside = here & exists[None, :]
        w = tl.load(weight + first + column, mask=exists, other=0.0).to(tl.float32)
        block = tl.load(x + first + column[None, :], mask=inside, other=0.0).to(tl.float32)  # from a cache
        out = (block - mean[:, None]) * rstd_row[:, None] * w[None, :]
        if BIAS:
            out += tl.load(bias + first + column, mask=exists, other=0.0).to(tl.float32)[None, :]
        tl.store(y + first + column[None, :], out, mask=inside)


@triton.jit
def layer_norm_means_kernel(
    dy, x, weight, means, rstd, grad_means, n_rows, n_cols, BLOCK_ROWS: tl.constexpr, BLOCK_SIZE: tl.constexpr
):
    """grad_means (2, n_rows) = means over the columns of dy · w and dy · w · x̂, for rows wider than a block."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_SIZE)
    mean = tl.load(means + row, mask=row < n_rows, other=0.0)
    rstd_row = tl.load(rstd + row, mask=row < n_rows, other=0.0)
    sums, products = tl.zeros([BLOCK_ROWS], tl.float32), tl.zeros([BLOCK_ROWS], tl.float32)
    for first in range(0, n_cols, BLOCK_SIZE):
        exists = first + column < n_cols
        inside = (row < n_rows)[:, None] & exists[None, :]
        at = row[:, None] * n_cols + first + column[None, :]
        w = tl.load(weight + first + column, mask=exists, other=0.0).to(tl.float32)
        gw = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32) * w[None, :]
        block = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        sums += tl.sum(gw, 1)
        products += tl.sum(gw * (block - mean[:, None]) * rstd_row[:, None], 1)
    tl.store(grad_means + row, sums / n_cols, mask=row < n_rows)
    tl.store(grad_means + n_rows + row, products / n_cols, mask=row < n_rows)


@triton.jit
def layer_norm_backward_kernel(
    dy, x, weight, means, rstd, grad_means, dx, dweight_parts, dbias_parts, n_rows, n_cols, rows_of_block,
    WEIGHT_GRAD: tl.constexpr, BIAS_GRAD: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    row_block = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    exists = column < n_cols
    w = tl.load(weight + column, mask=exists, other=0.0).to(tl.float32)
    dw, db = tl.zeros([BLOCK_SIZE], tl.float32), tl.zeros([BLOCK_SIZE], tl.float32)
    end = tl.minimum((row_block + 1) * rows_of_block, n_rows)
    for first in range(row_block * rows_of_block, end, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        inside = (row < end)[:, None] & exists[None, :]
        at = row[:, None] * n_cols + column[None, :]
        g = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        block = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        rstd_row = tl.load(rstd + row, mask=row < end, other=0.0)
        normal = (block - tl.load(means + row, mask=row < end, other=0.0)[:, None]) * rstd_row[:, None]
        gw = g * w[None, :]  # 0 outside
        if WHOLE:
            mean = tl.sum(gw, 1) / n_cols
            product = tl.sum(gw * normal, 1) / n_cols
        else:
            mean = tl.load(grad_means + row, mask=row < end, other=0.0)
            product = tl.load(grad_means + n_rows + row, mask=row < end, other=0.0)
        tl.store(dx + at, rstd_row[:, None] * (gw - mean[:, None] - normal * product[:, None]), mask=inside)
        if WEIGHT_GRAD:
            dw += tl.sum(g * normal, 0)
        if BIAS_GRAD:
            db += tl.sum(g, 0)
    if WEIGHT_GRAD:
        tl.store(dweight_parts + row_block * n_cols + column, dw, mask=exists)
    if BIAS_GRAD:
        tl.store(dbias_parts + row_block * n_cols + column, db, mask=exists)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    for t in (weight, bias):
        fits = t is None or (t.shape == x.shape[-1:] and t.dtype == x.dtype)
        check(fits, "layer_norm", "weight and bias must be (dim,) of x (..., dim)")
    x, weight = x.contiguous(), weight.contiguous()
    n_cols = x.shape[-1]
    n_rows = x.numel() // max(n_cols, 1)
    y, means, rstd = torch.empty_like(x), empty_f32(x, n_rows), empty_f32(x, n_rows)
    if n_rows:
        shape = tile(n_rows, n_cols, widest=WIDEST)
        layer_norm_kernel[triton.cdiv(n_rows, shape["BLOCK_ROWS"]),](
            x, weight, weight if bias is None else bias.contiguous(), y, means, rstd, n_rows, n_cols, eps,
            BIAS=bias is not None, **shape,
        )  # fmt: skip
    return y, means, rstd


def layer_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, means: Tensor, rstd: Tensor, weight_grad: bool, bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    n_rows, n_cols = rstd.numel(), x.shape[-1]
    dx = torch.empty_like(x)
    dweight, dbias = (weight.new_empty(n_cols if wanted else 0) for wanted in (weight_grad, bias_grad))
    if not n_rows:
        return dx, dweight.zero_(), dbias.zero_()
    shape = tile(n_rows, n_cols, widest=WIDEST)
    rows_of_block = triton.cdiv(triton.cdiv(n_rows, shape["BLOCK_ROWS"]), ROW_BLOCKS) * shape["BLOCK_ROWS"]
    row_blocks, blocks = triton.cdiv(n_rows, rows_of_block), triton.cdiv(n_cols, shape["BLOCK_SIZE"])
    sizes = (row_blocks if wanted else 0 for wanted in (weight_grad, bias_grad))
    dweight_parts, dbias_parts = (empty_f32(x, size, n_cols) for size in sizes)
    grad_means = empty_f32(x, 2, n_rows if blocks > 1 else 0)
    if blocks > 1:
        grid = (triton.cdiv(n_rows, shape["BLOCK_ROWS"]),)
        layer_norm_means_kernel[grid](dy, x, weight, means, rstd, grad_means, n_rows, n_cols, **shape)
    layer_norm_backward_kernel[row_blocks, blocks](
        dy, x, weight, means, rstd, grad_means, dx, dweight_parts, dbias_parts, n_rows, n_cols, rows_of_block,
        WEIGHT_GRAD=weight_grad, BIAS_GRAD=bias_grad, WHOLE=blocks == 1, **shape,
    )  # fmt: skip
    if weight_grad:
        sum_parts(dweight_parts, dweight)
    if bias_grad:
        sum_parts(dbias_parts, dbias)
    return dx, dweight, dbias


OPERATORS = {"layer_norm": layer_norm, "layer_norm_backward": layer_norm_backward}


def typical(dtype: torch.dtype):
    for n_cols in (768, 4096, 16384):  # several rows a tile, one, part of one
        x = torch.empty(2048, n_cols, dtype=dtype)
        stat = empty_f32(x, 2048)
        yield "layer_norm", (x, x[0], x[0], 1e-5)
        yield "layer_norm_backward", (x, x, x[0], stat, stat, True, True)
