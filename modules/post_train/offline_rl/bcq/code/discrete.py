"""Learners from logged steps with discrete actions: DQN, behavior cloning, and BCQ between the two."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.optim import descend
from finetune.rl.agents.networks import Categorical, QNetwork
from finetune.rl.agents.targets import double_dqn_target, gather_actions, td_loss
from finetune.rl.envs.replay import Transitions

from . import losses


class Networks(nn.Module):
    """Q and the imitator's logits; they share all layers but the last, or none."""

    def __init__(self, observations: int, actions: int, hidden: int, shared: bool) -> None:
        super().__init__()
        self.q = QNetwork(observations, actions, [hidden, hidden])
        self.imitator = nn.Linear(hidden, actions) if shared else QNetwork(observations, actions, [hidden, hidden])
        self.shared = shared

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """(N, D) → Q (N, A), logits (N, A)"""
        if not self.shared:
            return self.q(observations), self.imitator(observations)
        seen = self.q.net[:-1](observations)
        return self.q.net[-1](seen), self.imitator(seen)


class Learner:
    """Networks and an optimizer. `scores` (N, A): the action taken is that of the largest."""

    def __init__(self, cfg, networks: Any) -> None:
        self.cfg, self.networks = cfg, networks
        self.optimizer = torch.optim.Adam(networks.parameters(), lr=cfg.lr, fused=True)

    def scores(self, observations: Tensor) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def act(self, observations: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.scores(observations).argmax(-1)

    @torch.no_grad()
    def policy_of(self, observations: Tensor) -> Tensor:
        """Its probabilities (N, A)."""
        scores = self.scores(observations)
        return F.one_hot(scores.argmax(-1), scores.shape[-1]).float()


class Cloning(Learner):
    """The imitator alone. Its actions are drawn: the likelier of two that the behavior took alike would be noise."""

    @torch.no_grad()
    def policy_of(self, observations: Tensor) -> Tensor:
        return self.scores(observations).softmax(-1)

    def act(self, observations: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return Categorical.sample(self.policy_of(observations).log(), generator)

    def scores(self, observations: Tensor) -> Tensor:
        return self.networks(observations)

    def update(self, batch: Transitions, step: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        loss = losses.imitation_loss(self.networks(batch.observations), batch.actions, self.cfg.beta)
        descend(loss, self.optimizer)
        return {"imitation_loss": loss.detach()}

    def value(self, observations: Tensor, actions: Tensor) -> None:
        """It has none."""

    def state(self) -> dict[str, Any]:
        return {"networks": self.networks, "optimizer": self.optimizer}


class DQN(Learner):
    """Double DQN on logged steps as if they were its own: the naive way."""

    def __init__(self, cfg, networks: Any) -> None:
        super().__init__(cfg, networks)
        self.target_q = copy.deepcopy(self.q)

    @property
    def q(self) -> QNetwork:
        return self.networks

    def scores(self, observations: Tensor) -> Tensor:
        return self.q(observations)

    @torch.no_grad()
    def targets(self, batch: Transitions) -> Tensor:
        """r + γ Q_target(s', a'), a' the action that would be taken in s'."""
        scores, following = self.scores(batch.next_observations), self.target_q(batch.next_observations)
        return double_dqn_target(scores, following, batch.rewards, batch.terminated, self.cfg.gamma)

    def update(self, batch: Transitions, step: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        loss = td_loss(gather_actions(self.q(batch.observations), batch.actions), self.targets(batch))
        descend(loss, self.optimizer)
        self.copy_target(step)
        return {"td_loss": loss.detach()}

    def copy_target(self, step: int) -> None:
        if (step + 1) % self.cfg.target_every == 0:
            self.target_q.load_state_dict(self.q.state_dict())

    @torch.no_grad()
    def value(self, observations: Tensor, actions: Tensor) -> Tensor:
        return gather_actions(self.q(observations), actions)

    def state(self) -> dict[str, Any]:
        return {"networks": self.networks, "optimizer": self.optimizer, "target": self.target_q}


class BCQ(DQN):
    """DQN whose argmax, in the target and in acting, runs over what an imitator of the data thinks likely enough."""

    def __init__(self, cfg, networks: Networks, tau: float) -> None:
        super().__init__(cfg, networks)
        self.tau = tau

    @property
    def q(self) -> QNetwork:
        return self.networks.q

    def scores(self, observations: Tensor) -> Tensor:
        return losses.filtered(*self.networks(observations), self.tau)

    def update(self, batch: Transitions, step: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        q, logits = self.networks(batch.observations)
        td = td_loss(gather_actions(q, batch.actions), self.targets(batch))
        imitation = losses.imitation_loss(logits, batch.actions, self.cfg.beta)
        descend(td + imitation, self.optimizer)
        self.copy_target(step)
        return {"td_loss": td.detach(), "imitation_loss": imitation.detach()}
