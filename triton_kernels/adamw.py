"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) over many tensors in one launch, in place.

    m ← β1 m + (1 − β1) g          v ← β2 v + (1 − β2) g²          (g already multiplied by the gradients' scale)
    p ← (1 − lr λ) p − lr · m / (1 − β1^step) / (sqrt(v / (1 − β2^step)) + ε)

Layout: a table of addresses (_tensors.py); a program takes BLOCK adjacent elements of one tensor. One launch for each
pair of dtypes of parameter and gradient. With masters (fp32) the master is updated and the parameter is its rounding.
The scale may be a number in device memory, so that clipping costs neither a sweep nor a wait.
Bytes: 28 a parameter in fp32 (read p g m v, write p m v); 30 in bf16 with masters (read g m v master, write p m v
master: 22 of them states). FLOPs: about 15. Intensity: 0.5 FLOP/byte; the roof is memory bandwidth.
Source: the formulas; the table replaces apex's multi_tensor_apply, which cuts lists into launches.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import check
from ._tensors import TYPES, block_of, by_dtype, load, pointer, pointers, store


@triton.jit
def update(
    row, at, size, scale, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, rsqrt_bc2, eps,
    P: tl.constexpr, G: tl.constexpr, MASTERS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    param, grad = pointer(row, 0, P, WHOLE), pointer(row, 1, G, WHOLE)
    first, second = pointer(row, 2, tl.float32, WHOLE), pointer(row, 3, tl.float32, WHOLE)
    g = load(grad, at, size, WHOLE).to(tl.float32) * scale
    m = load(first, at, size, WHOLE) * beta1 + g * one_minus_beta1
    v = load(second, at, size, WHOLE) * beta2 + g * g * one_minus_beta2
    store(first, m, at, size, WHOLE)
    store(second, v, at, size, WHOLE)
    if MASTERS:
        master = pointer(row, 4, tl.float32, WHOLE)
        wide = load(master, at, size, WHOLE)
    else:
        wide = load(param, at, size, WHOLE).to(tl.float32)
    wide = wide * decay - step_size * m / (tl.sqrt_rn(v) * rsqrt_bc2 + eps)
    if MASTERS:
        store(master, wide, at, size, WHOLE)
    store(param, wide, at, size, WHOLE)


@triton.jit
def adamw_kernel(
    table, owner, scale, scale_number, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, rsqrt_bc2, eps,
    P: tl.constexpr, G: tl.constexpr, MASTERS: tl.constexpr, SCALE: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, start, size, whole = block_of(table, owner, WIDTH, BLOCK)
    at = start + tl.arange(0, BLOCK)
    if SCALE:
        scale_number *= tl.load(scale)
    if whole:
        update(
            row, at, size, scale_number, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, rsqrt_bc2,
            eps, P, G, MASTERS, True,
        )  # fmt: skip
    else:
        update(
            row, at, size, scale_number, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, rsqrt_bc2,
            eps, P, G, MASTERS, False,
        )  # fmt: skip


def numbers(lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int) -> tuple[float, ...]:
    """decay, β1, 1 − β1, β2, 1 − β2, step size, 1 / sqrt(1 − β2^step), ε, computed in double precision."""
    check(step >= 1, "adamw_", "step counts from 1")
    size, root = lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step)
    return 1 - lr * weight_decay, beta1, 1 - beta1, beta2, 1 - beta2, size, root, eps


def adamw_(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    masters: list[Tensor], grad_scale: float, scale_tensor: Tensor | None,
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int,
) -> None:  # fmt: skip
    how = numbers(lr, beta1, beta2, eps, weight_decay, step)
    grads = [g.contiguous() for g in grads]
    for lists in by_dtype(params, grads, exp_avgs, exp_avg_sqs, masters):
        table, owner, constants = pointers(*lists, block=2048)  # 8 elements a thread: 4096 take 178 registers
        scale = owner if scale_tensor is None else scale_tensor.to(owner.device)
        adamw_kernel[(len(owner),)](
            table, owner, scale, grad_scale, *how, P=TYPES[lists[0][0].dtype], G=TYPES[lists[1][0].dtype],
            MASTERS=bool(masters), SCALE=scale_tensor is not None, **constants, num_warps=8,
        )  # fmt: skip


OPERATORS = {"adamw_": adamw_}


def typical(dtype: torch.dtype):
    def like(t: torch.dtype):
        return [torch.empty(shape, dtype=t) for shape in ((3072, 576), (576,))]

    fp32 = torch.float32
    hyper = (1e-3, 0.9, 0.95, 1e-8, 0.1, 7)
    yield "adamw_", (like(dtype), like(dtype), like(fp32), like(fp32), [], 1.0, None, *hyper)
    yield "adamw_", (like(dtype), like(dtype), like(fp32), like(fp32), like(fp32), 1.0, torch.ones(()), *hyper)
