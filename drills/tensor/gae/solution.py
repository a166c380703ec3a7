"""Generalized advantage estimation, with episodes that end and episodes that are cut off.

rewards, values, next_values (t,) or (t, environments), floating point; terminated, truncated bool of the same shape;
gamma, lam floats → (advantages, returns), of the same shape.
values[i] is the value of the observation before step i, next_values[i] that of the observation after it, also if the
episode stopped there (then values[i + 1] belongs to the next episode).
The advantage is the sum over k ≥ 0 of (gamma lam)ᵏ δ[i + k], δ[i] = rewards[i] + gamma next_values[i] − values[i],
over the steps of the same episode; what follows a terminated step has value 0, what follows a truncated step (a time
limit) has the value next_values[i]. A step may be both: it is terminated. The batch ends after the last row.
returns is advantages + values, the target of the critic.

    >>> ones, no, yes = torch.ones(2), torch.tensor([False, False]), torch.tensor([False, True])
    >>> gae(ones, ones, ones, yes, no, gamma=0.5, lam=1.0)
    (tensor([0.5000, 0.0000]), tensor([1.5000, 1.0000]))
    >>> gae(ones, ones, ones, no, yes, gamma=0.5, lam=1.0)
    (tensor([0.7500, 0.5000]), tensor([1.7500, 1.5000]))
"""

import torch
from torch import Tensor


def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    after = torch.where(terminated, 0.0, next_values)
    deltas = rewards + gamma * after - values
    ended = terminated | truncated
    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[0])
    for i in reversed(range(len(rewards))):
        following = deltas[i] + gamma * lam * torch.where(ended[i], 0.0, following)
        advantages[i] = following
    return advantages, advantages + values
