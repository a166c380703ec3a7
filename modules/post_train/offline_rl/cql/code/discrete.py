"""Learners of discrete actions: behavior cloning, and Q-learning from logged steps, conservative or not."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.optim import descend
from finetune.rl.agents.networks import Categorical, QNetwork, greedy_policy
from finetune.rl.agents.offline import cloning_loss
from finetune.rl.agents.targets import double_dqn_target, gather_actions, polyak_, td_loss
from finetune.rl.envs.environments import Act
from finetune.rl.envs.replay import Transitions

from .losses import cql_h, cql_rho, dual_loss, weight


class Clone:
    """π(a|s) ∝ exp of the network's output."""

    def __init__(self, network: QNetwork, lr: float) -> None:
        self.q = network
        self.optimizer = torch.optim.Adam(network.parameters(), lr=lr, fused=True)

    @property
    def state(self) -> dict[str, Any]:
        return {"q": self.q, "optimizer": self.optimizer}

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.optimizer]

    def acting(self, generator: torch.Generator) -> Act:
        """Actions are drawn: the likelier one of two that the behavior took alike would be noise."""
        return lambda observations: Categorical.sample(self.policy_of(observations).log(), generator)

    @torch.no_grad()
    def policy_of(self, observations: Tensor) -> Tensor:
        """Its probabilities (N, A)."""
        return self.q(observations).softmax(-1)

    def update(self, batch: Transitions, *_: Any) -> dict[str, float]:
        loss = cloning_loss(self.q(batch.observations), batch.actions)
        descend(loss, self.optimizer)
        return {"loss": loss.item()}


class QLearner:
    """Double DQN with α · gap added to its loss: α = 0 is double DQN.

    threshold: α is learned so that the gap comes to this; `alpha` is where it starts.
    """

    def __init__(
        self,
        network: QNetwork,
        *,
        alpha: float,
        gamma: float,
        lr: float,
        tau: float,
        rho: bool = False,
        threshold: float | None = None,
    ) -> None:
        self.q, self.target = network, copy.deepcopy(network)
        self.alpha, self.gamma, self.tau, self.rho, self.threshold = alpha, gamma, tau, rho, threshold
        self.optimizer = torch.optim.Adam(network.parameters(), lr=lr, fused=True)
        self.log_alpha = torch.tensor(alpha, dtype=torch.float32).log().requires_grad_(threshold is not None)
        self.dual = torch.optim.Adam([self.log_alpha], lr=lr) if threshold is not None else None

    @property
    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"q": self.q, "target": self.target, "optimizer": self.optimizer}
        return state if self.dual is None else state | {"dual": self.dual, "alpha": {"log_alpha": self.log_alpha}}

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.optimizer] if self.dual is None else [self.optimizer, self.dual]

    def acting(self, generator: torch.Generator) -> Act:
        return greedy_policy(self.q)

    def policy_of(self, observations: Tensor) -> Tensor:
        """Its probabilities (N, A)."""
        return F.one_hot(greedy_policy(self.q)(observations), self.q.actions).float()

    @torch.no_grad()
    def value(self, observations: Tensor) -> Tensor:
        """What it believes: max_a Q(s, a) (N,)."""
        return self.q(observations).amax(-1)

    def loss(self, batch: Transitions) -> tuple[Tensor, Tensor, Tensor]:
        """(td, gap, Q of the data's actions (N,)); the loss is td + α · gap."""
        with torch.no_grad():
            online, target = self.q(batch.next_observations), self.target(batch.next_observations)
        wanted = double_dqn_target(online, target, batch.rewards, batch.terminated, self.gamma)
        values = self.q(batch.observations)  # (N, A)
        taken = gather_actions(values, batch.actions)
        if self.rho:
            with torch.no_grad():
                log_prior = self.target(batch.observations).log_softmax(-1)
            gap = cql_rho(values, batch.actions, log_prior)
        else:
            gap = cql_h(values, batch.actions)
        return td_loss(taken, wanted), gap.mean(), taken

    def update(self, batch: Transitions, *_: Any) -> dict[str, float]:
        td, gap, taken = self.loss(batch)
        if self.dual is not None:
            descend(dual_loss(self.log_alpha, gap, self.threshold), self.dual)
            self.alpha = weight(self.log_alpha).item()
        descend(td + self.alpha * gap, self.optimizer)
        polyak_(self.target, self.q, self.tau)
        return {"td_loss": td.item(), "gap": gap.item(), "value": taken.mean().item()}
