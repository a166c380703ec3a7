"""Off-policy prediction by importance sampling (sections 5.5 to 5.9): returns of a behavior b, weighted so that they
stand for a target policy π.

    ρ_{t:T−1} = Π_k π(A_k|S_k) / b(A_k|S_k)       ordinary Σ ρ G / n       weighted Σ ρ G / Σ ρ
    per decision: ρ_{t:t} R_{t+1} + γ ρ_{t:t+1} R_{t+2} + …                a reward does not depend on later actions
"""

from __future__ import annotations

import numpy as np

from finetune.rl.tabular.mdp import MDP, Array, pick

from .control import Walkers


def returns_and_ratios(
    mdp: MDP, target: Array, behavior: Array, count: int, draw: np.random.Generator, limit: int = 10_000
) -> tuple[Array, Array, Array]:
    """Of `count` episodes under `behavior` (S, A), from `mdp.start`: the return, the ratio of the whole episode, and
    the return with each reward weighted by the ratio up to it; all (count,)."""
    ratios = np.divide(target, behavior, out=np.zeros_like(target), where=behavior > 0)
    cumulative = behavior.cumsum(1)
    world = Walkers(mdp, count)
    world.begin(np.ones(count, bool), draw)
    G, each, ratio = np.zeros(count), np.zeros(count), np.ones(count)
    open_, discount = np.arange(count), 1.0  # the episodes that go on
    for _ in range(limit):
        state = world.state
        action = pick(cumulative[state], draw.random(len(state)))
        _, reward, over, _ = world.step(action, draw)
        ratio[open_] *= ratios[state, action]
        G[open_] += discount * reward
        each[open_] += discount * ratio[open_] * reward
        open_, discount = open_[~over], discount * mdp.gamma
        world.keep(~over)
        if not len(open_):
            return G, ratio, each
    raise RuntimeError(f"{len(open_)} of {count} episodes did not end within {limit} steps")


def sample(
    mdp: MDP, target: Array, behavior: Array, runs: int, episodes: int, draw: np.random.Generator, piece: int = 100_000
) -> tuple[Array, Array, Array]:
    """The same of runs × episodes, (runs, episodes), about `piece` of them at a time."""
    columns = max(1, piece // runs)
    parts = []
    for first in range(0, episodes, columns):
        width = min(columns, episodes - first)
        found = returns_and_ratios(mdp, target, behavior, runs * width, draw)
        parts.append([x.reshape(runs, width) for x in found])
    G, ratios, each = (np.concatenate(columns, 1) for columns in zip(*parts, strict=True))
    return G, ratios, each


def ordinary(values: Array, ratios: Array) -> Array:
    """The estimate after each episode: (…, E) → (…, E). Unbiased; its variance may be infinite."""
    return (ratios * values).cumsum(-1) / np.arange(1, values.shape[-1] + 1)


def weighted(values: Array, ratios: Array) -> Array:
    """The same by the sum of the ratios; 0 as long as that is 0. Biased, but never beyond the returns seen."""
    total = ratios.cumsum(-1)
    return np.divide((ratios * values).cumsum(-1), total, out=np.zeros_like(total), where=total > 0)


ESTIMATORS = {"ordinary": ordinary, "weighted": weighted}
