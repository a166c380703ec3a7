"""Clipping by the global norm (Pascanu et al. 2013, arXiv:1211.5063), in place:

    norm = sqrt(Σ over all gradients of g²)          g ← g · min(1, max_norm / (norm + 1e-6))

As torch.nn.utils.clip_grad_norm_: a norm that is not finite is returned as it is and the rule applied (an infinite
norm makes finite gradients 0, a NaN norm makes all NaN), so look at the norm before the optimizer steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from finetune.ops._lists import gradients_of, norm_bound
from finetune.ops._op import op
from finetune.ops._samples import SMOLLM2_BLOCK, Sample
from finetune.ops.global_norm import global_norm, takes_floats


@op
@torch.no_grad()
def clip_grad_norm_(grads: Tensor | Iterable[Tensor], max_norm: float, *, backend: str | None = None) -> Tensor:
    """Scales contiguous gradients in place, whatever the dtype of each; returns their L2 norm before that, a 0-d
    float32 tensor where they live (on a GPU the host never waits).

    grads: gradients, or, as for torch.nn.utils.clip_grad_norm_, parameters, whose `.grad` is scaled where they have
    one; a mixture raises ValueError. max_norm: 0 or more; infinity only measures. The same bits for any number of
    threads.
    """
    grads = list(grads)
    norm = global_norm.reference(grads)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for g in grads:
        g.copy_(g.to(torch.promote_types(g.dtype, torch.float32)) * scale)
    return norm


@clip_grad_norm_.check
def _(grads: Tensor | Iterable[Tensor], max_norm: float) -> dict[str, list[Tensor] | float]:
    return {"grads": gradients_of("clip_grad_norm_", grads), "max_norm": norm_bound("clip_grad_norm_", max_norm)}


@clip_grad_norm_.supports
def _(backend: str, grads: list[Tensor], **_) -> str | None:
    if reason := takes_floats(backend, grads):
        return reason
    return None if all(g.is_contiguous() for g in grads) else "it takes contiguous gradients"


@clip_grad_norm_.fake()
def _(grads: list[Tensor], **_) -> Tensor:
    return grads[0].new_empty((), dtype=torch.float32)


@clip_grad_norm_.sampled
def samples() -> Iterator[Sample]:
    g = torch.Generator().manual_seed(0)

    def make(name: str, shapes, max_norm: float, scale: float = 1.0, bench: bool = False) -> Sample:
        def args():
            return [torch.randn(*shape, generator=g, dtype=torch.float64) * scale for shape in shapes], max_norm

        n = sum(math.prod(shape) for shape in shapes)
        return Sample(name, args if bench else args(), mutates=(0,), bench=bench, flops=3.0 * n, bytes=12.0 * n)

    yield make("clipped", [(3, 4), (5,), (2, 3, 5)], 1.0)
    yield make("not clipped", [(3, 4), (5,)], 1e3)
    yield make("pieces", [(3, 32768), (40000,), (17,)], 1.0)
    yield make("large", [(1031,)], 1.0, scale=1e4)
    yield make("zero", [(9,), (2, 2)], 1.0, scale=0.0)
    yield make("empty", [(0, 3), (7,)], 0.1)
    yield make("many", [(i % 5,) for i in range(333)], 2.0)  # more than one launch on a GPU
    yield from make("aligned", [(64,), (4, 32)], 1.0).at_odd_addresses()
    yield make("bench", SMOLLM2_BLOCK * 16, 1.0, bench=True)
