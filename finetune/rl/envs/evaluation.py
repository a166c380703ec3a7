"""Returns of a policy over fresh episodes, and their confidence interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from torch import Tensor

from finetune.rl.advantages import returns_to_go
from finetune.rl.envs.environments import Act, Env, play
from finetune.rl.envs.rollout import Rollout

# Two-sided 95 % points of Student's t with 1 … 30 degrees of freedom.
# fmt: off
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
       2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)
# fmt: on


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half the width of its 95 % confidence interval); of a single value the width is infinite."""
    n = len(values)
    if n < 2:
        return statistics.fmean(values), math.inf
    t = T95[n - 2] if n - 2 < len(T95) else 1.96
    return statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(n)


def returns(envs: Sequence[Env], act: Act, seeds: Sequence[int]) -> list[float]:
    """Undiscounted returns, one episode for each seed, len(envs) episodes at a time."""
    found: list[float] = []
    for i in range(0, len(seeds), len(envs)):
        part = seeds[i : i + len(envs)]
        found += play(envs[: len(part)], act, part).rewards.sum(0).tolist()
    return found


def true_returns(envs: Sequence[Env], act: Act, seeds: Sequence[int], gamma: float) -> tuple[Rollout, Tensor]:
    """An episode of each environment, and its discounted returns-to-go (T, N). They end with the episode: where a time
    limit truncates it, late returns are too small."""
    rollout = play(envs, act, seeds)
    return rollout, returns_to_go(rollout.rewards, rollout.ends, gamma) * rollout.first_episode
