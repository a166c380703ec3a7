"""Batch-constrained Q-learning with discrete actions (Fujimoto et al. 2019, arXiv:1910.01708): double DQN whose argmax
runs over actions that an imitator of the data finds likely enough.

    π(s) = argmax { Q(s, a) : G(a|s) ≥ τ max_b G(b|s) }        y = r + γ Q_target(s', π(s'))

τ = 0 excludes nothing and is double DQN, the naive learner; τ = 1 leaves the imitator's favorite alone and is cloning.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.optim import descend
from finetune.rl.agents.networks import QNetwork
from finetune.rl.agents.offline import OfflineLearner, cloning_loss
from finetune.rl.agents.targets import double_dqn_target, gather_actions, td_loss
from finetune.rl.envs.replay import Transitions
from finetune.rl.envs.spaces import Image
from finetune.runs.run import Run

from .evaluation import LOG_EVERY, curve, evaluate

if TYPE_CHECKING:
    from .data import Task
    from .main import Config

# --- Networks


class QAndImitator(nn.Module):
    """Q(s, ·) and the imitator's logits of G(·|s); they share all layers but the last, or none."""

    def __init__(self, observed: int | Image, actions: int, hidden: int, shared: bool) -> None:
        super().__init__()
        self.q = QNetwork(observed, actions, [hidden, hidden])
        self.imitator = nn.Linear(hidden, actions) if shared else QNetwork(observed, actions, [hidden, hidden])
        self.shared = shared

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """(N, D) → Q (N, A), logits (N, A)"""
        if not self.shared:
            return self.q(observations), self.imitator(observations)
        features = self.q.net[:-1](observations)
        return self.q.net[-1](features), self.imitator(features)


# --- The filter and the imitator's loss


def allowed(logits: Tensor, tau: float) -> Tensor:
    """(…, A) bool: the actions with G(a|s) ≥ τ max G(·|s), G the softmax of the imitator's logits.

    Exact at both ends: τ = 0 allows every action, τ = 1 the likeliest alone (and any of equal probability).
    """
    threshold = math.log(tau) if tau > 0 else -math.inf
    return logits - logits.amax(-1, keepdim=True) >= threshold


def filtered(q: Tensor, logits: Tensor, tau: float) -> Tensor:
    """Q, with −∞ for actions that the imitator does not allow: its argmax is BCQ's action."""
    return q.masked_fill(~allowed(logits, tau), -math.inf)


def imitation_loss(logits: Tensor, actions: Tensor, beta: float) -> Tensor:
    """− log G(a|s) + β mean(logit²)"""
    return cloning_loss(logits, actions) + beta * logits.square().mean()


# --- The learners


class DQN:
    """Double DQN on logged steps: the naive learner. The target network is copied every `target_every` updates."""

    def __init__(self, cfg: Config, q: QNetwork) -> None:
        self.cfg, self.q, self.target = cfg, q, copy.deepcopy(q)
        self.optimizer = torch.optim.Adam(q.parameters(), lr=cfg.lr, fused=True)
        self.counts = {"updates": 0}

    @property
    def state(self) -> dict[str, Any]:
        return {"q": self.q, "target": self.target, "optimizer": self.optimizer, "counts": self.counts}

    def update(self, batch: Transitions, rng: torch.Generator | None = None) -> dict[str, Tensor]:
        with torch.no_grad():
            next_q, next_target = self.q(batch.next_observations), self.target(batch.next_observations)
        targets = double_dqn_target(next_q, next_target, batch.rewards, batch.terminated, self.cfg.gamma)
        loss = td_loss(gather_actions(self.q(batch.observations), batch.actions), targets)
        descend(loss, self.optimizer)
        self.counts["updates"] += 1
        if self.counts["updates"] % self.cfg.target_every == 0:
            self.target.load_state_dict(self.q.state_dict())
        return {"td_loss": loss.detach()}

    @torch.no_grad()
    def act(self, observations: Tensor, rng: torch.Generator | None = None) -> Tensor:
        return self.q(observations).argmax(-1)

    def policy(self, observations: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Probabilities (N, A): 1 for the greedy action."""
        return F.one_hot(self.act(observations), self.q.actions).float()

    @torch.no_grad()
    def value(self, observations: Tensor, actions: Tensor) -> Tensor:
        return gather_actions(self.q(observations), actions)


class BCQ:
    """Double DQN with the filter in its target and in its policy."""

    def __init__(self, cfg: Config, networks: QAndImitator, tau: float) -> None:
        self.cfg, self.networks, self.tau = cfg, networks, tau
        self.q, self.target = networks.q, copy.deepcopy(networks.q)
        self.optimizer = torch.optim.Adam(networks.parameters(), lr=cfg.lr, fused=True)
        self.counts = {"updates": 0}

    @property
    def state(self) -> dict[str, Any]:
        return {"networks": self.networks, "target": self.target, "optimizer": self.optimizer, "counts": self.counts}

    def filtered_q(self, observations: Tensor) -> Tensor:
        q, logits = self.networks(observations)
        return filtered(q, logits, self.tau)

    @torch.no_grad()
    def targets(self, batch: Transitions) -> Tensor:
        """r + γ Q_target(s', a'), a' the allowed action of the largest Q(s', ·)."""
        next_q, next_target = self.filtered_q(batch.next_observations), self.target(batch.next_observations)
        return double_dqn_target(next_q, next_target, batch.rewards, batch.terminated, self.cfg.gamma)

    def update(self, batch: Transitions, rng: torch.Generator | None = None) -> dict[str, Tensor]:
        q, logits = self.networks(batch.observations)
        td = td_loss(gather_actions(q, batch.actions), self.targets(batch))
        imitation = imitation_loss(logits, batch.actions, self.cfg.beta)
        descend(td + imitation, self.optimizer)
        self.counts["updates"] += 1
        if self.counts["updates"] % self.cfg.target_every == 0:
            self.target.load_state_dict(self.q.state_dict())
        return {"td_loss": td.detach(), "imitation_loss": imitation.detach()}

    @torch.no_grad()
    def act(self, observations: Tensor, rng: torch.Generator | None = None) -> Tensor:
        return self.filtered_q(observations).argmax(-1)

    def policy(self, observations: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Probabilities (N, A): 1 for BCQ's action."""
        return F.one_hot(self.act(observations), self.q.actions).float()

    @torch.no_grad()
    def value(self, observations: Tensor, actions: Tensor) -> Tensor:
        return gather_actions(self.q(observations), actions)


# --- Training


def train(cfg: Config, run: Run, task: Task, name: str, learner: OfflineLearner) -> dict[str, float]:
    """Trains one learner; what `evaluate` finds at the end. The batch of a step is the same for every learner."""
    last: dict[str, float] = {}
    state = learner.state | {"last": last} | task.limit
    for step in run.steps(cfg.steps, state, phase=f"{task.name}_{name}"):
        batch = task.steps.sample(cfg.batch, run.generator("batch", step))
        metrics = learner.update(batch, run.generator("update", step))
        if (step + 1) % cfg.eval_every == 0 or step + 1 == cfg.steps:
            last |= evaluate(cfg, run, task, learner)
            run.log(step, **metrics, **curve(last))
        elif (step + 1) % LOG_EVERY == 0:
            run.log(step, **metrics)
    return last or evaluate(cfg, run, task, learner)
