"""The end of an adaLN-Zero branch (Peebles & Xie 2023, arXiv:2212.09748):  y = x + gate · branch, a gate an item

    dbranch = gate · dy     dgate = Σ dy · branch over an item     dx is dy

Layout: contiguous (items, rows, C), the gate (items, C) with a stride between items. A program takes a run of an item's
rows and a block of columns; backward keeps its share of dgate in registers and writes it once; a second kernel adds the
shares in a fixed order.
Bytes: 3 an element in both directions, times the dtype's size. FLOPs: 2 and 3. Intensity: at most half a FLOP/byte in
bf16; the roof is memory bandwidth. Source: the formulas.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import as_rows, check, empty_f32, sum_parts, warps

WIDEST = 1024  # columns at a time
BLOCK_ROWS = 4
ITEM_BLOCKS = 256  # in all, at most: runs of rows, in the backward pass


@triton.jit
def gate_residual_kernel(
    x, gate, branch, y, rows, n_cols, gate_stride, blocks, BLOCK_ROWS: tl.constexpr, BLOCK_SIZE: tl.constexpr
):
    item = tl.program_id(0).to(tl.int64) // blocks
    column = tl.program_id(1).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    row = (tl.program_id(0).to(tl.int64) % blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = (row < rows)[:, None] & (column < n_cols)[None, :]
    at = (item * rows + row)[:, None] * n_cols + column[None, :]
    g = tl.load(gate + item * gate_stride + column, mask=column < n_cols, other=0.0).to(tl.float32)
    h = tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + g[None, :] * h, mask=inside)


@triton.jit
def gate_residual_backward_kernel(
    dy, gate, branch, dgate_parts, dbranch, rows, n_cols, items, gate_stride, rows_of_block, blocks,
    BLOCK_ROWS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64) // blocks
    block = tl.program_id(0).to(tl.int64) % blocks
    column = tl.program_id(1).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    exists = column < n_cols
    g = tl.load(gate + item * gate_stride + column, mask=exists, other=0.0).to(tl.float32)
    dgate = tl.zeros([BLOCK_SIZE], tl.float32)
    begin = item * rows + block * rows_of_block
    end = tl.minimum(begin + rows_of_block, (item + 1) * rows)
    for first in range(begin, end, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        inside = (row < end)[:, None] & exists[None, :]
        at = row[:, None] * n_cols + column[None, :]
        d = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dbranch + at, d * g[None, :], mask=inside)
        dgate += tl.sum(d * tl.load(branch + at, mask=inside, other=0.0).to(tl.float32), 0)
    tl.store(dgate_parts + (block * items + item) * n_cols + column, dgate, mask=exists)


def columns(n_cols: int) -> dict[str, int]:
    size = min(triton.next_power_of_2(max(n_cols, 1)), WIDEST)
    return {"BLOCK_ROWS": BLOCK_ROWS, "BLOCK_SIZE": size, "num_warps": warps(BLOCK_ROWS * size)}


def gate_residual(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    fits = branch.shape == x.shape and gate.shape == (x.shape[0], x.shape[-1])
    check(fits, "gate_residual", "x and branch (items, …, dim) need a gate (items, dim)")
    check(x.dtype == gate.dtype == branch.dtype, "gate_residual", "x, gate and branch must have one dtype")
    y = x.new_empty(x.shape)
    if y.numel():
        x, branch, (gates, gate_stride) = x.contiguous(), branch.contiguous(), as_rows(gate)
        items, rows, n_cols = x.shape[0], x.shape[1:-1].numel(), x.shape[-1]
        shape, blocks = columns(n_cols), triton.cdiv(rows, BLOCK_ROWS)
        gate_residual_kernel[items * blocks, triton.cdiv(n_cols, shape["BLOCK_SIZE"])](
            x, gates, branch, y, rows, n_cols, gate_stride, blocks, **shape
        )
    return y


def gate_residual_backward(dy: Tensor, gate: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dbranch = gate.new_empty(gate.shape), branch.new_empty(branch.shape)
    if not branch.numel():
        return dgate.zero_(), dbranch
    dy, branch, (gates, gate_stride) = dy.contiguous(), branch.contiguous(), as_rows(gate)
    items, rows, n_cols = branch.shape[0], branch.shape[1:-1].numel(), branch.shape[-1]
    rows_of_block = max(triton.cdiv(rows, max(ITEM_BLOCKS // items, 1)), BLOCK_ROWS)
    blocks = triton.cdiv(rows, rows_of_block)
    parts = empty_f32(branch, blocks, items * n_cols)
    shape = columns(n_cols)
    gate_residual_backward_kernel[items * blocks, triton.cdiv(n_cols, shape["BLOCK_SIZE"])](
        dy, gates, branch, parts, dbranch, rows, n_cols, items, gate_stride, rows_of_block, blocks, **shape
    )
    sum_parts(parts, dgate.view(-1))
    return dgate, dbranch


OPERATORS = {"gate_residual": gate_residual, "gate_residual_backward": gate_residual_backward}


def typical(dtype: torch.dtype):
    x = torch.empty(8, 256, 1152, dtype=dtype)
    gate = torch.empty(8, 6 * 1152, dtype=dtype).chunk(6, -1)[2]
    yield "gate_residual", (x, gate, x)
    yield "gate_residual_backward", (x, gate, x)
