"""Find the bug: the loss of a policy with illegal actions becomes NaN.

policy_loss(logits, legal, actions, advantages, bonus): logits (b, n) floating point; legal (b, n) bool, True where an
action may be taken, at least one in every row; actions (b,) int64, legal ones; advantages (b,); bonus a float → a
scalar: the mean over the batch of −log π(action) · advantage − bonus · entropy, where π is the softmax over the legal
actions, and entropy −Σ π log π over them. Loss and gradient are finite, and right also for logits 1e3 apart. Illegal
actions have gradient 0.

    >>> logits, legal = torch.zeros(1, 3), torch.tensor([[True, True, False]])
    >>> policy_loss(logits, legal, torch.tensor([0]), torch.tensor([2.0]), bonus=1.0)
    tensor(0.6931)
"""

import torch
from torch import Tensor


def policy_loss(logits: Tensor, legal: Tensor, actions: Tensor, advantages: Tensor, bonus: float) -> Tensor:
    logs = logits.masked_fill(~legal, -torch.inf).log_softmax(-1)
    chosen = logs.gather(1, actions[:, None])[:, 0]
    entropy = -(logs.exp() * logs.masked_fill(~legal, 0.0)).sum(-1)
    return (-chosen * advantages - bonus * entropy).mean()
