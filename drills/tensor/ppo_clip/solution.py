"""The clipped loss of PPO over the tokens of a batch.

logp, old_logp, advantages (b, t) floating point, mask (b, t) bool, low and high floats → (loss, clipped), two scalars.
ratio = exp(logp − old_logp). loss = −mean over the tokens in the mask of
min(ratio · A, clip(ratio, 1 − low, 1 + high) · A). Its gradient goes into logp only: old_logp and advantages are
constants, whether or not they require a gradient.
clipped: the share of the tokens in the mask where the clip holds the loss back, that is A > 0 and ratio > 1 + high, or
A < 0 and ratio < 1 − low.
What lies outside the mask does not matter, be it −inf or NaN, and gets gradient 0. With an empty mask both are 0.

    >>> logp, old, a = torch.tensor([[0.5, 0.1]]), torch.zeros(1, 2), torch.tensor([[1.0, 2.0]])
    >>> ppo_loss(logp, old, a, torch.tensor([[True, True]]), 0.2, 0.2)
    (tensor(-1.7052), tensor(0.5000))
"""

import torch
from torch import Tensor


def ppo_loss(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    count = max(int(mask.sum()), 1)
    a = advantages.detach()[mask]
    ratio = (logp[mask] - old_logp.detach()[mask]).exp()
    loss = -torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a).sum() / count
    clipped = ((a > 0) & (ratio > 1 + high)) | ((a < 0) & (ratio < 1 - low))
    return loss, clipped.sum() / count
