"""SwiGLU (Shazeer 2020, arXiv:2002.05202):  y = silu(gate) · up,  silu(g) = g · σ(g),  σ(g) = 1 / (1 + exp(−g))

    dgate = dy · up · σ(gate) · (1 + gate · (1 − σ(gate)))          dup = dy · silu(gate)

Layout: (rows, C), each tensor with its own stride between rows, so that halves of a fused projection need no copy. A
program takes a ROWS × BLOCK tile. σ is computed again in the backward pass rather than kept.
Bytes: 3 a pair of elements forward (read 2, write 1), 5 backward (read 3, write 2), times the dtype's size.
FLOPs: about 6 forward and 13 backward, an exponential among them. Intensity: at most 1.5 FLOP/byte in bf16, far left of
any ridge: the roof is memory bandwidth. Source: the formulas; Liger-Kernel's swiglu.py has the same shape.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import as_rows, check, tile


@triton.jit
def at_tile(rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Row and column numbers of this program's tile (column tiles fastest), and which of them exist."""
    tiles = tl.cdiv(columns, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    row = (program // tiles) * ROWS + tl.arange(0, ROWS)
    column = (program % tiles) * BLOCK + tl.arange(0, BLOCK)
    return row[:, None], column[None, :], (row < rows)[:, None] & (column < columns)[None, :]


@triton.jit
def swiglu_kernel(gate, up, y, rows, columns, gate_stride, up_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row, column, inside = at_tile(rows, columns, ROWS, BLOCK)
    g = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * columns + column, g * tl.sigmoid(g) * u, mask=inside)


@triton.jit
def swiglu_backward_kernel(
    dy, gate, up, dgate, dup, rows, columns, dy_stride, gate_stride, up_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row, column, inside = at_tile(rows, columns, ROWS, BLOCK)
    d = tl.load(dy + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    sigma = tl.sigmoid(g)
    tl.store(dgate + row * columns + column, d * u * sigma * (1 + g * (1 - sigma)), mask=inside)
    tl.store(dup + row * columns + column, d * g * sigma, mask=inside)


def over(t: Tensor) -> tuple[int, int, tuple[int], dict[str, int]]:
    """Rows, columns, grid and tile for tensors of this shape."""
    columns = t.shape[-1]
    rows = t.numel() // max(columns, 1)
    shape = tile(rows, columns)
    return rows, columns, (triton.cdiv(rows, shape["ROWS"]) * triton.cdiv(columns, shape["BLOCK"]),), shape


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    check(gate.shape == up.shape and gate.dtype == up.dtype, "swiglu", "gate and up must have one shape and dtype")
    y = gate.new_empty(gate.shape)
    if y.numel():
        (g, g_stride), (u, u_stride) = as_rows(gate), as_rows(up)
        rows, columns, grid, shape = over(gate)
        swiglu_kernel[grid](g, u, y, rows, columns, g_stride, u_stride, **shape)
    return y


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = gate.new_empty(gate.shape), up.new_empty(up.shape)
    if dgate.numel():
        (d, d_stride), (g, g_stride), (u, u_stride) = as_rows(dy), as_rows(gate), as_rows(up)
        rows, columns, grid, shape = over(gate)
        swiglu_backward_kernel[grid](d, g, u, dgate, dup, rows, columns, d_stride, g_stride, u_stride, **shape)
    return dgate, dup


OPERATORS = {"swiglu": swiglu, "swiglu_backward": swiglu_backward}


def typical(dtype: torch.dtype):
    fused = torch.empty(512, 2 * 5632, dtype=dtype)
    gate, up = fused.chunk(2, -1)
    yield "swiglu", (gate, up)
    yield "swiglu_backward", (gate.contiguous(), gate, up)
