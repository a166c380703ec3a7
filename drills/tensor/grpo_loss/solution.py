"""The loss of GRPO for a micro-batch, with a denominator that all micro-batches share.

logp, old_logp, reference_logp (b, t) floating point, advantages (b,), mask (b, t) bool; beta, low, high floats;
tokens: int, the number of tokens in the masks of the whole batch, of which these rows are a part → a scalar:
the sum over the tokens in the mask, divided by `tokens`, of
−min(ratio · A, clip(ratio, 1 − low, 1 + high) · A) + beta · (exp(d) − d − 1),
where ratio = exp(logp − old_logp), d = reference_logp − logp, and A is the advantage of the answer. So the losses of
all micro-batches sum to the loss of the batch. Its gradient goes into logp only. What lies outside the mask does not
matter, be it −inf or NaN, and gets gradient 0.

    >>> logp, old, a = torch.tensor([[0.5, 0.1]]), torch.zeros(1, 2), torch.tensor([1.0])
    >>> grpo_loss(logp, old, old, a, torch.tensor([[True, True]]), 0.0, 0.2, 0.2, tokens=4)
    tensor(-0.5763)
"""

import torch
from torch import Tensor


def grpo_loss(
    logp: Tensor,
    old_logp: Tensor,
    reference_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    beta: float,
    low: float,
    high: float,
    tokens: int,
) -> Tensor:
    a = advantages.detach()[:, None].expand_as(mask)[mask]
    new = logp[mask]
    ratio = (new - old_logp.detach()[mask]).exp()
    d = reference_logp.detach()[mask] - new
    gained = torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a)
    return (beta * (d.exp() - d - 1) - gained).sum() / tokens
