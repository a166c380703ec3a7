"""Two preference losses that take the mean over an answer's tokens.

policy, reference (2, b, t) floating point: log probabilities of the tokens of the chosen answers, then of the rejected
ones; mask (2, b, t) bool: which tokens count. What lies outside the mask does not matter, be it −inf or NaN, and gets
gradient 0. The mean of an answer is taken over its own tokens that count; an answer without any has the mean 0.

length_normalized_dpo(policy, reference, mask, beta) → a scalar: the mean over the pairs of −log σ(beta · (m_chosen −
m_rejected)), where m is the mean of policy − reference. No gradient into reference.
simpo(policy, mask, beta, gamma) → a scalar: the mean over the pairs of −log σ(beta · (m_chosen − m_rejected) − gamma),
where m is the mean of policy.

    >>> policy, mask = torch.tensor([[[-1.0, -3.0]], [[-1.0, -9.0]]]), torch.tensor([[[True, True]], [[True, False]]])
    >>> length_normalized_dpo(policy, torch.zeros(2, 1, 2), mask, beta=1.0), simpo(policy, mask, beta=2.0, gamma=1.0)
    (tensor(1.3133), tensor(3.0486))
"""

import torch
from torch import Tensor


def length_normalized_dpo(policy: Tensor, reference: Tensor, mask: Tensor, beta: float) -> Tensor:
    better, worse = means(policy, mask) - means(reference.detach(), mask)
    return -torch.nn.functional.logsigmoid(beta * (better - worse)).mean()


def simpo(policy: Tensor, mask: Tensor, beta: float, gamma: float) -> Tensor:
    better, worse = means(policy, mask)
    return -torch.nn.functional.logsigmoid(beta * (better - worse) - gamma).mean()


def means(logps: Tensor, mask: Tensor) -> Tensor:
    counts = mask.sum(-1).clamp(min=1)
    return logps.masked_fill(~mask, 0.0).sum(-1) / counts
