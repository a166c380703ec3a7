"""KL divergence of two policies, estimated and exact.

estimates(logp, reference_logp), of the same shape, floating point: log probabilities under π and π_ref of tokens that
were drawn from π → (k1, k2, k3), elementwise estimates of KL(π ‖ π_ref) with r = π_ref / π:
k1 = −log r, k2 = (log r)² / 2, k3 = r − 1 − log r. k3 must be right to 1 % where log r is 1e-4 in fp32, and is never
negative.
exact(logits, reference_logits), (…, v) → (…,): the sum over the vocabulary of π (log π − log π_ref), where π is the
softmax of logits. Logits of −inf are tokens that the policy cannot say; where π is 0 a term is 0, where only π_ref is
0 the result is inf. Logits may be as far apart as 1e4.

    >>> estimates(torch.tensor([-1.0]), torch.tensor([-2.0]))
    (tensor([1.]), tensor([0.5000]), tensor([0.3679]))
    >>> nothing = torch.zeros(2)
    >>> exact(nothing, torch.tensor([0.0, -torch.inf])), exact(nothing, torch.tensor([0.0, 1.0]))
    (tensor(inf), tensor(0.1201))
"""

import torch
from torch import Tensor


def estimates(logp: Tensor, reference_logp: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    log_ratio = reference_logp - logp
    return -log_ratio, log_ratio**2 / 2, (torch.expm1(log_ratio) - log_ratio).clamp(min=0)


def exact(logits: Tensor, reference_logits: Tensor) -> Tensor:
    logs = logits.log_softmax(-1)
    terms = logs.exp() * (logs - reference_logits.log_softmax(-1))
    return terms.masked_fill(logs.exp() == 0, 0.0).sum(-1)
