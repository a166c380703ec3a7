"""What a policy sees when it acts: T steps of N rows, as the estimators and the op `gae` take them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetune.rl import mdp as tables
from finetune.rl.mdp import MDP

if TYPE_CHECKING:
    from finetune.run import Run


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


def sample_tabular(
    mdp: MDP,
    policy: NDArray[np.float64],
    steps: int,
    states: NDArray[np.intp],
    generator: np.random.Generator,
    *,
    actions: NDArray[np.intp] | None = None,
    limit: int | None = None,
    one_episode: bool = False,
) -> Rollout:
    """`steps` steps from each of the given states (N,) under `policy` (S, A); rewards are float64.

    actions (N,): the first ones, where the policy is not to choose them. limit: steps after which an episode is
    truncated. After an end the next episode begins in a state drawn from mdp.start. one_episode: stops as soon as
    every row has had an end.
    """
    rows = len(states)
    cumulative, starts = policy.cumsum(1), mdp.start.cumsum()[None]
    age, over = np.zeros(rows, np.intp), np.zeros(rows, bool)
    columns: list[tuple[NDArray, ...]] = []
    for t in range(steps):
        drawn = generator.random((3, rows))
        if t or actions is None:
            chosen = tables.pick(cumulative[states], drawn[0])
        else:
            chosen = actions
        after = tables.sample_next(mdp, states, chosen, drawn[1])
        terminated, age = mdp.terminal[after], age + 1
        truncated = ~terminated & (age == limit) if limit is not None else np.zeros(rows, bool)
        columns.append((states, chosen, mdp.rewards[states, chosen, after], after, terminated, truncated))
        ends = terminated | truncated
        states = np.where(ends, tables.pick(starts, drawn[2]), after)
        age, over = np.where(ends, 0, age), over | ends
        if one_episode and over.all():
            break
    return Rollout(*(torch.from_numpy(np.stack(column)) for column in zip(*columns, strict=True)))
