"""adaLN's modulation (Peebles & Xie 2023, arXiv:2212.09748, §3.2):  y = x̂ · (1 + scale) + shift,  x̂ = (x − mean) · rstd

    dx = rstd · (g − mean(g) − x̂ · mean(g · x̂)), g = dy · (1 + scale)     dscale = Σ dy · x̂, dshift = Σ dy over an item

Layout: contiguous (items, rows, C), scale and shift (items, C) with a stride between items of their own. Forward: a
program takes a row and centers it before it squares; it sweeps it three times, BLOCK_SIZE columns at a time. Backward:
a kernel makes the rows' two means; then a program takes one of at most ITEM_BLOCKS runs of an item's rows and a block
of columns, keeps its share of the sums in registers and writes it once; a last kernel adds the shares in a fixed order.
Bytes, times the dtype's size: forward 2 an element (the later sweeps from a cache), backward 5. FLOPs: 7 and 20.
Intensity: at most 2 FLOP/byte in bf16; the roof is memory bandwidth. Source: the formulas.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import as_rows, check, empty_f32, row_statistics, sum_parts, warps

WIDEST = 2048  # columns at a time
BLOCK_ROWS = 4
ITEM_BLOCKS = 256  # in all, at most: runs of rows


@triton.jit
def modulate_kernel(
    x, shift, scale, y, means, rstd, rows, n_cols, shift_stride, scale_stride, eps, BLOCK_SIZE: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    item = row // rows
    column = tl.arange(0, BLOCK_SIZE)
    x += row * n_cols
    y += row * n_cols
    one = tl.arange(0, 1)
    mean, rstd_row = row_statistics(x + one[:, None], (one == 0)[:, None], n_cols, eps, 1, BLOCK_SIZE)
    mean, rstd_row = tl.sum(mean, 0), tl.sum(rstd_row, 0)
    tl.store(means + row, mean)
    tl.store(rstd + row, rstd_row)
    for first in range(0, n_cols, BLOCK_SIZE):
        inside = first + column < n_cols
        factor = 1 + tl.load(scale + item * scale_stride + first + column, mask=inside, other=0.0).to(tl.float32)
        add = tl.load(shift + item * shift_stride + first + column, mask=inside, other=0.0).to(tl.float32)
        block = tl.load(x + first + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + first + column, (block - mean) * rstd_row * factor + add, mask=inside)


@triton.jit
def modulate_means_kernel(
    dy, x, scale, means, rstd, grad_means, n_rows, rows, n_cols, scale_stride, BLOCK_SIZE: tl.constexpr
):
    """grad_means (2, n_rows) = means over the columns of g and g · x̂."""
    row = tl.program_id(0).to(tl.int64)
    item = row // rows
    column = tl.arange(0, BLOCK_SIZE)
    mean, rstd_row = tl.load(means + row), tl.load(rstd + row)
    sums, products = tl.zeros([BLOCK_SIZE], tl.float32), tl.zeros([BLOCK_SIZE], tl.float32)
    for first in range(0, n_cols, BLOCK_SIZE):
        inside = first + column < n_cols
        factor = 1 + tl.load(scale + item * scale_stride + first + column, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(dy + row * n_cols + first + column, mask=inside, other=0.0).to(tl.float32) * factor
        block = tl.load(x + row * n_cols + first + column, mask=inside, other=0.0).to(tl.float32)
        sums += g
        products += g * (block - mean) * rstd_row
    tl.store(grad_means + row, tl.sum(sums, 0) / n_cols)
    tl.store(grad_means + n_rows + row, tl.sum(products, 0) / n_cols)


@triton.jit
def modulate_backward_kernel(
    dy, x, scale, means, rstd, grad_means, dx, dscale_parts, dshift_parts, n_rows, rows, n_cols, items, scale_stride,
    rows_of_block, blocks, BLOCK_ROWS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64) // blocks
    block = tl.program_id(0).to(tl.int64) % blocks
    column = tl.program_id(1).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    exists = column < n_cols
    factor = 1 + tl.load(scale + item * scale_stride + column, mask=exists, other=0.0).to(tl.float32)
    dscale, dshift = tl.zeros([BLOCK_SIZE], tl.float32), tl.zeros([BLOCK_SIZE], tl.float32)
    begin = item * rows + block * rows_of_block
    end = tl.minimum(begin + rows_of_block, (item + 1) * rows)
    for first in range(begin, end, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        inside = (row < end)[:, None] & exists[None, :]
        at = row[:, None] * n_cols + column[None, :]
        d = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        rstd_row = tl.load(rstd + row, mask=row < end, other=0.0)
        normal = (v - tl.load(means + row, mask=row < end, other=0.0)[:, None]) * rstd_row[:, None]
        mean = tl.load(grad_means + row, mask=row < end, other=0.0)
        product = tl.load(grad_means + n_rows + row, mask=row < end, other=0.0)
        g = d * factor[None, :]
        tl.store(dx + at, rstd_row[:, None] * (g - mean[:, None] - normal * product[:, None]), mask=inside)
        dscale += tl.sum(d * normal, 0)
        dshift += tl.sum(d, 0)
    part = (block * items + item) * n_cols + column
    tl.store(dscale_parts + part, dscale, mask=exists)
    tl.store(dshift_parts + part, dshift, mask=exists)


def columns(n_cols: int) -> dict[str, int]:
    size = min(triton.next_power_of_2(max(n_cols, 1)), WIDEST)
    return {"BLOCK_SIZE": size, "num_warps": warps(size)}


def runs(items: int, rows: int) -> tuple[int, int]:
    """Rows of a run, and runs an item."""
    wanted = max(ITEM_BLOCKS // items, 1)
    per = max(triton.cdiv(rows, wanted), 4)
    return per, triton.cdiv(rows, per)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    for t in (shift, scale):
        fits = t.shape == (x.shape[0], x.shape[-1]) and t.dtype == x.dtype
        check(fits, "modulate", "shift and scale must be (items, dim) of x (items, …, dim), of one dtype")
    y = x.new_empty(x.shape)
    x, n_cols, rows = x.contiguous(), x.shape[-1], x.shape[1:-1].numel()
    n_rows = x.shape[0] * rows if n_cols else 0
    means, rstd = empty_f32(x, n_rows), empty_f32(x, n_rows)
    if n_rows:
        (shifts, shift_stride), (scales, scale_stride) = as_rows(shift), as_rows(scale)
        modulate_kernel[n_rows,](
            x, shifts, scales, y, means, rstd, rows, n_cols, shift_stride, scale_stride, eps, **columns(n_cols)
        )
    return y, means, rstd


def modulate_backward(
    dy: Tensor, x: Tensor, scale: Tensor, means: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dshift, dscale = x.new_empty(x.shape), scale.new_empty(scale.shape), scale.new_empty(scale.shape)
    if not x.numel():
        return dx, dshift.zero_(), dscale.zero_()
    dy, x = dy.contiguous(), x.contiguous()
    scales, scale_stride = as_rows(scale)
    items, n_cols, rows = x.shape[0], x.shape[-1], x.shape[1:-1].numel()
    n_rows = items * rows
    rows_of_block, blocks = runs(items, rows)
    grad_means = empty_f32(x, 2, n_rows)
    parts = empty_f32(x, 2, blocks, items * n_cols)
    shape = columns(n_cols)
    modulate_means_kernel[n_rows,](dy, x, scales, means, rstd, grad_means, n_rows, rows, n_cols, scale_stride, **shape)
    modulate_backward_kernel[items * blocks, triton.cdiv(n_cols, shape["BLOCK_SIZE"])](
        dy, x, scales, means, rstd, grad_means, dx, parts[0], parts[1], n_rows, rows, n_cols, items, scale_stride,
        rows_of_block, blocks, BLOCK_ROWS=BLOCK_ROWS, **shape,
    )  # fmt: skip
    sum_parts(parts[0], dscale.view(-1))
    sum_parts(parts[1], dshift.view(-1))
    return dx, dshift, dscale


OPERATORS = {"modulate": modulate, "modulate_backward": modulate_backward}


def typical(dtype: torch.dtype):
    x = torch.empty(8, 256, 1152, dtype=dtype)
    shift, scale = torch.empty(8, 6 * 1152, dtype=dtype).chunk(6, -1)[:2]
    stat = empty_f32(x, 8 * 256)
    yield "modulate", (x, shift, scale, 1e-6)
    yield "modulate_backward", (x, x, scale, stat, stat)
