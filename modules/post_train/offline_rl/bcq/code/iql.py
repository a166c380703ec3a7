"""Implicit Q-learning (Kostrikov et al. 2021, arXiv:2110.06169): V is a high expectile of Q over the logged actions, so
no other action is ever valued; the policy imitates the logged actions with weight e^{β (Q − V)}."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from finetune.optim import descend
from finetune.rl.agents.networks import Gaussian, TwinQ, Value
from finetune.rl.agents.targets import critic_loss, polyak_, td_target
from finetune.rl.envs.replay import Transitions

if TYPE_CHECKING:
    from .main import Config


def expectile_loss(difference: Tensor, expectile: float) -> Tensor:
    """|τ − 1(u < 0)| u², minimized by the τ-expectile; τ = 0.5 is half the squared error."""
    return ((expectile - (difference < 0).to(difference)).abs() * difference.square()).mean()


def iql_weights(advantages: Tensor, temperature: float, largest: float = 100.0) -> Tensor:
    """min(e^{β A}, largest): the weight of a logged action in the policy's loss."""
    return (temperature * advantages).exp().clamp(max=largest)


class IQL:
    """Twin critics, V, and a Gaussian policy."""

    def __init__(self, cfg: Config, obs_dim: int, action_dim: int) -> None:
        self.cfg, hidden = cfg, [cfg.hidden, cfg.hidden]
        self.critic = TwinQ(obs_dim, action_dim, hidden)
        self.actor = Gaussian(obs_dim, action_dim, hidden)
        self.v = Value(obs_dim, hidden)
        self.critic_target = copy.deepcopy(self.critic)
        self.critic_optimizer, self.actor_optimizer, self.v_optimizer = (
            torch.optim.Adam(network.parameters(), lr=cfg.lr, fused=True)
            for network in (self.critic, self.actor, self.v)
        )

    @property
    def state(self) -> dict[str, Any]:
        return {
            "critic": self.critic, "critic_target": self.critic_target, "critic_optimizer": self.critic_optimizer,
            "actor": self.actor, "actor_optimizer": self.actor_optimizer, "v": self.v, "v_optimizer": self.v_optimizer,
        }  # fmt: skip

    def update(self, batch: Transitions, rng: torch.Generator | None = None) -> dict[str, Tensor]:
        with torch.no_grad():
            q = self.critic_target(batch.observations, batch.actions).amin(0)
        advantages = q - self.v(batch.observations)
        v = expectile_loss(advantages, self.cfg.expectile)
        descend(v, self.v_optimizer)

        weights = iql_weights(advantages.detach(), self.cfg.temperature)
        log_probs = self.actor.log_prob(self.actor(batch.observations), batch.actions)
        actor = -(weights * log_probs).mean()
        descend(actor, self.actor_optimizer)

        with torch.no_grad():
            next_values = self.v(batch.next_observations)
        targets = td_target(batch.rewards, next_values, batch.terminated, self.cfg.gamma)
        critic = critic_loss(self.critic(batch.observations, batch.actions), targets)
        descend(critic, self.critic_optimizer)
        polyak_(self.critic_target, self.critic, self.cfg.polyak)
        return {"v_loss": v.detach(), "actor_loss": actor.detach(), "critic_loss": critic.detach()}

    @torch.no_grad()
    def act(self, observations: Tensor, rng: torch.Generator | None = None) -> Tensor:
        return self.actor.mode(self.actor(observations)).clamp(-1, 1)

    policy = act

    @torch.no_grad()
    def value(self, observations: Tensor, actions: Tensor) -> Tensor:
        return self.critic(observations, actions).mean(0)
