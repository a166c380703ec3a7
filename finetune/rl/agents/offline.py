"""What learning from logged steps shares: behavior cloning, fitted Q evaluation, and the score of a return."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.errors import UserError
from finetune.optim import descend
from finetune.rl.agents.networks import QNetwork
from finetune.rl.agents.targets import gather_actions, polyak_, td_target
from finetune.rl.envs.environments import Env, play
from finetune.rl.envs.replay import Transitions


def cloning_loss(output: Tensor, actions: Tensor) -> Tensor:
    """Behavior cloning: − log softmax of the logits (N, A) at discrete actions; the squared distance of continuous."""
    if actions.is_floating_point():
        return (output - actions).square().mean()
    return F.cross_entropy(output, actions)


# --- Fitted Q evaluation


def possible_returns(rewards: Tensor, gamma: float) -> tuple[float, float]:
    """The least and the largest discounted return from such rewards; an end may come at any time, γ is below 1."""
    return min(0.0, float(rewards.min())) / (1 - gamma), max(0.0, float(rewards.max())) / (1 - gamma)


def action_value(q: nn.Module, observations: Tensor, actions: Tensor) -> Tensor:
    """Q(s, a) (N,): of a QNetwork for discrete actions, else the least of the critics'."""
    if actions.is_floating_point():
        return q(observations, actions).amin(0)
    return gather_actions(q(observations), actions)


def state_value(q: nn.Module, observations: Tensor, policy: Tensor) -> Tensor:
    """V(s) (N,) of a policy: its probabilities (N, A) under a QNetwork, its actions (N, A) under continuous critics."""
    if isinstance(q, QNetwork):
        return (policy * q(observations)).sum(-1)
    return q(observations, policy).amin(0)


class FQE:
    """Fitted Q evaluation (Le et al. 2019, arXiv:1903.08738): Q^π of a fixed policy from another's steps.

        Q ← argmin Σ (Q(s, a) − r − γ V_target(s'))²     V(s') = Σ_a π(a|s') Q(s', a), or Q(s', π(s'))

    `policy` is what `state_value` takes, of the next observations; it is computed once, as π does not change.
    limits: what no return can leave (`possible_returns`). Without, where π leaves the data Q may grow beyond any bound.
    """

    def __init__(
        self,
        q: nn.Module,
        data: Transitions,
        policy: Tensor,
        *,
        gamma: float,
        lr: float,
        tau: float,
        limits: tuple[float, float] = (-math.inf, math.inf),
    ) -> None:
        self.q, self.target = q, copy.deepcopy(q)
        self.data, self.policy, self.gamma, self.tau, self.limits = data, policy, gamma, tau, limits
        self.optimizer = torch.optim.Adam(q.parameters(), lr=lr, fused=True)

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint has to hold."""
        return {"q": self.q, "target": self.target, "optimizer": self.optimizer}

    def update(self, rows: Tensor) -> float:
        """One step on these rows of the data; its loss."""
        batch = self.data[rows]
        with torch.no_grad():
            following = state_value(self.target, batch.next_observations, self.policy[rows])
        wanted = td_target(batch.rewards, following.clamp(*self.limits), batch.terminated, self.gamma)
        loss = (action_value(self.q, batch.observations, batch.actions) - wanted).square().mean()
        descend(loss, self.optimizer)
        polyak_(self.target, self.q, self.tau)
        if not math.isfinite(found := loss.item()):
            raise UserError(
                f"the loss of fitted Q evaluation became {found}: try a smaller learning rate, or scale the data"
            )
        return found

    @torch.no_grad()
    def value(self, observations: Tensor, policy: Tensor) -> Tensor:
        return state_value(self.q, observations, policy)


def paid(data: Transitions, envs: Sequence[Env], seeds: Sequence[int], rows: int = 4000) -> tuple[float, float] | None:
    """Do the logs pay as the environment does? None if so, or if that cannot be seen; else the mean reward that the
    environment gave, and the mean of the logged steps that are nearest to what happened there.

    An episode of each environment is played with the action of the nearest logged observation, so that it stays where
    the logs are. Each of its steps (s, a, s', whether it ended) has a nearest logged one; a pair counts if it is about
    as near as the logged one is to its own neighbor, and what those two differ by is what neighbors differ by anyway.
    """
    rows = min(rows, max(500, 250_000 // data.observations.shape[1]))
    kept = data[torch.arange(0, len(data), -(-len(data) // rows))]
    spread, size = (x.float().std(0).nan_to_num().clamp(min=1e-6) for x in (kept.observations, kept.actions))

    def nearest(observations: Tensor) -> Tensor:
        return kept.actions[torch.cdist(observations / spread, kept.observations / spread).argmin(1)]

    def features(seen: Tensor, actions: Tensor, after: Tensor, over: Tensor) -> Tensor:
        return torch.cat([seen / spread, (actions / size).view(len(seen), -1), after / spread, 1e3 * over[:, None]], 1)

    rollout = play(envs, nearest, seeds)
    on, r = rollout.first_episode, rollout
    logged = features(kept.observations, kept.actions, kept.next_observations, kept.terminated)
    happened = features(*(x[on][:rows] for x in (r.observations, r.actions, r.next_observations, r.terminated)))
    between = torch.cdist(logged, logged, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(math.inf)
    apart, neighbor = between.min(1)
    distance, match = torch.cdist(happened, logged, compute_mode="donot_use_mm_for_euclid_dist").min(1)
    near = distance <= 3 * apart[match] + 1e-3
    if int(near.sum()) < 20:
        return None
    came, wrote = r.rewards[on][:rows][near], kept.rewards[match[near]]
    usual = (wrote - kept.rewards[neighbor[match[near]]]).abs().mean()
    largest = max(float(came.abs().max()), float(wrote.abs().max()))
    if float((came - wrote).abs().mean()) <= 4 * float(usual) + 1e-3 * largest:
        return None
    return float(came.mean()), float(wrote.mean())


def normalized(value: float, random: float, expert: float) -> float:
    """D4RL's score: 0 is a random policy, 100 the expert (Fu et al. 2020, arXiv:2004.07219)."""
    return 100 * (value - random) / (expert - random)
