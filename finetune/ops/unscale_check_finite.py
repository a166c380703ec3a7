"""Gradients of a scaled loss (Micikevicius et al. 2018, arXiv:1710.03740, section 3.2), unscaled in place, checked and
measured in one pass:

    found_inf = 1 if any g is infinite or NaN, else 0       g ← g · inverse_scale       square = Σ (g · inverse_scale)²

As torch.amp.GradScaler.unscale_, whose found_inf is made before the multiplication too. The squares are those of the
products in fp32, before they are rounded to the gradients' dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from finetune.ops._backends import wrong_device
from finetune.ops._lists import gradients_of
from finetune.ops._op import op
from finetune.ops._samples import SMOLLM2_BLOCK, Sample
from finetune.ops.global_norm import takes_floats


@op
@torch.no_grad()
def unscale_check_finite_(
    grads: Tensor | Iterable[Tensor], inverse_scale: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """grads of float32, bfloat16 or float16, multiplied in place by the 0-d float32 `inverse_scale` → found_inf and
    square, 0-d float32 on their device. Parameters in their place mean their `.grad`, as in ops.clip_grad_norm_.
    The same bits at every call; the host waits for nothing."""
    found_inf, square = torch.zeros((), device=inverse_scale.device), torch.zeros((), device=inverse_scale.device)
    for g in grads:
        wide = torch.promote_types(g.dtype, torch.float32)
        found_inf = torch.maximum(found_inf, (~g.isfinite()).any().float())
        unscaled = g.to(wide) * inverse_scale
        square = square + unscaled.square().sum()
        g.copy_(unscaled)
    return found_inf, square


@unscale_check_finite_.check
def _(grads: Tensor | Iterable[Tensor], **_) -> dict[str, list[Tensor]]:
    return {"grads": gradients_of("unscale_check_finite_", grads)}


@unscale_check_finite_.supports
def _(backend: str, grads: list[Tensor], inverse_scale: Tensor) -> str | None:
    if reason := takes_floats(backend, grads):
        return reason
    if inverse_scale.dtype != torch.float32:
        return "it takes a float32 inverse_scale"
    if not all(g.is_contiguous() for g in grads):
        return "it takes contiguous gradients"
    return wrong_device(backend, *grads, inverse_scale)


@unscale_check_finite_.results
def _(output: tuple[Tensor, Tensor], **_) -> tuple[Tensor, Tensor]:
    return output


@unscale_check_finite_.fake()
def _(grads: list[Tensor], **_) -> tuple[Tensor, ...]:
    return tuple(grads[0].new_empty((), dtype=torch.float32) for _ in range(2))


@unscale_check_finite_.sampled
def samples() -> Iterator[Sample]:
    g = torch.Generator().manual_seed(0)

    def make(name: str, shapes, scale: float = 16.0, bad: float | None = None, bench: bool = False) -> Sample:
        def args():
            grads = [torch.randn(*shape, generator=g, dtype=torch.float64) * scale for shape in shapes]
            if bad is not None:
                grads[-1].view(-1)[grads[-1].numel() // 2] = bad
            return grads, torch.tensor(1 / 16)

        n = sum(math.prod(shape) for shape in shapes)
        moved = {"flops": 5.0 * n, "bytes": 8.0 * n}
        return Sample(name, args if bench else args(), mutates=(0,), bench=bench, **moved)

    yield make("small", [(3, 4), (5,), (2, 3, 5)])
    yield make("odd", [(1031,), (1,)])
    yield make("pieces", [(3, 16384), (40003,), (17,)])
    yield make("many", [(3,)] * 170)
    yield make("large", [(101,)], scale=1e4)
    yield make("infinite", [(37,), (101,)], bad=math.inf)
    yield make("minus infinite", [(37,), (5,)], bad=-math.inf)
    yield make("not a number", [(3,), (20001,)], bad=math.nan)
    yield make("zero", [(9,), (2, 2)], scale=0.0)
    yield make("empty", [(0, 3), (7,)])
    yield from make("aligned", [(64,), (4, 32)]).at_odd_addresses()
    yield make("bench", SMOLLM2_BLOCK * 16, bench=True)
