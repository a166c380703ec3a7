"""Critic check: V(s) of a critic against the discounted returns that its policy earns from s.

One return is chance and V is a mean, so several episodes are played on from the same state. States are those of the
policy's own episodes, step t with probability ∝ γᵗ.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from finetune.errors import UserError
from finetune.rl.advantages import returns_to_go
from finetune.rl.agents.targets import soft_value
from finetune.rl.envs.environments import Act, Env, play
from finetune.rl.envs.evaluation import true_returns
from finetune.rl.statistics import standard_error

from .sac import SAC
from .td3 import TD3

if TYPE_CHECKING:
    from .main import Agent

MISSING = 0.05  # share of a return that may lie beyond the time limit of the episodes played here

Bonus = Callable[[Tensor, torch.Generator], Tensor]


def steps_for(gamma: float) -> int:
    """Steps after which rewards are discounted to `MISSING`; γ above 0.999 counts as 0.999."""
    return math.ceil(math.log(MISSING) / math.log(min(gamma, 0.999))) if gamma else 1


def parts_of(agent: Agent, rng: torch.Generator) -> tuple[Act, Callable[[Tensor], Tensor], Bonus | None]:
    """(policy, value, bonus): the policy whose value the critic estimates, V (N,) of states in the environment's
    rewards, and what the critic counts as reward in addition to the environment's."""
    if isinstance(agent, TD3):
        return agent.greedy, lambda obs: agent.reward_unit * agent.q(obs, agent.greedy(obs)).amin(0), None

    def policy(observations: Tensor) -> Tensor:
        return agent.act(observations, rng)

    if isinstance(agent, SAC):
        return policy, lambda obs: soft_state_values(agent, obs), lambda obs, rng: entropy_bonus(agent, obs, rng)
    return policy, lambda obs: agent.rewards.size * agent.model.values(obs), None


@torch.no_grad()
def soft_state_values(sac: SAC, observations: Tensor, samples: int = 16) -> Tensor:
    """SAC's V(s) = E[min Q(s, a) − α log π(a|s)] (N,), over `samples` actions of each state."""
    many, rng = observations.repeat(samples, 1), torch.Generator().manual_seed(0)
    actions, log_probs = sac.policy.rsample(sac.policy(many), sac.noise(len(many), rng))
    soft = soft_value(sac.q(many, actions), log_probs, sac.log_alpha.exp())
    return sac.reward_unit * soft.view(samples, -1).mean(0)


@torch.no_grad()
def entropy_bonus(sac: SAC, observations: Tensor, rng: torch.Generator) -> Tensor:
    """−α log π(a|s) (T, N) of one action in each state (T, N, D): on average α times the entropy."""
    flat = observations.flatten(0, 1)
    _, log_probs = sac.policy.rsample(sac.policy(flat), sac.noise(len(flat), rng))
    return -sac.reward_unit * sac.log_alpha.exp() * log_probs.view(observations.shape[:2])


def values_and_returns(
    envs: Sequence[Env],
    policy: Act,
    value: Callable[[Tensor], Tensor],
    seeds: Sequence[int],
    gamma: float,
    rng: torch.Generator,
    latest: int | None = None,
    bonus: Bonus | None = None,
) -> Tensor:
    """(K, 2): V(s) and the mean discounted return from s, for one state s of an episode of each seed.

    An episode of each seed is played, and one of its first `latest` steps chosen, step t with probability ∝ γᵗ. Its
    state is reached again in len(envs) / K environments by the same seed and actions; from there `policy` continues.
    UserError if an environment reaches another state.
    """
    state_of = torch.arange(len(seeds)).repeat_interleave(len(envs) // len(seeds))  # (E,) the state of each environment
    columns = torch.arange(len(state_of))
    episodes = play(envs[: len(seeds)], policy, seeds)
    lengths = episodes.first_episode.sum(0)  # (K,)
    if latest is not None:
        lengths = lengths.clamp(max=latest)
    chosen = discounted_step(torch.rand(len(seeds), generator=rng, dtype=torch.float64), lengths, gamma)  # (K,)
    start = chosen[state_of]  # (E,) the step from which `policy` continues
    step = itertools.count()

    def replay_then_continue(observations: Tensor) -> Tensor:
        t, actions = next(step), policy(observations)
        if t >= len(episodes.actions):
            return actions
        replayed = (t < start).view(-1, *[1] * (actions.dim() - 1))
        return torch.where(replayed, episodes.actions[t, state_of], actions)

    repeated = envs[: len(state_of)]
    rollout, returns = true_returns(repeated, replay_then_continue, [seeds[k] for k in state_of], gamma)  # (T, E)
    if bonus is not None:
        extra = bonus(rollout.observations, rng)
        returns = returns_to_go(rollout.rewards + extra, rollout.ends, gamma) * rollout.first_episode
    states = rollout.observations[start, columns].unflatten(0, (len(seeds), -1))  # (K, E / K, D)
    if not (states == states[:, :1]).all():
        raise UserError(f"'{envs[0].name}' does not repeat an episode from its seed: no state can be played twice")
    earned = returns[start, columns].unflatten(0, (len(seeds), -1))  # (K, E / K)
    with torch.no_grad():
        return torch.stack([value(states[:, 0]), earned.mean(1)], 1)


def discounted_step(uniform: Tensor, lengths: Tensor, gamma: float) -> Tensor:
    """Steps t < L with probability ∝ γᵗ, from uniform numbers in [0, 1): the inverse of (1 − γᵗ) / (1 − γᴸ)."""
    if gamma in (0, 1):
        return (uniform * lengths * gamma).long()
    t = torch.log1p(-uniform * (1 - gamma**lengths)) / math.log(gamma)
    return t.long().clamp(max=lengths - 1)  # rounding


@dataclass
class Agreement:
    """How well V(s) predicts returns, with standard errors over the states. A correlation sees neither an offset nor a
    scale: the bias is the mean of V − return, the slope that of the regression line of V on returns (1 is right)."""

    correlation: float
    correlation_error: float
    bias: float
    bias_error: float
    slope: float
    slope_error: float

    @classmethod
    def of(cls, pairs: Tensor) -> Agreement | None:
        """pairs (K, 2); None with fewer than four states, or where V or the returns do not vary."""
        values, returns = pairs.double().T
        errors, n = values - returns, len(pairs)
        if n < 4 or not min(values.var(), returns.var()) > 0:
            return None
        r, ratio = float(torch.corrcoef(torch.stack([values, returns]))[0, 1]), float(values.std() / returns.std())
        return cls(
            correlation=r,
            correlation_error=(1 - r**2) / math.sqrt(n - 3),
            bias=float(errors.mean()),
            bias_error=standard_error(errors.tolist()),
            slope=r * ratio,
            slope_error=ratio * math.sqrt(max(0.0, 1 - r**2) / (n - 2)),
        )
