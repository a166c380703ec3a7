"""Advantage-weighted actor-critic (Nair et al. 2020, arXiv:2006.09359): the target uses the policy's own action, the
policy imitates the logged actions with weight ∝ e^{A / λ}, A the advantage over the policy's own action."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from finetune.optim import descend
from finetune.rl.agents.networks import Gaussian, TwinQ
from finetune.rl.agents.targets import critic_loss, polyak_, td_target
from finetune.rl.envs.replay import Transitions

if TYPE_CHECKING:
    from .main import Config


def awac_weights(advantages: Tensor, lam: float) -> Tensor:
    """e^{A / λ}, scaled to a mean of 1 over the batch."""
    return (advantages / lam).softmax(0) * len(advantages)


class AWAC:
    """Twin critics and a Gaussian policy."""

    def __init__(self, cfg: Config, obs_dim: int, action_dim: int) -> None:
        self.cfg, hidden = cfg, [cfg.hidden, cfg.hidden]
        self.critic = TwinQ(obs_dim, action_dim, hidden)
        self.actor = Gaussian(obs_dim, action_dim, hidden)
        self.critic_target = copy.deepcopy(self.critic)
        self.critic_optimizer, self.actor_optimizer = (
            torch.optim.Adam(network.parameters(), lr=cfg.lr, fused=True) for network in (self.critic, self.actor)
        )

    @property
    def state(self) -> dict[str, Any]:
        return {
            "critic": self.critic, "critic_target": self.critic_target, "critic_optimizer": self.critic_optimizer,
            "actor": self.actor, "actor_optimizer": self.actor_optimizer,
        }  # fmt: skip

    def sample(self, observations: Tensor, rng: torch.Generator) -> Tensor:
        return self.actor.sample(self.actor(observations), rng).clamp(-1, 1)

    def update(self, batch: Transitions, rng: torch.Generator) -> dict[str, Tensor]:
        with torch.no_grad():
            next_actions = self.sample(batch.next_observations, rng)
            next_values = self.critic_target(batch.next_observations, next_actions).amin(0)
        targets = td_target(batch.rewards, next_values, batch.terminated, self.cfg.gamma)
        critic = critic_loss(self.critic(batch.observations, batch.actions), targets)
        descend(critic, self.critic_optimizer)

        with torch.no_grad():
            values = self.critic(batch.observations, self.sample(batch.observations, rng)).amin(0)
            advantages = self.critic(batch.observations, batch.actions).amin(0) - values
        log_probs = self.actor.log_prob(self.actor(batch.observations), batch.actions)
        actor = -(awac_weights(advantages, self.cfg.awac_lam) * log_probs).mean()
        descend(actor, self.actor_optimizer)
        polyak_(self.critic_target, self.critic, self.cfg.polyak)
        return {"critic_loss": critic.detach(), "actor_loss": actor.detach()}

    @torch.no_grad()
    def act(self, observations: Tensor, rng: torch.Generator | None = None) -> Tensor:
        return self.actor.mode(self.actor(observations)).clamp(-1, 1)

    policy = act

    @torch.no_grad()
    def value(self, observations: Tensor, actions: Tensor) -> Tensor:
        return self.critic(observations, actions).mean(0)
