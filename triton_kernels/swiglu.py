"""SwiGLU (Shazeer 2020, arXiv:2002.05202):  y = silu(gate) · up,  silu(g) = g · σ(g),  σ(g) = 1 / (1 + exp(−g))

    dgate = dy · up · σ(gate) · (1 + gate · (1 − σ(gate)))          dup = dy · silu(gate)

Layout: (rows, C), each tensor with its own stride between rows, so that halves of a fused projection need no copy. A
program takes a BLOCK_ROWS × BLOCK_SIZE tile. σ is computed again in the backward pass rather than kept.
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
def at_tile(n_rows, n_cols, BLOCK_ROWS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Row and column numbers of this program's tile (column tiles fastest), and which of them exist."""
    tiles = tl.cdiv(n_cols, BLOCK_SIZE)
    program = tl.program_id(0).to(tl.int64)
    row = (program // tiles) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (program % tiles) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    return row[:, None], column[None, :], (row < n_rows)[:, None] & (column < n_cols)[None, :]


@triton.jit
def swiglu_kernel(
    gate, up, y, n_rows, n_cols, gate_stride, up_stride, BLOCK_ROWS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    row, column, inside = at_tile(n_rows, n_cols, BLOCK_ROWS, BLOCK_SIZE)
    g = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * n_cols + column, g * tl.sigmoid(g) * u, mask=inside)


@triton.jit
def swiglu_backward_kernel(
    dy, gate, up, dgate, dup, n_rows, n_cols, dy_stride, gate_stride, up_stride,
    BLOCK_ROWS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    row, column, inside = at_tile(n_rows, n_cols, BLOCK_ROWS, BLOCK_SIZE)
    d = tl.load(dy + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    sigma = tl.sigmoid(g)
    tl.store(dgate + row * n_cols + column, d * u * sigma * (1 + g * (1 - sigma)), mask=inside)
    tl.store(dup + row * n_cols + column, d * g * sigma, mask=inside)


def over(t: Tensor) -> tuple[int, int, tuple[int], dict[str, int]]:
    """Rows, columns, grid and tile for tensors of this shape."""
    n_cols = t.shape[-1]
    n_rows = t.numel() // max(n_cols, 1)
    shape = tile(n_rows, n_cols)
    return n_rows, n_cols, (triton.cdiv(n_rows, shape["BLOCK_ROWS"]) * triton.cdiv(n_cols, shape["BLOCK_SIZE"]),), shape


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    check(gate.shape == up.shape and gate.dtype == up.dtype, "swiglu", "gate and up must have one shape and dtype")
    y = gate.new_empty(gate.shape)
    if y.numel():
        (g, g_stride), (u, u_stride) = as_rows(gate), as_rows(up)
        n_rows, n_cols, grid, shape = over(gate)
        swiglu_kernel[grid](g, u, y, n_rows, n_cols, g_stride, u_stride, **shape)
    return y


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = gate.new_empty(gate.shape), up.new_empty(up.shape)
    if dgate.numel():
        (d, d_stride), (g, g_stride), (u, u_stride) = as_rows(dy), as_rows(gate), as_rows(up)
        n_rows, n_cols, grid, shape = over(gate)
        swiglu_backward_kernel[grid](d, g, u, dgate, dup, n_rows, n_cols, d_stride, g_stride, u_stride, **shape)
    return dgate, dup


OPERATORS = {"swiglu": swiglu, "swiglu_backward": swiglu_backward}


def typical(dtype: torch.dtype):
    fused = torch.empty(512, 2 * 5632, dtype=dtype)
    gate, up = fused.chunk(2, -1)
    yield "swiglu", (gate, up)
    yield "swiglu_backward", (gate.contiguous(), gate, up)
