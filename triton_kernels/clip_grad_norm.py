"""Clipping by the global norm (Pascanu et al. 2013, arXiv:1211.5063), in place, over many tensors:

    norm = sqrt(Σ over all gradients of g²)          g ← g · min(1, max_norm / (norm + 1e-6))

Three steps: each block's sum of squares; their sum, the norm and the scale, in one program and in a fixed order; the
scaling, which leaves where the scale is 1. The scale stays on the device: the host never waits. A NaN norm makes all
gradients NaN, an infinite one (fp32 squares end at 3e38) finite gradients 0, as in torch.
Layout: tables of addresses (_tensors.py), a launch for each dtype.
Bytes: 3 sweeps (read; read, write) times the dtype's size, 1 where nothing is clipped. FLOPs: 3 an element. Intensity:
0.5 FLOP/byte in bf16; the roof is memory bandwidth.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import empty_f32
from ._tensors import TYPES, block_of, by_dtype, load, pointer, pointers, store


@triton.jit
def sum_squares(row, at, size, G: tl.constexpr, WHOLE: tl.constexpr):
    g = load(pointer(row, 0, G, WHOLE), at, size, WHOLE).to(tl.float32)
    return tl.sum(g * g, 0)


@triton.jit
def squares_kernel(table, owner, squares, G: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row, start, size, whole = block_of(table, owner, WIDTH, BLOCK)
    at = start + tl.arange(0, BLOCK)
    if whole:
        tl.store(squares + tl.program_id(0), sum_squares(row, at, size, G, True))
    else:
        tl.store(squares + tl.program_id(0), sum_squares(row, at, size, G, False))


@triton.jit
def norm_kernel(squares, count, out, max_norm, BLOCK: tl.constexpr):
    """out (2,): the norm and the scale."""
    sums = tl.zeros([BLOCK], tl.float32)
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        sums += tl.load(squares + at, mask=at < count, other=0.0)
    norm = tl.sqrt_rn(tl.sum(sums, 0))
    tl.store(out, norm)
    tl.store(out + 1, max_norm / (norm + 1e-6))


@triton.jit
def multiply(row, at, size, by, G: tl.constexpr, WHOLE: tl.constexpr):
    grad = pointer(row, 0, G, WHOLE)
    store(grad, load(grad, at, size, WHOLE).to(tl.float32) * by, at, size, WHOLE)


@triton.jit
def scale_kernel(table, owner, scale, G: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    by = tl.load(scale + 1)
    if (by < 1) | (by != by):
        row, start, size, whole = block_of(table, owner, WIDTH, BLOCK)
        at = start + tl.arange(0, BLOCK)
        if whole:
            multiply(row, at, size, by, G, True)
        else:
            multiply(row, at, size, by, G, False)


def squares_of(tensors: list[Tensor]) -> tuple[Tensor, list]:
    """Each block's sum of squares, and the launches' tables by dtype."""
    tables = [(TYPES[lists[0][0].dtype], *pointers(*lists)) for lists in by_dtype(tensors)]
    squares, start = empty_f32(tensors[0], sum(len(owner) for _, _, owner, _ in tables)), 0
    for dtype, table, owner, constants in tables:
        squares_kernel[(len(owner),)](table, owner, squares[start:], G=dtype, **constants, num_warps=8)
        start += len(owner)
    return squares, tables


def norm_of(squares: Tensor, max_norm: float) -> Tensor:
    out = empty_f32(squares, 2)
    norm_kernel[(1,)](squares, len(squares), out, max_norm, BLOCK=1024, num_warps=8)
    return out


def clip_grad_norm_(grads: list[Tensor], max_norm: float) -> Tensor:
    squares, tables = squares_of(grads)
    out = norm_of(squares, max_norm)
    for dtype, table, owner, constants in tables:
        scale_kernel[(len(owner),)](table, owner, out, G=dtype, **constants, num_warps=8)
    return out[0].clone()


OPERATORS = {"clip_grad_norm_": clip_grad_norm_}


def typical(dtype: torch.dtype):
    yield "clip_grad_norm_", ([torch.empty(3072, 576, dtype=dtype), torch.empty(576, dtype=dtype)], 1.0)
