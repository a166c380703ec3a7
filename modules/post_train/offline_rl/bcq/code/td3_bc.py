"""TD3 on logged steps, the naive learner, and TD3+BC (Fujimoto & Gu 2021, arXiv:2106.06860), which adds the squared
distance from the logged action to the policy's loss. Actions are scaled to −1 … 1."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from finetune.optim import descend
from finetune.rl.agents.networks import Deterministic, TwinQ
from finetune.rl.agents.offline import cloning_loss
from finetune.rl.agents.targets import critic_loss, polyak_, smoothed_actions, td3_policy_loss, td_target
from finetune.rl.envs.replay import Transitions

if TYPE_CHECKING:
    from .main import Config

NOISE, NOISE_CLIP, POLICY_EVERY = 0.2, 0.5, 2  # TD3's: target smoothing, and updates to one of the policy


def td3_bc_loss(q: Tensor, policy_actions: Tensor, actions: Tensor, alpha: float) -> Tensor:
    """− α Q / mean|Q| + (π(s) − a)²: Q is divided by its scale, so that α fits rewards of any unit."""
    return -alpha / q.abs().mean().detach() * q.mean() + cloning_loss(policy_actions, actions)


class TD3:
    """TD3: twin critics, smoothed target actions, a policy that is updated every second time."""

    behavior_cloning = False

    def __init__(self, cfg: Config, obs_dim: int, action_dim: int) -> None:
        self.cfg, self.high, hidden = cfg, torch.ones(action_dim), [cfg.hidden, cfg.hidden]
        self.critic = TwinQ(obs_dim, action_dim, hidden)
        self.actor = Deterministic(obs_dim, hidden, -self.high, self.high)
        self.critic_target, self.actor_target = copy.deepcopy(self.critic), copy.deepcopy(self.actor)
        self.critic_optimizer, self.actor_optimizer = (
            torch.optim.Adam(network.parameters(), lr=cfg.lr, fused=True) for network in (self.critic, self.actor)
        )
        self.counts = {"updates": 0}

    @property
    def state(self) -> dict[str, Any]:
        return {
            "critic": self.critic, "critic_target": self.critic_target, "critic_optimizer": self.critic_optimizer,
            "actor": self.actor, "actor_target": self.actor_target, "actor_optimizer": self.actor_optimizer,
            "counts": self.counts,
        }  # fmt: skip

    def update(self, batch: Transitions, rng: torch.Generator) -> dict[str, Tensor]:
        with torch.no_grad():
            noise = NOISE * torch.randn(batch.actions.shape, generator=rng)
            next_actions = self.actor_target(batch.next_observations)
            next_actions = smoothed_actions(next_actions, noise, NOISE_CLIP, -self.high, self.high)
            next_values = self.critic_target(batch.next_observations, next_actions).amin(0)
        targets = td_target(batch.rewards, next_values, batch.terminated, self.cfg.gamma)
        critic = critic_loss(self.critic(batch.observations, batch.actions), targets)
        descend(critic, self.critic_optimizer)
        metrics = {"critic_loss": critic.detach()}

        self.counts["updates"] += 1
        if self.counts["updates"] % POLICY_EVERY == 0:
            policy_actions = self.actor(batch.observations)
            q = self.critic(batch.observations, policy_actions)
            if self.behavior_cloning:
                actor = td3_bc_loss(q[0], policy_actions, batch.actions, self.cfg.alpha)
            else:
                actor = td3_policy_loss(q)
            descend(actor, self.actor_optimizer)
            polyak_(self.critic_target, self.critic, self.cfg.polyak)
            polyak_(self.actor_target, self.actor, self.cfg.polyak)
            metrics["actor_loss"] = actor.detach()
        return metrics

    @torch.no_grad()
    def act(self, observations: Tensor, rng: torch.Generator | None = None) -> Tensor:
        return self.actor(observations)

    policy = act

    @torch.no_grad()
    def value(self, observations: Tensor, actions: Tensor) -> Tensor:
        return self.critic(observations, actions).mean(0)


class TD3BC(TD3):
    """TD3 with the cloning term in the policy's loss."""

    behavior_cloning = True
