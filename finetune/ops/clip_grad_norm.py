"""Clipping by the global norm (Pascanu et al. 2013, arXiv:1211.5063), in place:

    norm = sqrt(Σ over all gradients of g²)          g ← g · min(1, max_norm / (norm + 1e-6))

As torch.nn.utils.clip_grad_norm_: a norm that is not finite is returned as it is and the rule applied (an infinite
norm makes finite gradients 0, a NaN norm makes all NaN), so look at the norm before the optimizer steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from finetune.ops._library import Library
from finetune.ops._lists import gradients_of, norm_bound
from finetune.ops._op import Native, Op, Sample
from finetune.ops.adamw import SMOLLM2_BLOCK
from finetune.ops.global_norm import supports as takes


def reference(grads: Sequence[Tensor], max_norm: float) -> Tensor:
    with torch.no_grad():
        if not grads:
            return torch.zeros(())
        wide = [torch.promote_types(g.dtype, torch.float32) for g in grads]
        norm = torch.stack([g.to(t).norm() for g, t in zip(grads, wide, strict=True)]).norm()
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for g, t in zip(grads, wide, strict=True):
            g.copy_(g.to(t) * scale)
        return norm


def overload(grads: Sequence[Tensor], max_norm: float):
    return "clip_grad_norm_", (list(grads), max_norm)


@torch.no_grad()
def native(operators, grads: Sequence[Tensor], max_norm: float) -> Tensor:
    if not grads:
        return torch.zeros(())
    norm = operators.clip_grad_norm_(list(grads), max_norm)
    torch.autograd.graph.increment_version(grads)
    return norm


def supports(backend: str, grads: Sequence[Tensor], max_norm: float) -> str | None:
    if reason := takes(backend, grads):
        return reason
    if not all(g.is_contiguous() for g in grads):
        return "it takes contiguous gradients"
    return None


def register(library: Library) -> None:

    @library.fake("clip_grad_norm_")
    def _(grads: list[Tensor], max_norm: float) -> Tensor:
        return grads[0].new_empty((), dtype=torch.float32)


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


op = Op("clip_grad_norm", reference, Native(native, overload, supports, register), samples)


def clip_grad_norm_(grads: Tensor | Iterable[Tensor], max_norm: float, *, backend: str | None = None) -> Tensor:
    """Scales contiguous gradients in place, each of a dtype of its own; returns their L2 norm before that, a 0-d
    float32 tensor where they live (on a GPU the host never waits).

    grads: gradients, or, as for torch.nn.utils.clip_grad_norm_, parameters, whose `.grad` is scaled where they have
    one; a mixture raises ValueError. max_norm: 0 or more; infinity only measures. The same bits for any number of
    threads.
    """
    return op(gradients_of("clip_grad_norm_", grads), norm_bound("clip_grad_norm_", max_norm), backend=backend)
