"""Does the critic know what will come? What it says of states beside the returns that then followed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from finetune.rl.environments import Act
from finetune.rl.evaluation import true_returns

LEFT = 0.05  # part of a return that may be missing where a time limit cut its episode off
EVERY = 10  # neighbours say nearly the same


def steps_for(gamma: float) -> int:
    """Steps after which what follows is discounted to `LEFT`; γ above 0.999 counts as that."""
    return math.ceil(math.log(LEFT) / math.log(min(gamma, 0.999))) if gamma else 1


def said_and_came(
    envs: Sequence[Any], act: Act, value: Callable[[Tensor], Tensor], seeds: Sequence[int], gamma: float
) -> Tensor:
    """(K, 2): V of a state and the discounted return from it, of every tenth step of an episode a seed, without those
    whose return a time limit cut short."""
    rollout, came = true_returns(envs, act, seeds, gamma)
    alive = rollout.first_episode
    with torch.no_grad():
        said = value(rollout.observations)
    steps = torch.arange(len(came))[:, None]
    left = alive.sum(0) - steps  # to the end of the episode
    whole = (rollout.terminated & alive).any(0) | (left >= steps_for(gamma))
    chosen = alive & whole & (steps % EVERY == 0)
    return torch.stack([said[chosen], came[chosen]], 1)


def correlation(pairs: Tensor) -> float:
    """Pearson's; NaN if there is nothing to correlate."""
    return float(torch.corrcoef(pairs.T.double())[0, 1]) if len(pairs) > 2 else math.nan
