"""Does the critic know what will come? What it says of states beside what their policy then earns there."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.errors import UserError
from finetune.rl.advantages import returns_to_go
from finetune.rl.envs.environments import Act, Env, play
from finetune.rl.envs.evaluation import true_returns
from finetune.rl.statistics import standard_error

LEFT = 0.05  # part of a return that may be missing where a time limit cuts its episode off


def steps_for(gamma: float) -> int:
    """Steps after which what follows is discounted to `LEFT`; γ above 0.999 counts as that."""
    return math.ceil(math.log(LEFT) / math.log(min(gamma, 0.999))) if gamma else 1


def said_and_came(
    envs: Sequence[Env],
    act: Act,
    value: Callable[[Tensor], Tensor],
    seeds: Sequence[int],
    gamma: float,
    generator: torch.Generator,
    latest: int | None = None,
    bonus: Callable[[Tensor, torch.Generator], Tensor] | None = None,
) -> Tensor:
    """(K, 2): V of a state, and the mean discounted return from it, for one state of an episode of each seed.

    One return is chance; V is a mean. So an episode is played to its end, and one of its first `latest` steps is drawn,
    step t as γᵗ (the discounted distribution of states). The state before it is reached again len(envs) / K times, by
    the same seed and actions, and from there on `act` draws again. A soft critic's values count what `bonus` (the
    entropy's worth in a state) adds to each reward, so the returns do too. UserError if an environment comes to
    another state.
    """
    states = torch.arange(len(seeds)).repeat_interleave(len(envs) // len(seeds))  # of each environment, its state's
    columns = torch.arange(len(states))
    once = play(envs[: len(seeds)], act, seeds)
    lengths = once.first_episode.sum(0)
    if latest is not None:
        lengths = lengths.clamp(max=latest)
    drawn = geometric(torch.rand(len(seeds), generator=generator, dtype=torch.float64), lengths, gamma)
    begin = drawn[states]  # the step from which `act` draws anew
    step = itertools.count()

    def again(observations: Tensor) -> Tensor:
        t, own = next(step), act(observations)
        if t >= len(once.actions):
            return own
        told = (t < begin).view(-1, *[1] * (own.dim() - 1))
        return torch.where(told, once.actions[t, states], own)

    rollout, returns = true_returns(envs[: len(states)], again, [seeds[k] for k in states], gamma)
    if bonus is not None:
        extra = bonus(rollout.observations, generator)
        returns = returns_to_go(rollout.rewards + extra, rollout.ends, gamma) * rollout.first_episode
    seen = rollout.observations[begin, columns].unflatten(0, (len(seeds), -1))
    if not (seen == seen[:, :1]).all():
        raise UserError(f"'{envs[0].name}' does not repeat an episode from its seed: no state can be played twice")
    came = returns[begin, columns].unflatten(0, (len(seeds), -1))
    with torch.no_grad():
        return torch.stack([value(seen[:, 0]), came.mean(1)], 1)


def geometric(uniform: Tensor, lengths: Tensor, gamma: float) -> Tensor:
    """Steps t < L with probabilities as γᵗ, from uniform numbers in [0, 1): the inverse of (1 − γᵗ) / (1 − γᴸ)."""
    if gamma in (0, 1):
        return (uniform * lengths * gamma).long()
    t = torch.log1p(-uniform * (1 - gamma**lengths)) / math.log(gamma)
    return t.long().clamp(max=lengths - 1)  # rounding


@dataclass
class Told:
    """What a critic said beside what came, with standard errors over the states. A correlation is blind to an offset
    and to a scale: the bias is the mean of said − came, the slope that of the line of what was said over what came,
    1 of a right critic."""

    correlation: float
    correlation_error: float
    bias: float
    bias_error: float
    slope: float
    slope_error: float

    @classmethod
    def of(cls, pairs: Tensor) -> Told | None:
        """pairs (K, 2); None where there is nothing to correlate."""
        said, came = pairs.double().T
        off, n = said - came, len(pairs)
        if n < 4 or not min(said.var(), came.var()) > 0:
            return None
        r = float(torch.corrcoef(torch.stack([said, came]))[0, 1])
        slope = r * float(said.std() / came.std())
        spread = math.sqrt(max(0.0, 1 - r**2) / (n - 2))  # of the slope, of what both deviate by
        return cls(r, (1 - r**2) / math.sqrt(n - 3), float(off.mean()), standard_error(off.tolist()), slope,
                   float(said.std() / came.std()) * spread)  # fmt: skip
