"""Advantages within groups of answers to one question.

rewards (n,) floating point, groups (n,) int64: which question an answer belongs to, in any order, any numbers; groups
may differ in size. scale: bool. → (advantages, useful):
advantages (n,): reward − mean of its group, and with `scale` divided by the group's standard deviation √(mean of the
squared differences), with no epsilon. In a group whose rewards are all equal, of a single answer also, they are
exactly 0.
useful (n,) bool: whether the rewards of the answer's group are not all equal.

    >>> group_advantages(torch.tensor([1.0, 0.0, 3.0, 0.0]), torch.tensor([7, 2, 7, 5]), scale=True)
    (tensor([-1.,  0.,  1.,  0.]), tensor([ True, False,  True, False]))
"""

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, groups: Tensor, scale: bool) -> tuple[Tensor, Tensor]:
    advantages = torch.zeros_like(rewards)
    useful = torch.zeros_like(groups, dtype=torch.bool)
    for group in groups.unique():
        mine = groups == group
        own = rewards[mine]
        if bool((own == own[0]).all()):
            continue
        centered = own - own.mean()
        advantages[mine] = centered / own.std(correction=0) if scale else centered
        useful[mine] = True
    return advantages, useful
