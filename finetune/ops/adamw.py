"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2): decoupled weight decay, bias correction, in place.

    m ← β1 m + (1 − β1) g          v ← β2 v + (1 − β2) g²          (g already multiplied by grad_scale)
    p ← (1 − lr λ) p − lr · m / (1 − β1^step) / (sqrt(v / (1 − β2^step)) + ε)

With masters (fp32 copies of bf16 parameters) the master is updated and the parameter is its rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from finetune.ops._backends import native_float, wrong_device
from finetune.ops._lists import optimizer_lists
from finetune.ops._op import op
from finetune.ops._samples import SMOLLM2_BLOCK, Sample


@op
@torch.no_grad()
def adamw_(
    params: Iterable[Tensor],
    grads: Iterable[Tensor],
    exp_avgs: Iterable[Tensor],
    exp_avg_sqs: Iterable[Tensor],
    masters: Iterable[Tensor] | None = None,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float | Tensor = 1.0,
    backend: str | None = None,
) -> None:
    """One step over lists of tensors of equal shapes, in place. `step` counts from 1.

    params: float32, bfloat16 or (CUDA) float16, all of one dtype; grads: any of these (not changed); exp_avgs,
    exp_avg_sqs and masters: float32. Without masters a 16-bit parameter is rounded every step and loses small updates.
    grad_scale: a number or a 0-d float32 tensor that multiplies the gradients, for clipping without another sweep;
    a tensor on the GPU is not waited for.
    """
    for p, g, m, v, target in zip(params, grads, exp_avgs, exp_avg_sqs, masters or params, strict=True):
        wide = torch.promote_types(target.dtype, torch.float32)
        g = g.to(wide) * grad_scale
        m.copy_(m.to(wide) * beta1 + g * (1 - beta1))
        v.copy_(v.to(wide) * beta2 + g * g * (1 - beta2))
        size = m.to(wide) / (1 - beta1**step) / ((v.to(wide) / (1 - beta2**step)).sqrt() + eps)
        target.copy_(target.to(wide) * (1 - lr * weight_decay) - lr * size)
        p.copy_(target)


@adamw_.check
def _(params, grads, exp_avgs, exp_avg_sqs, masters, **_):
    return optimizer_lists("adamw_", params, masters, grads=grads, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs)


@adamw_.operands
def operands(masters: list[Tensor] | None, grad_scale: float | Tensor, **_) -> dict[str, object]:
    number, tensor = (1.0, grad_scale) if isinstance(grad_scale, Tensor) else (grad_scale, None)
    return {"masters": masters or [], "grad_scale": number, "scale_tensor": tensor}


def takes(backend: str, params, grads, states, grad_scale) -> str | None:
    """`supports` of an optimizer; states: moments (or their maxima) and masters."""
    if reason := native_float(backend, *params):
        return reason
    for dtype in {g.dtype for g in grads}:  # not always that of the parameters
        if reason := native_float(backend, *(g for g in grads if g.dtype == dtype)):
            return f"of the gradients: {reason}"
    if any(t.dtype != torch.float32 for t in states):
        return "it keeps moments and masters in float32"
    if isinstance(grad_scale, Tensor) and grad_scale.dtype != torch.float32:
        return "it takes a float32 grad_scale"
    if reason := wrong_device(backend, *states):
        return reason
    if not all(t.is_contiguous() for t in (*params, *states)):
        return "it takes contiguous parameters, moments and masters"
    return None


@adamw_.supports
def _(backend: str, params, grads, exp_avgs, exp_avg_sqs, masters, grad_scale, **_) -> str | None:
    return takes(backend, params, grads, [*exp_avgs, *exp_avg_sqs, *(masters or [])], grad_scale)


@adamw_.sampled
def samples() -> Iterator[Sample]:
    g = torch.Generator().manual_seed(0)

    def make(name, shapes, masters=False, moments=1.0, scale=1.0, bench=False, **kwargs) -> Sample:
        def draw(dtype=torch.float64):
            return [torch.randn(*shape, generator=g, dtype=dtype) for shape in shapes]

        def args():  # moments and masters are float32 at any dtype of the parameters
            first = [t * moments for t in draw(torch.float32)]
            second = [t.square() * moments for t in draw(torch.float32)]
            copies = draw(torch.float32) if masters else None
            return draw(), [t * scale for t in draw()], first, second, copies

        n = sum(math.prod(shape) for shape in shapes)
        hyper = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "step": 7} | kwargs
        mutates = (0, 2, 3, 4) if masters else (0, 2, 3)
        given = args if bench else args()
        return Sample(name, given, hyper, mutates=mutates, bench=bench, flops=15.0 * n, bytes=28.0 * n)

    yield make("small", [(3, 4), (5,)])
    yield make("first step", [(37,), (1,), (2, 3, 5)], moments=0.0, step=1)
    yield make("masters", [(64, 33), (17,)], masters=True)
    yield make("clipped", [(33, 5), (7,)], masters=True, grad_scale=0.3)
    yield make("clipped by a tensor", [(33, 5)], grad_scale=torch.tensor(0.3))
    yield make("large gradients, no decay", [(41,)], scale=1e4, weight_decay=0.0)
    yield make("pieces", [(3, 32768), (40000,)])
    yield make("many", [(3,)] * 70, masters=True)
    yield make("empty", [(0, 4), (3,)])
    yield from make("aligned", [(64,), (4, 32)], masters=True, grad_scale=torch.tensor(0.3)).at_odd_addresses()
    yield make("bench", SMOLLM2_BLOCK * 8, bench=True)
    yield make("bench masters", SMOLLM2_BLOCK * 8, masters=True, bench=True)
