"""What a policy sees when it acts: T steps of N rows, as the estimators and the op `gae` take them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from finetune.runs.run import Run


@dataclass
class Rollout:
    """Row n of step t+1 goes on where row n of step t stopped; after an end it begins a new episode."""

    observations: Tensor  # (T, N, …), or (T, N) states
    actions: Tensor  # (T, N), or (T, N, D) where they are continuous
    rewards: Tensor  # (T, N)
    next_observations: Tensor  # (T, N, …) what the step reached: at an end the last of the old episode, not the new one
    terminated: Tensor  # (T, N) bool: the episode is over, nothing can follow
    truncated: Tensor  # (T, N) bool: cut off by a time limit, something could have followed

    @property
    def ends(self) -> Tensor:
        return self.terminated | self.truncated

    @property
    def first_episode(self) -> Tensor:
        """(T, N) bool: the steps up to the first end of each row, that step included."""
        return self.ends.cumsum(0) - self.ends.long() == 0


def numpy_generator(run: Run, *key: Any) -> np.random.Generator:
    """As run.generator: it depends on (seed, *key) only."""
    return np.random.default_rng(run.generator(*key).initial_seed())


def episode_seeds(run: Run, count: int, *key: Any) -> list[int]:
    """What `count` environments are reset with; like `numpy_generator`, of (seed, *key) only."""
    return [int(x) for x in numpy_generator(run, *key).integers(2**31, size=count)]
