"""Gradients of a scaled loss, unscaled in place, checked and measured in one pass over many tensors:

    found_inf = 1 if any g is infinite or NaN, else 0       g ← g · inverse_scale       square = Σ (g · inverse_scale)²

Each block writes its flag and its sum of squares; one program joins them in a fixed order. The scale and both results
stay on the device. Layout: tables of addresses (_tensors.py), a launch for each dtype.
Bytes: 2 an element (read, write) times the dtype's size. FLOPs: 4 an element. Intensity: 1 FLOP/byte in bf16; the roof
is memory bandwidth. Source: Micikevicius et al. 2018, arXiv:1710.03740; torch.amp.GradScaler.unscale_.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import check, empty_f32
from ._tensors import TYPES, block_of, by_dtype, load, pointer, pointers, store


@triton.jit
def unscale(row, at, size, by, flags, squares, G: tl.constexpr, WHOLE: tl.constexpr):
    grad = pointer(row, 0, G, WHOLE)
    g = load(grad, at, size, WHOLE).to(tl.float32)
    finite = tl.abs(g) < float("inf")  # false for NaN too
    unscaled = g * by
    store(grad, unscaled, at, size, WHOLE)
    tl.store(flags + tl.program_id(0), tl.max(tl.where(finite, 0.0, 1.0), 0))
    tl.store(squares + tl.program_id(0), tl.sum(tl.where(at < size, unscaled * unscaled, 0.0), 0))


@triton.jit
def unscale_kernel(
    table, owner, inverse_scale, flags, squares, G: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    row, start, size, whole = block_of(table, owner, WIDTH, BLOCK)
    at, by = start + tl.arange(0, BLOCK), tl.load(inverse_scale)
    if whole:
        unscale(row, at, size, by, flags, squares, G, True)
    else:
        unscale(row, at, size, by, flags, squares, G, False)


@triton.jit
def join_kernel(flags, squares, count, found_inf, square, BLOCK: tl.constexpr):
    sums, found = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        sums += tl.load(squares + at, mask=at < count, other=0.0)
        found = tl.maximum(found, tl.load(flags + at, mask=at < count, other=0.0))
    tl.store(found_inf, tl.max(found, 0))
    tl.store(square, tl.sum(sums, 0))


def unscale_check_finite_(grads: list[Tensor], inverse_scale: Tensor) -> tuple[Tensor, Tensor]:
    op = "unscale_check_finite_"
    check(len(grads) > 0, op, "expected a gradient")
    check(inverse_scale.numel() == 1 and inverse_scale.dtype == torch.float32, op, "inverse_scale must be one float32")
    tables = [(TYPES[lists[0][0].dtype], *pointers(*lists)) for lists in by_dtype(grads)]
    count, start = sum(len(owner) for _, _, owner, _ in tables), 0
    flags, squares = empty_f32(grads[0], count), empty_f32(grads[0], count)
    found_inf, square = empty_f32(grads[0]), empty_f32(grads[0])
    for dtype, table, owner, constants in tables:
        unscale_kernel[(len(owner),)](
            table, owner, inverse_scale, flags[start:], squares[start:], G=dtype, **constants, num_warps=8
        )
        start += len(owner)
    join_kernel[(1,)](flags, squares, count, found_inf, square, BLOCK=1024, num_warps=8)
    return found_inf, square


OPERATORS = {"unscale_check_finite_": unscale_check_finite_}


def typical(dtype: torch.dtype):
    grads = [torch.empty(3072, 576, dtype=dtype), torch.empty(576, dtype=dtype)]
    yield "unscale_check_finite_", (grads, torch.ones(()))
