"""Twin delayed deep deterministic policy gradient (TD3, Fujimoto et al. 2018, arXiv:1802.09477).

    critics   Q_i(s, a) → r + γ min_j Q̄_j(s', a')             a' = π̄(s') + clipped noise
    actor     max E[Q₁(s, π(s))]                              every `policy_delay`-th update

One environment step, one update on a batch of the replay. sac.py is its twin, line by line. With one critic, no delay
and no target noise it is DDPG (Lillicrap et al. 2016, arXiv:1509.02971).
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from finetune.optim import descend
from finetune.rl.agents.learner import mean_metrics
from finetune.rl.agents.networks import Deterministic, TwinQ
from finetune.rl.agents.reward_scale import RewardSize
from finetune.rl.agents.targets import critic_loss, polyak_, smoothed_actions, td3_policy_loss, td_target
from finetune.rl.envs.environments import action_bounds
from finetune.rl.envs.replay import Replay, Transitions
from finetune.rl.envs.vector import VectorEnv

if TYPE_CHECKING:
    from .main import Config

LARGEST_REWARD = 16.0  # the largest reward in the critics' unit, as in sac.py


class TD3:
    def __init__(self, cfg: Config, envs: VectorEnv) -> None:
        self.cfg, self.envs = cfg, envs
        self.low, self.high = action_bounds(envs.envs[0])  # (A,)
        obs_dim, hidden = envs.observations.shape[1], [cfg.continuous_hidden] * 2
        self.policy = Deterministic(obs_dim, hidden, self.low, self.high)
        self.target_policy = copy.deepcopy(self.policy)
        self.q = TwinQ(obs_dim, len(self.low), hidden, cfg.critics)
        self.target_q = copy.deepcopy(self.q)
        self.policy_optimizer = torch.optim.Adam(self.policy.parameters(), lr=0.0, fused=True)
        self.q_optimizer = torch.optim.Adam(self.q.parameters(), lr=0.0, fused=True)
        self.replay = Replay(cfg.capacity)
        self.rewards = RewardSize()
        self.updates = {"count": 0}

    @property
    def state(self) -> dict[str, Any]:
        names = ("policy", "target_policy", "q", "target_q", "policy_optimizer", "q_optimizer", "replay", "rewards")
        return {name: getattr(self, name) for name in names} | {"envs": self.envs, "updates": self.updates}

    # --- Collection

    def noise(self, rows: int, rng: torch.Generator) -> Tensor:
        return torch.randn(rows, len(self.low), generator=rng)  # (rows, A)

    @torch.no_grad()
    def act(self, observations: Tensor, rng: torch.Generator) -> Tensor:
        noise = self.cfg.exploration * self.policy.scale * self.noise(len(observations), rng)
        return torch.clamp(self.policy(observations) + noise, self.low, self.high)

    @torch.no_grad()
    def greedy(self, observations: Tensor) -> Tensor:
        return self.policy(observations)

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
        cfg, scale = self.cfg, self.policy.scale  # (A,) half the width of the bounds

        with torch.no_grad():
            noise = cfg.target_noise * scale * self.noise(len(batch), rng)  # (B, A)
            next_actions = self.target_policy(batch.next_observations)  # (B, A)
            next_actions = smoothed_actions(next_actions, noise, cfg.noise_clip * scale, self.low, self.high)
            next_q = self.target_q(batch.next_observations, next_actions)  # (C, B)
            target = td_target(batch.rewards, next_q.amin(0), batch.terminated, cfg.gamma)  # (B,)
        q = self.q(batch.observations, batch.actions)  # (C, B)
        q_loss = critic_loss(q, target)
        descend(q_loss, self.q_optimizer)
        metrics = {"q_loss": q_loss.detach(), "q": self.reward_unit * q.detach().mean()}

        if self.updates["count"] % cfg.policy_delay == 0:
            policy_loss = td3_policy_loss(self.q(batch.observations, self.policy(batch.observations)))
            descend(policy_loss, self.policy_optimizer)
            polyak_(self.target_q, self.q, cfg.tau)
            polyak_(self.target_policy, self.policy, cfg.tau)
            metrics["policy_loss"] = policy_loss.detach()
        self.updates["count"] += 1
        return metrics

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
