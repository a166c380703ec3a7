"""AdamW with block-wise 8-bit moments (Dettmers et al. 2022, arXiv:2110.02861), many tensors in one launch, in place.

    m = map[code] · absmax;  the step of adamw.py;  absmax ← max |m|;  code ← number of middles < m / absmax

Layout: a table of addresses (_tensors.py); a program takes BLOCK elements of one tensor, as rows of the 256 that share
an absmax. Maps and middles (4 KB) are looked up in the first-level cache: one gather to widen a code, eight (a binary
search) to find one. Every product and quotient rounds separately (enable_fp_fusion=False, div_rn, sqrt_rn): the bits of
the moments are those of the reference.
Bytes: 16 a parameter in fp32 (read p, g and two codes, write p and two codes) and 1/16 for the maxima, against 28 with
fp32 moments. FLOPs: about 60, 18 of them look-ups. Intensity: 4 operations a byte; the roof is memory bandwidth.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import check
from ._tensors import TYPES, block_of, by_dtype, load, pointer, pointers, store
from .adamw import numbers

SHARING = 256  # elements with one absmax


@triton.jit
def widen(codes, maxima, maps, at, row, size, WHOLE: tl.constexpr):
    absmax = load(maxima, row, tl.cdiv(size, 256), WHOLE)
    return tl.load(maps + load(codes, at, size, WHOLE).to(tl.int32)) * absmax[:, None]


@triton.jit
def quantize(x, codes, maxima, middles, at, row, size, WHOLE: tl.constexpr):
    """Stores the codes and absmax of x (rows, 256), which is 0 outside."""
    absmax = tl.max(tl.abs(x), 1)
    y = tl.where((absmax > 0)[:, None], tl.div_rn(x, tl.where(absmax > 0, absmax, 1.0)[:, None]), 0.0)
    code = tl.zeros(x.shape, tl.int32)
    for bit in tl.static_range(8):
        step = 128 >> bit
        code += tl.where(tl.load(middles + code + (step - 1)) < y, step, 0)
    store(codes, code.to(tl.uint8), at, size, WHOLE)
    store(maxima, absmax, row, tl.cdiv(size, 256), WHOLE)


@triton.jit
def update(
    entry, at, row, size, maps, middles, scale,
    decay, beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, rsqrt_bc2, eps,
    P: tl.constexpr, G: tl.constexpr, MASTERS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    param, grad = pointer(entry, 0, P, WHOLE), pointer(entry, 1, G, WHOLE)
    first, second = pointer(entry, 2, tl.uint8, WHOLE), pointer(entry, 3, tl.uint8, WHOLE)
    first_max, second_max = pointer(entry, 5, tl.float32, WHOLE), pointer(entry, 6, tl.float32, WHOLE)
    g = load(grad, at, size, WHOLE).to(tl.float32) * scale
    m = widen(first, first_max, maps, at, row, size, WHOLE) * beta1 + g * one_minus_beta1
    v = widen(second, second_max, maps + 256, at, row, size, WHOLE) * beta2 + g * g * one_minus_beta2
    m, v = tl.where(at < size, m, 0.0), tl.where(at < size, v, 0.0)
    if MASTERS:
        master = pointer(entry, 4, tl.float32, WHOLE)
        wide = load(master, at, size, WHOLE)
    else:
        wide = load(param, at, size, WHOLE).to(tl.float32)
    wide = wide * decay - tl.div_rn(step_size * m, tl.sqrt_rn(v) * rsqrt_bc2 + eps)
    if MASTERS:
        store(master, wide, at, size, WHOLE)
    store(param, wide, at, size, WHOLE)
    quantize(m, first, first_max, middles, at, row, size, WHOLE)
    quantize(v, second, second_max, middles + 256, at, row, size, WHOLE)


@triton.jit
def adamw8bit_kernel(
    table, owner, maps, middles, scale, scale_number,
    decay, beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, rsqrt_bc2, eps,
    P: tl.constexpr, G: tl.constexpr, MASTERS: tl.constexpr, SCALE: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    entry, start, size, whole = block_of(table, owner, WIDTH, BLOCK)
    row = start // 256 + tl.arange(0, BLOCK // 256)
    at = row[:, None] * 256 + tl.arange(0, 256)[None, :]
    if SCALE:
        scale_number *= tl.load(scale)
    if whole:
        update(
            entry, at, row, size, maps, middles, scale_number, decay, beta1, one_minus_beta1, beta2, one_minus_beta2,
            step_size, rsqrt_bc2, eps, P, G, MASTERS, True,
        )  # fmt: skip
    else:
        update(
            entry, at, row, size, maps, middles, scale_number, decay, beta1, one_minus_beta1, beta2, one_minus_beta2,
            step_size, rsqrt_bc2, eps, P, G, MASTERS, False,
        )  # fmt: skip


def adamw8bit_(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_maxs: list[Tensor],
    exp_avg_sqs: list[Tensor], exp_avg_sq_maxs: list[Tensor], masters: list[Tensor], maps: Tensor, middles: Tensor,
    grad_scale: float, scale_tensor: Tensor | None,
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int,
) -> None:  # fmt: skip
    how = numbers(lr, beta1, beta2, eps, weight_decay, step)
    for maxima in (exp_avg_maxs, exp_avg_sq_maxs):
        enough = [t.numel() for t in maxima] == [triton.cdiv(p.numel(), SHARING) for p in params]
        check(enough, "adamw8bit_", "there must be a float32 for every 256 elements")
    grads = [g.contiguous() for g in grads]
    for lists in by_dtype(params, grads, exp_avgs, exp_avg_sqs, masters, exp_avg_maxs, exp_avg_sq_maxs):
        table, owner, constants = pointers(*lists[:5], others=lists[5:], block=512)
        scale = owner if scale_tensor is None else scale_tensor.to(owner.device)
        adamw8bit_kernel[(len(owner),)](
            table, owner, maps, middles, scale, grad_scale, *how, P=TYPES[lists[0][0].dtype],
            G=TYPES[lists[1][0].dtype], MASTERS=bool(masters), SCALE=scale_tensor is not None, **constants,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


OPERATORS = {"adamw8bit_": adamw8bit_}


def typical(dtype: torch.dtype):
    def like(t: torch.dtype, shapes=((3072, 576), (576,))):
        return [torch.empty(shape, dtype=t) for shape in shapes]

    def states():
        return (like(torch.uint8), like(torch.float32, (6912, 3))) * 2

    hyper, table = (1e-3, 0.9, 0.95, 1e-8, 0.1, 7), torch.empty(2, 256)
    none: list[Tensor] = []
    for masters in (none, like(torch.float32)):
        yield "adamw8bit_", (like(dtype), like(dtype), *states(), masters, table, table, 1.0, None, *hyper)
