"""Clipping gradients by their global norm.

gradients: a list of tensors of any shapes and floating-point types, with None where there is no gradient; max_norm > 0
→ (clipped, norm). norm is the root of the sum of squares of all numbers of all tensors, a scalar tensor computed in
fp32 (an fp16 sum would overflow). If it is larger than max_norm, every gradient is multiplied by max_norm / norm;
otherwise they stay exactly as they are. Types are kept, and None stays None. If the norm is not finite (a gradient has
inf or NaN), all clipped gradients are zeros, so that the step cannot spoil the weights. Without any gradient the norm
is 0. The gradients given are not changed.

    >>> clip_global_norm([torch.tensor([3.0]), None, torch.tensor([[4.0]])], max_norm=1.0)
    ([tensor([0.6000]), None, tensor([[0.8000]])], tensor(5.))
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def clip_global_norm(gradients: Sequence[Tensor | None], max_norm: float) -> tuple[list[Tensor | None], Tensor]:
    squares = [g.float().square().sum() for g in gradients if g is not None]
    norm = torch.stack(squares).sum().sqrt() if squares else torch.zeros(())
    if not norm.isfinite():
        return [None if g is None else torch.zeros_like(g) for g in gradients], norm
    factor = min(1.0, max_norm / float(norm)) if norm > 0 else 1.0
    return [None if g is None else g * factor for g in gradients], norm
