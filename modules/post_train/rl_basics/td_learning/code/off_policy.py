"""Off-policy Monte Carlo by importance sampling: the value of a policy π from episodes of a behavior b.

    ρ_{t:T−1} = Π_k π(A_k|S_k) / b(A_k|S_k)       ordinary Σ ρ G / n       weighted Σ ρ G / Σ ρ
    per decision: ρ_{t:t} R_{t+1} + γ ρ_{t:t+1} R_{t+2} + …                a reward does not depend on later actions

Sutton & Barto 2018, sections 5.5 to 5.9.
"""

from __future__ import annotations

import numpy as np

from finetune.rl.tabular.mdp import MDP, Array, pick

from .control import TabularEnvs


def returns_and_ratios(
    mdp: MDP, target: Array, behavior: Array, count: int, rng: np.random.Generator, limit: int = 10_000
) -> tuple[Array, Array, Array]:
    """For `count` episodes under `behavior` (S, A) from `mdp.start`: the return, the ratio of the whole episode, and
    the return in which each reward is weighted by the ratio up to it; all (count,)."""
    ratios = np.divide(target, behavior, out=np.zeros_like(target), where=behavior > 0)
    cumulative = behavior.cumsum(1)
    envs = TabularEnvs(mdp, count)
    envs.reset(np.ones(count, bool), rng)
    G, each, ratio = np.zeros(count), np.zeros(count), np.ones(count)
    running, discount = np.arange(count), 1.0  # the running episodes
    for _ in range(limit):
        state = envs.state
        action = pick(cumulative[state], rng.random(len(state)))
        _, reward, over, _ = envs.step(action, rng)
        ratio[running] *= ratios[state, action]
        G[running] += discount * reward
        each[running] += discount * ratio[running] * reward
        running, discount = running[~over], discount * mdp.gamma
        envs.keep(~over)
        if not len(running):
            return G, ratio, each
    raise RuntimeError(f"{len(running)} of {count} episodes did not end within {limit} steps")


def sample(
    mdp: MDP, target: Array, behavior: Array, runs: int, episodes: int, rng: np.random.Generator, chunk: int = 100_000
) -> tuple[Array, Array, Array]:
    """`returns_and_ratios` of runs × episodes, in arrays (runs, episodes), about `chunk` episodes at a time."""
    columns = max(1, chunk // runs)
    parts = []
    for first in range(0, episodes, columns):
        width = min(columns, episodes - first)
        found = returns_and_ratios(mdp, target, behavior, runs * width, rng)
        parts.append([x.reshape(runs, width) for x in found])
    G, ratios, each = (np.concatenate(columns, 1) for columns in zip(*parts, strict=True))
    return G, ratios, each


def ordinary(values: Array, ratios: Array) -> Array:
    """The estimate after each episode: (…, E) → (…, E). Unbiased; its variance may be infinite."""
    return (ratios * values).cumsum(-1) / np.arange(1, values.shape[-1] + 1)


def weighted(values: Array, ratios: Array) -> Array:
    """The estimate normalized by the sum of the ratios; 0 while that is 0. Biased, but never beyond the returns."""
    total = ratios.cumsum(-1)
    return np.divide((ratios * values).cumsum(-1), total, out=np.zeros_like(total), where=total > 0)


ESTIMATORS = {"ordinary": ordinary, "weighted": weighted}
