"""LayerNorm (Ba, Kiros & Hinton 2016, arXiv:1607.06450):  y = x̂ · w + b,  x̂ = (x − mean) · r,  r = 1 / sqrt(var + eps)

    dx = r · (dy · w − mean(dy · w) − x̂ · mean(dy · w · x̂))      dw = Σ over rows of dy · x̂      db = Σ over rows of dy

Layout: contiguous (rows, C). Forward: a program takes a ROWS × BLOCK tile of whole rows and centers it before it
squares (one-pass variance loses the digits that a large mean takes); rows of more than WIDEST columns are swept three
times, BLOCK columns at a time. Backward: a program takes one of PARTS parts of the rows and a block of columns, keeps
its share of dw and db in registers and writes it once; a second kernel sums the shares in a fixed order. Where a row is
wider than a block, a kernel before makes the rows' two means.
Bytes, times the dtype's size: forward 2 an element (read x, write y), backward 3 (read dy and x, write dx); 4 and 5 for
wide rows. FLOPs: 7 forward, 14 backward. Intensity: about 2 FLOP/byte in bf16; the roof is memory bandwidth.
Source: the formulas; Triton's tutorial 05 has the same split, with locks where here is a second kernel.
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
def layer_norm_kernel(
    x, weight, bias, y, means, rstd, rows, columns, eps, BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    x += row[:, None] * columns
    y += row[:, None] * columns
    here = (row < rows)[:, None]
    sums = tl.zeros([ROWS], tl.float32)
    for first in range(0, columns, BLOCK):
        inside = here & (first + column < columns)[None, :]
        sums += tl.sum(tl.load(x + first + column[None, :], mask=inside, other=0.0).to(tl.float32), 1)
    mean = sums / columns
    squares = tl.zeros([ROWS], tl.float32)
    for first in range(0, columns, BLOCK):
        inside = here & (first + column < columns)[None, :]
        block = tl.load(x + first + column[None, :], mask=inside, other=0.0).to(tl.float32)
        centered = tl.where(inside, block - mean[:, None], 0.0)
        squares += tl.sum(centered * centered, 1)
    r = 1 / tl.sqrt_rn(squares / columns + eps)
    tl.store(means + row, mean, mask=row < rows)
    tl.store(rstd + row, r, mask=row < rows)
    for first in range(0, columns, BLOCK):
        exists = first + column < columns
        inside = here & exists[None, :]
        w = tl.load(weight + first + column, mask=exists, other=0.0).to(tl.float32)
        block = tl.load(x + first + column[None, :], mask=inside, other=0.0).to(tl.float32)  # from a cache
        out = (block - mean[:, None]) * r[:, None] * w[None, :]
        if BIAS:
            out += tl.load(bias + first + column, mask=exists, other=0.0).to(tl.float32)[None, :]
        tl.store(y + first + column[None, :], out, mask=inside)


@triton.jit
def layer_norm_means_kernel(
    dy, x, weight, means, rstd, grad_means, rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """grad_means (2, rows) = means over the columns of dy · w and dy · w · x̂, for rows wider than a block."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mean = tl.load(means + row, mask=row < rows, other=0.0)
    r = tl.load(rstd + row, mask=row < rows, other=0.0)
    sums, products = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for first in range(0, columns, BLOCK):
        exists = first + column < columns
        inside = (row < rows)[:, None] & exists[None, :]
        at = row[:, None] * columns + first + column[None, :]
        w = tl.load(weight + first + column, mask=exists, other=0.0).to(tl.float32)
        gw = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32) * w[None, :]
        block = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        sums += tl.sum(gw, 1)
        products += tl.sum(gw * (block - mean[:, None]) * r[:, None], 1)
    tl.store(grad_means + row, sums / columns, mask=row < rows)
    tl.store(grad_means + rows + row, products / columns, mask=row < rows)


@triton.jit
def layer_norm_backward_kernel(
    dy, x, weight, means, rstd, grad_means, dx, dweight_parts, dbias_parts, rows, columns, rows_of_part,
    WEIGHT_GRAD: tl.constexpr, BIAS_GRAD: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = column < columns
    w = tl.load(weight + column, mask=exists, other=0.0).to(tl.float32)
    dw, db = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    end = tl.minimum((part + 1) * rows_of_part, rows)
    for first in range(part * rows_of_part, end, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < end)[:, None] & exists[None, :]
        at = row[:, None] * columns + column[None, :]
        g = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        block = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(rstd + row, mask=row < end, other=0.0)
        normal = (block - tl.load(means + row, mask=row < end, other=0.0)[:, None]) * r[:, None]
        gw = g * w[None, :]  # 0 outside
        if WHOLE:
            mean = tl.sum(gw, 1) / columns
            product = tl.sum(gw * normal, 1) / columns
        else:
            mean = tl.load(grad_means + row, mask=row < end, other=0.0)
            product = tl.load(grad_means + rows + row, mask=row < end, other=0.0)
        tl.store(dx + at, r[:, None] * (gw - mean[:, None] - normal * product[:, None]), mask=inside)
        if WEIGHT_GRAD:
            dw += tl.sum(g * normal, 0)
        if BIAS_GRAD:
            db += tl.sum(g, 0)
    if WEIGHT_GRAD:
        tl.store(dweight_parts + part * columns + column, dw, mask=exists)
    if BIAS_GRAD:
        tl.store(dbias_parts + part * columns + column, db, mask=exists)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    for t in (weight, bias):
        fits = t is None or (t.shape == x.shape[-1:] and t.dtype == x.dtype)
        check(fits, "layer_norm", "weight and bias must be (dim,) of x (..., dim)")
    x, weight = x.contiguous(), weight.contiguous()
    columns = x.shape[-1]
    rows = x.numel() // max(columns, 1)
    y, means, rstd = torch.empty_like(x), empty_f32(x, rows), empty_f32(x, rows)
    if rows:
        shape = tile(rows, columns, widest=WIDEST)
        layer_norm_kernel[triton.cdiv(rows, shape["ROWS"]),](
            x, weight, weight if bias is None else bias.contiguous(), y, means, rstd, rows, columns, eps,
            BIAS=bias is not None, **shape,
        )  # fmt: skip
    return y, means, rstd


def layer_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, means: Tensor, rstd: Tensor, weight_grad: bool, bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    rows, columns = rstd.numel(), x.shape[-1]
    dx = torch.empty_like(x)
    dweight, dbias = (weight.new_empty(columns if wanted else 0) for wanted in (weight_grad, bias_grad))
    if not rows:
        return dx, dweight.zero_(), dbias.zero_()
    shape = tile(rows, columns, widest=WIDEST)
    rows_of_part = triton.cdiv(triton.cdiv(rows, shape["ROWS"]), PARTS) * shape["ROWS"]
    parts, blocks = triton.cdiv(rows, rows_of_part), triton.cdiv(columns, shape["BLOCK"])
    dweight_parts, dbias_parts = (empty_f32(x, parts if wanted else 0, columns) for wanted in (weight_grad, bias_grad))
    grad_means = empty_f32(x, 2, rows if blocks > 1 else 0)
    if blocks > 1:
        grid = (triton.cdiv(rows, shape["ROWS"]),)
        layer_norm_means_kernel[grid](dy, x, weight, means, rstd, grad_means, rows, columns, **shape)
    layer_norm_backward_kernel[parts, blocks](
        dy, x, weight, means, rstd, grad_means, dx, dweight_parts, dbias_parts, rows, columns, rows_of_part,
        WEIGHT_GRAD=weight_grad, BIAS_GRAD=bias_grad, WHOLE=blocks == 1, **shape,
    )  # fmt: skip
    if weight_grad:
        sum_parts(dweight_parts, dweight)
    if bias_grad:
        sum_parts(dbias_parts, dbias)
    return dx, dweight, dbias


OPERATORS = {"layer_norm": layer_norm, "layer_norm_backward": layer_norm_backward}


def typical(dtype: torch.dtype):
    for columns in (768, 4096, 16384):  # several rows a tile, one, part of one
        x = torch.empty(2048, columns, dtype=dtype)
        stat = empty_f32(x, 2048)
        yield "layer_norm", (x, x[0], x[0], 1e-5)
        yield "layer_norm_backward", (x, x, x[0], stat, stat, True, True)
