"""A rollout: T steps of N environments, the input of advantage estimators and of the op `gae`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from finetune.runs.run import Run


@dataclass
class Rollout:
    """Column n at step t+1 continues column n at step t; after the end of an episode it begins the next one."""

    observations: Tensor  # (T, N, …), or (T, N) states
    actions: Tensor  # (T, N), or (T, N, D) where they are continuous
    rewards: Tensor  # (T, N)
    next_observations: Tensor  # (T, N, …) after the step; at an end the last one of the old episode
    terminated: Tensor  # (T, N) bool: the episode is over, V of what follows is 0
    truncated: Tensor  # (T, N) bool: stopped by a time limit, V of what would follow counts

    @property
    def ends(self) -> Tensor:
        return self.terminated | self.truncated

    @property
    def first_episode(self) -> Tensor:
        """(T, N) bool: the steps of each column up to its first end, inclusive."""
        return self.ends.cumsum(0) - self.ends.long() == 0


def numpy_generator(run: Run, *key: Any) -> np.random.Generator:
    """`run.generator` for numpy: a function of (seed, *key) only."""
    return np.random.default_rng(run.generator(*key).initial_seed())


def episode_seeds(run: Run, count: int, *key: Any) -> list[int]:
    """Reset seeds of `count` episodes, a function of (seed, *key) only."""
    return [int(x) for x in numpy_generator(run, *key).integers(2**31, size=count)]
