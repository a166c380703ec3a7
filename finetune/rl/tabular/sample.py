"""Episodes of a tabular MDP, all rows at once."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from finetune.rl.envs.rollout import Rollout
from finetune.rl.tabular import mdp as tables
from finetune.rl.tabular.mdp import MDP


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
