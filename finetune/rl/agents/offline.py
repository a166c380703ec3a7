"""What learning from logged data shares: the learner's interface, behavior cloning, fitted Q evaluation (FQE), a check
that the logs and the environment have the same rewards, and D4RL's normalized score."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.errors import UserError
from finetune.optim import descend
from finetune.rl.agents.learner import Learner
from finetune.rl.agents.networks import Categorical, Deterministic, QNetwork
from finetune.rl.agents.targets import gather_actions, polyak_, td_target
from finetune.rl.envs.environments import Env, play
from finetune.rl.envs.replay import Transitions


class OfflineLearner(Learner[Transitions], Protocol):
    """The interface of an offline RL algorithm: a `Learner` whose policy is the one that would be deployed, with the
    algorithm's own estimate of that policy's value."""

    def policy(self, observations: Tensor, rng: torch.Generator) -> Tensor:
        """The policy as `state_value` needs it: probabilities (N, A) of discrete actions, or continuous actions."""

    def value(self, observations: Tensor, actions: Tensor) -> Tensor | None:
        """The learner's own Q(s, a) (N,); None if it learns no values."""


def set_lr(learner: OfflineLearner, lr: float) -> None:
    """Sets the learning rate of all of a learner's optimizers."""
    for part in learner.state.values():
        if isinstance(part, torch.optim.Optimizer):
            part.param_groups[0]["lr"] = lr


def in_parts(function: Callable[..., Tensor], *columns: Tensor) -> Tensor:
    """function(*columns) (N, …), four million numbers at a time: the features that convolutions make of a whole log of
    images take much memory."""
    rows = max(2**22 // columns[0].shape[1], 1)
    return torch.cat([function(*part) for part in zip(*(column.split(rows) for column in columns), strict=True)])


def own_value(learner: OfflineLearner, observations: Tensor, rng: torch.Generator) -> Tensor | None:
    """What a learner believes of its policy: V(s) = Q(s, π(s)) (N,); None if it learns no values."""
    parts = observations.split(max(2**22 // observations.shape[1], 1))
    values = [learner.value(part, learner.act(part, rng)) for part in parts]
    known = [value for value in values if value is not None]
    return torch.cat(known) if known else None


# --- Behavior cloning


def cloning_loss(output: Tensor, actions: Tensor) -> Tensor:
    """− log softmax of the logits (N, A) at discrete actions (N,); the mean squared distance of continuous ones."""
    if actions.is_floating_point():
        return (output - actions).square().mean()
    return F.cross_entropy(output, actions)


class Cloning:
    """Behavior cloning: supervised learning of the logged actions, which ignores rewards.

    network: logits of discrete actions, or a `Deterministic` policy. penalty: weight of the mean squared logit.
    """

    def __init__(self, network: QNetwork | Deterministic, lr: float, penalty: float = 0.0) -> None:
        self.network, self.penalty = network, penalty
        self.optimizer = torch.optim.Adam(network.parameters(), lr=lr, fused=True)

    @property
    def state(self) -> dict[str, Any]:
        return {"network": self.network, "optimizer": self.optimizer}

    def update(self, batch: Transitions, rng: torch.Generator | None = None) -> dict[str, Tensor]:
        output = self.network(batch.observations)
        loss = cloning_loss(output, batch.actions)
        if self.penalty:
            loss = loss + self.penalty * output.square().mean()
        descend(loss, self.optimizer)
        return {"imitation_loss": loss.detach()}

    def act(self, observations: Tensor, rng: torch.Generator) -> Tensor:
        """Discrete actions are sampled: if the behavior policy took two equally often, the likelier one is noise."""
        policy = self.policy(observations)
        return policy if isinstance(self.network, Deterministic) else Categorical.sample(policy.log(), rng)

    @torch.no_grad()
    def policy(self, observations: Tensor, rng: torch.Generator | None = None) -> Tensor:
        output = self.network(observations)
        return output if isinstance(self.network, Deterministic) else output.softmax(-1)

    def value(self, observations: Tensor, actions: Tensor) -> None:
        return None


# --- Fitted Q evaluation


def return_bounds(rewards: Tensor, gamma: float) -> tuple[float, float]:
    """The least and the largest discounted return that such rewards allow, if an episode may end at any step; γ < 1."""
    return min(0.0, float(rewards.min())) / (1 - gamma), max(0.0, float(rewards.max())) / (1 - gamma)


def action_value(q: nn.Module, observations: Tensor, actions: Tensor) -> Tensor:
    """Q(s, a) (N,): of a QNetwork for discrete actions; for continuous ones the minimum over the critics."""
    if actions.is_floating_point():
        return q(observations, actions).amin(0)
    return gather_actions(q(observations), actions)


def state_value(q: nn.Module, observations: Tensor, policy: Tensor) -> Tensor:
    """V(s) (N,) of a policy: of its probabilities (N, A) with a QNetwork, of its actions (N, A) with critics."""
    if isinstance(q, QNetwork):
        return (policy * q(observations)).sum(-1)
    return q(observations, policy).amin(0)


class FQE:
    """Fitted Q evaluation (Le et al. 2019, arXiv:1903.08738): Q^π of a fixed policy π from another policy's steps.

        Q ← argmin Σ (Q(s, a) − r − γ V_target(s'))²     V(s') = Σ_a π(a|s') Q(s', a), or Q(s', π(s'))

    policy: π at the next observations of `data`, as `state_value` needs it; π is fixed, so it is computed once.
    limits: targets are clamped to them (`return_bounds`). Without limits Q may diverge where π leaves the data.
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
        return {"q": self.q, "target": self.target, "optimizer": self.optimizer}

    def update(self, rows: Tensor) -> float:
        """One gradient step on these rows of the data; its loss."""
        batch = self.data[rows]
        with torch.no_grad():
            next_values = state_value(self.target, batch.next_observations, self.policy[rows])
        targets = td_target(batch.rewards, next_values.clamp(*self.limits), batch.terminated, self.gamma)
        loss = (action_value(self.q, batch.observations, batch.actions) - targets).square().mean()
        descend(loss, self.optimizer)
        polyak_(self.target, self.q, self.tau)
        if not math.isfinite(value := loss.item()):
            raise UserError(
                f"the loss of fitted Q evaluation became {value}: try a smaller learning rate, or scale the data"
            )
        return value

    @torch.no_grad()
    def value(self, observations: Tensor, policy: Tensor) -> Tensor:
        return in_parts(lambda *part: state_value(self.q, *part), observations, policy)


# --- Rewards and scores


def reward_mismatch(
    data: Transitions, envs: Sequence[Env], seeds: Sequence[int], rows: int = 4000
) -> tuple[float, float] | None:
    """Compares logged rewards with the environment's. None if they agree, or if too few steps can be compared; else the
    mean reward of the environment and that of the nearest logged steps.

    Plays an episode of each environment with the action of the nearest logged observation, which keeps it near the
    logs. Each step (s, a, s', whether it terminated) is matched with its nearest logged step, and counts if that is
    about as near as the logged step's own nearest neighbor in the logs; the difference between those two is the
    difference to expect. Where enough steps recur exactly, as in games and finite worlds, only those count.
    """
    rows = min(rows, max(500, 250_000 // data.observations.shape[1]))
    logs = data[torch.arange(0, len(data), -(-len(data) // rows))]
    observation_std, action_std = (
        x.float().std(0).nan_to_num().clamp(min=1e-6) for x in (logs.observations, logs.actions)
    )

    seen = logs.observations / observation_std

    def nearest_action(observations: Tensor) -> Tensor:
        distances = torch.cdist(observations / observation_std, seen)
        return logs.actions[distances.argmin(1)]

    def features(observations: Tensor, actions: Tensor, next_observations: Tensor, terminated: Tensor) -> Tensor:
        scaled = (actions / action_std).view(len(observations), -1)
        parts = observations / observation_std, scaled, next_observations / observation_std, 1e3 * terminated[:, None]
        return torch.cat(parts, 1)

    r = play(envs, nearest_action, seeds)
    on = r.first_episode
    logged = features(logs.observations, logs.actions, logs.next_observations, logs.terminated)
    played = features(*(x[on][:rows] for x in (r.observations, r.actions, r.next_observations, r.terminated)))
    among_logs = torch.cdist(logged, logged, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(math.inf)
    spacing, neighbor = among_logs.min(1)
    distance, match = torch.cdist(played, logged, compute_mode="donot_use_mm_for_euclid_dist").min(1)
    near = distance <= 3 * spacing[match] + 1e-3
    recurs = near & (spacing[match] <= 1e-3)
    near = recurs if int(recurs.sum()) >= 20 else near
    if int(near.sum()) < 20:
        return None
    env_rewards, log_rewards = r.rewards[on][:rows][near], logs.rewards[match[near]]
    expected = (log_rewards - logs.rewards[neighbor[match[near]]]).abs().mean()
    largest = max(float(env_rewards.abs().max()), float(log_rewards.abs().max()))
    if float((env_rewards - log_rewards).abs().mean()) <= 4 * float(expected) + 1e-3 * largest:
        return None
    return float(env_rewards.mean()), float(log_rewards.mean())


def normalized_score(value: float, random: float, expert: float) -> float:
    """D4RL's score: 0 is a random policy, 100 the expert (Fu et al. 2020, arXiv:2004.07219)."""
    return 100 * (value - random) / (expert - random)
