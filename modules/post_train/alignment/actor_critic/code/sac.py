"""Soft actor-critic (SAC, Haarnoja et al. 2018, arXiv:1812.05905) with a learned temperature α.

    critics   Q_i(s, a) → r + γ (min_j Q̄_j(s', a') − α log π(a'|s'))         a' ~ π(·|s')
    actor     max E[min_j Q_j(s, a) − α log π(a|s)]                           a ~ π(·|s), reparameterized
    α         rises while the entropy E[−log π] is below its target

One environment step, one update on a batch of the replay. td3.py is its twin, line by line.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from finetune.optim import descend
from finetune.rl.agents.learner import mean_metrics
from finetune.rl.agents.networks import SquashedGaussian, TwinQ
from finetune.rl.agents.reward_scale import RewardSize
from finetune.rl.agents.targets import (
    critic_loss,
    polyak_,
    sac_policy_loss,
    soft_value,
    td_target,
    temperature_loss,
)
from finetune.rl.envs.environments import action_bounds
from finetune.rl.envs.replay import Replay, Transitions
from finetune.rl.envs.vector import VectorEnv

if TYPE_CHECKING:
    from .main import Config

LARGEST_REWARD = 16.0  # the largest reward in the critics' unit: an initial α of 1 is small next to it


class SAC:
    def __init__(self, cfg: Config, envs: VectorEnv) -> None:
        self.cfg, self.envs = cfg, envs
        self.low, self.high = action_bounds(envs.envs[0])  # (A,)
        obs_dim, hidden = envs.observations.shape[1], [cfg.continuous_hidden] * 2
        self.policy = SquashedGaussian(obs_dim, hidden, self.low, self.high)
        self.q = TwinQ(obs_dim, len(self.low), hidden, cfg.critics)
        self.target_q = copy.deepcopy(self.q)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(cfg.alpha or 1.0)))
        self.policy_optimizer = torch.optim.Adam(self.policy.parameters(), lr=0.0, fused=True)
        self.q_optimizer = torch.optim.Adam(self.q.parameters(), lr=0.0, fused=True)
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], lr=cfg.continuous_lr, fused=True)
        self.replay = Replay(cfg.capacity)
        self.rewards = RewardSize()

    @property
    def state(self) -> dict[str, Any]:
        names = ("policy", "q", "target_q", "policy_optimizer", "q_optimizer", "alpha_optimizer", "replay", "rewards")
        return {name: getattr(self, name) for name in names} | {"envs": self.envs, "alpha": {"log": self.log_alpha}}

    # --- Collection

    def noise(self, rows: int, rng: torch.Generator) -> Tensor:
        return torch.randn(rows, len(self.low), generator=rng)  # (rows, A)

    @torch.no_grad()
    def act(self, observations: Tensor, rng: torch.Generator) -> Tensor:
        return self.policy.rsample(self.policy(observations), self.noise(len(observations), rng))[0]

    @torch.no_grad()
    def greedy(self, observations: Tensor) -> Tensor:
        return self.policy.mode(self.policy(observations))

    def collect(self, rng: torch.Generator) -> None:
        """A step of each environment into the replay; uniform actions during the warm-up."""
        obs = torch.from_numpy(self.envs.observations)  # (N, D)
        if self.replay.added < self.cfg.warmup:
            actions = self.low + (self.high - self.low) * torch.rand(len(obs), len(self.low), generator=rng)
        else:
            actions = self.act(obs, rng)  # (N, A)
        rewards, next_obs, terminated, _ = map(torch.from_numpy, self.envs.step(actions))
        self.rewards.see(rewards)
        self.replay.add(Transitions(obs, actions, rewards, next_obs, terminated))

    @property
    def reward_unit(self) -> float:
        """What 1 in the critics is in the environment's rewards."""
        return self.rewards.size / LARGEST_REWARD

    def sample(self, rng: torch.Generator) -> Transitions:
        """A batch of B transitions, with rewards in the critics' unit."""
        batch = self.replay.sample(self.cfg.batch, rng)
        batch.rewards = batch.rewards / self.reward_unit
        if self.cfg.shuffle:
            batch.rewards = batch.rewards[torch.randperm(len(batch), generator=rng)]
        return batch

    # --- Update

    def update(self, batch: Transitions, rng: torch.Generator) -> dict[str, Tensor]:
        cfg, policy, alpha = self.cfg, self.policy, self.log_alpha.detach().exp()

        with torch.no_grad():
            next_params = policy(batch.next_observations)  # (B, 2 A)
            next_actions, next_log_probs = policy.rsample(next_params, self.noise(len(batch), rng))  # (B, A), (B,)
            next_q = self.target_q(batch.next_observations, next_actions)  # (C, B)
            target = td_target(batch.rewards, soft_value(next_q, next_log_probs, alpha), batch.terminated, cfg.gamma)
        q = self.q(batch.observations, batch.actions)  # (C, B)
        q_loss = critic_loss(q, target)
        descend(q_loss, self.q_optimizer)

        actions, log_probs = policy.rsample(policy(batch.observations), self.noise(len(batch), rng))  # (B, A), (B,)
        policy_loss = sac_policy_loss(self.q(batch.observations, actions), log_probs, alpha)
        descend(policy_loss, self.policy_optimizer)

        if cfg.alpha is None:
            descend(temperature_loss(self.log_alpha, log_probs, policy.target_entropy), self.alpha_optimizer)
        polyak_(self.target_q, self.q, cfg.tau)
        return {"q_loss": q_loss.detach(), "q": self.reward_unit * q.detach().mean(),
                "policy_loss": policy_loss.detach(), "alpha": alpha, "entropy": -log_probs.detach().mean()}  # fmt: skip

    # --- Loop

    def train_for(self, steps: int, lr_scale: float, rng: torch.Generator) -> dict[str, float]:
        """About `steps` environment steps: collect, sample, update, repeat. Returns the means of the updates' figures,
        nothing during the warm-up."""
        for optimizer in (self.policy_optimizer, self.q_optimizer):
            optimizer.param_groups[0]["lr"] = lr_scale * self.cfg.continuous_lr
        metrics = []
        for _ in range(round(steps / len(self.envs))):
            self.collect(rng)
            if self.replay.added >= self.cfg.warmup:
                metrics.append(self.update(self.sample(rng), rng))
        return mean_metrics(metrics)
