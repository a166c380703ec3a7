"""Sampled episodes of a tabular MDP, many rows in lockstep."""

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
    rng: np.random.Generator,
    *,
    actions: NDArray[np.intp] | None = None,
    limit: int | None = None,
    one_episode: bool = False,
) -> Rollout:
    """A Rollout of `steps` steps under `policy` (S, A), one row for each of the given states (N,); rewards are float64.

    actions (N,): the first actions, in place of the policy's. limit: steps after which an episode is truncated. After
    an end the row starts a new episode from mdp.start. one_episode: stops once every row has finished an episode.
    """
    rows = len(states)
    cumulative, starts = policy.cumsum(1), mdp.start.cumsum()[None]
    age, finished = np.zeros(rows, np.intp), np.zeros(rows, bool)
    columns: list[tuple[NDArray, ...]] = []
    for t in range(steps):
        uniforms = rng.random((3, rows))
        if t or actions is None:
            chosen = tables.pick(cumulative[states], uniforms[0])
        else:
            chosen = actions
        next_states = tables.sample_next(mdp, states, chosen, uniforms[1])
        terminated, age = mdp.terminal[next_states], age + 1
        truncated = ~terminated & (age == limit) if limit is not None else np.zeros(rows, bool)
        columns.append((states, chosen, mdp.rewards[states, chosen, next_states], next_states, terminated, truncated))
        ends = terminated | truncated
        states = np.where(ends, tables.pick(starts, uniforms[2]), next_states)
        age, finished = np.where(ends, 0, age), finished | ends
        if one_episode and finished.all():
            break
    return Rollout(*(torch.from_numpy(np.stack(column)) for column in zip(*columns, strict=True)))
