"""One-step actor-critic (Sutton & Barto 2018, section 13.5): every step is an update; its advantage is the TD error.

    δ = r + γ V(s') − V(s)          ∇ = −δ ∇log π(a|s) − 2 c_v δ ∇V(s)

Here N environments make a step together and δ is averaged over them. Networks: those of a2c.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from finetune.rl.advantages import td_errors
from finetune.rl.agents.learner import mean_metrics
from finetune.rl.agents.reward_scale import RewardSize
from finetune.rl.envs.environments import sizes
from finetune.rl.envs.rollout import Rollout
from finetune.rl.envs.vector import VectorEnv

from .a2c import ActorCritic, a2c_loss, shuffled

if TYPE_CHECKING:
    from .main import Config


class OneStep:
    def __init__(self, cfg: Config, envs: VectorEnv) -> None:
        self.cfg, self.envs = cfg, envs
        self.model = ActorCritic(*sizes(envs.envs[0]), cfg.hidden, cfg.shared_trunk, cfg.value_scale)
        self.rates = cfg.online_lr, cfg.online_lr  # of the actor, of the critic
        groups = [{"params": self.model.actor_parameters}, {"params": list(self.model.value.parameters())}]
        self.optimizer = torch.optim.Adam(groups, lr=0.0, eps=1e-5, fused=True)
        self.rewards = RewardSize()

    @property
    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "envs": self.envs, "rewards": self.rewards}

    # --- Collection

    @torch.no_grad()
    def act(self, observations: Tensor, rng: torch.Generator) -> Tensor:
        return self.model.policy.sample(self.model.distribution(observations), rng)

    @torch.no_grad()
    def greedy(self, observations: Tensor) -> Tensor:
        return self.model.policy.mode(self.model.distribution(observations))

    def collect(self, rng: torch.Generator) -> Rollout:
        """(1, N) steps, with rewards in units of the largest so far."""
        rollout = self.envs.collect(lambda obs: self.act(obs, rng), 1)
        rollout.rewards = rollout.rewards / self.rewards.see(rollout.rewards)
        return rollout

    # --- Update

    def update(self, rollout: Rollout, rng: torch.Generator) -> dict[str, Tensor]:
        cfg, policy = self.cfg, self.model.policy
        params, values = self.model(rollout.observations)  # (1, N, P), (1, N)
        with torch.no_grad():
            next_values = self.model.values(rollout.next_observations)  # (1, N)
        advantages = td_errors(rollout.rewards, values.detach(), next_values, rollout.terminated, cfg.gamma)  # δ (1, N)
        targets = advantages + values.detach()  # r + γ V(s'), constant
        if cfg.shuffle:
            advantages = shuffled(advantages, rng)
        log_probs, entropies = policy.log_prob(params, rollout.actions), policy.entropy(params)  # (1, N)
        loss, parts = a2c_loss(log_probs, advantages, values, targets, entropies, cfg.value_weight, cfg.entropy)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return parts

    # --- Loop

    def train_for(self, steps: int, lr_scale: float, rng: torch.Generator) -> dict[str, float]:
        """About `steps` environment steps, an update after each. Returns the means of the updates' figures."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = lr_scale * rate
        updates = max(1, round(steps / len(self.envs)))
        return mean_metrics([self.update(self.collect(rng), rng) for _ in range(updates)])

    def freeze(self) -> None:
        """From now on only the critic learns; with a shared trunk, only its last layer."""
        self.rates = 0.0, self.rates[1]
