"""Advantage actor-critic (A2C, the synchronous A3C of Mnih et al. 2016, arXiv:1602.01783).

    A_t = r_t + γ r_{t+1} + … + γⁿ V(s_{t+n}) − V(s_t)                  n: the steps that are left in the rollout
    L   = −mean(log π(a_t|s_t) A_t) + c_v mean((V(s_t) − G_t)²) − c_e mean(H)          G_t = A_t + V(s_t)

No gradient passes through A and G. An update uses the last T steps of N environments, and each step once.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from finetune import ops
from finetune.rl.agents.learner import mean_metrics
from finetune.rl.agents.networks import Categorical, Gaussian, Value, tanh_mlp
from finetune.rl.agents.reward_scale import RewardSize
from finetune.rl.envs.environments import sizes
from finetune.rl.envs.rollout import Rollout
from finetune.rl.envs.spaces import Image
from finetune.rl.envs.vector import VectorEnv

if TYPE_CHECKING:
    from .main import Config


class ActorCritic(nn.Module):
    """π(a|s) and V(s): two networks, or two layers on the features of a shared trunk."""

    def __init__(
        self,
        observed: int | Image,
        actions: int,
        continuous: bool,
        hidden: int,
        shared: bool,
        value_scale: float = 1.0,
    ) -> None:
        super().__init__()
        widths, self.value_scale = [hidden, hidden], value_scale
        self.trunk: nn.Module = nn.Identity()
        if shared:
            self.trunk = nn.Sequential(tanh_mlp([observed, *widths], last_scale=math.sqrt(2)), nn.Tanh())
            observed, widths = hidden, []
        self.policy = (Gaussian if continuous else Categorical)(observed, actions, widths)
        self.value = Value(observed, widths)

    @property
    def actor_parameters(self) -> list[nn.Parameter]:
        return [*self.trunk.parameters(), *self.policy.parameters()]

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """observations (…, D) → the policy's distribution (…, P), V (…)."""
        *lead, _ = observations.shape
        features = self.trunk(observations.flatten(0, -2))  # the backward pass of a 2-d linear layer is faster
        params, values = self.policy(features), self.value_scale * self.value(features)
        return params.view(*lead, -1), values.view(lead)

    def distribution(self, observations: Tensor) -> Tensor:
        return self.policy(self.trunk(observations))  # (…, P)

    def values(self, observations: Tensor) -> Tensor:
        return self.value_scale * self.value(self.trunk(observations))  # (…)


class A2C:
    def __init__(self, cfg: Config, envs: VectorEnv) -> None:
        self.cfg, self.envs = cfg, envs
        self.model = ActorCritic(*sizes(envs.envs[0]), cfg.hidden, cfg.shared_trunk, cfg.value_scale)
        self.rates = cfg.lr, cfg.critic_rate * cfg.lr  # of the actor, of the critic
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
        """(T, N) steps. Rewards are in units of the largest so far, so learning rates fit any environment."""
        rollout = self.envs.collect(lambda obs: self.act(obs, rng), self.cfg.horizon)
        rollout.rewards = rollout.rewards / self.rewards.see(rollout.rewards)
        return rollout

    # --- Update

    def update(self, rollout: Rollout, rng: torch.Generator) -> dict[str, Tensor]:
        cfg, policy = self.cfg, self.model.policy
        params, values = self.model(rollout.observations)  # (T, N, P), (T, N)
        baseline = values.detach()
        # (T, N) each; λ = 1: all rewards that are left in the rollout, then V
        advantages, returns = ops.gae(
            rollout.rewards, baseline, next_state_values(self.model, rollout, baseline),
            rollout.terminated, rollout.truncated, gamma=cfg.gamma, lam=1.0,
        )  # fmt: skip
        if cfg.shuffle:
            advantages = shuffled(advantages, rng)
        log_probs, entropies = policy.log_prob(params, rollout.actions), policy.entropy(params)  # (T, N)
        loss, parts = a2c_loss(log_probs, advantages, values, returns, entropies, cfg.value_weight, cfg.entropy)
        self.optimizer.zero_grad()
        loss.backward()
        clip_(self.model.actor_parameters, cfg.clip)  # the actor's alone: the critic's gradient is far larger at first
        self.optimizer.step()
        return parts

    # --- Loop

    def train_for(self, steps: int, lr_scale: float, rng: torch.Generator) -> dict[str, float]:
        """About `steps` environment steps: collect, update, repeat. Returns the means of the updates' figures."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = lr_scale * rate
        updates = max(1, round(steps / (self.cfg.horizon * len(self.envs))))
        return mean_metrics([self.update(self.collect(rng), rng) for _ in range(updates)])

    def freeze(self) -> None:
        """From now on only the critic learns; with a shared trunk, only its last layer."""
        self.rates = 0.0, self.rates[1]


def a2c_loss(
    log_probs: Tensor, advantages: Tensor, values: Tensor, returns: Tensor, entropies: Tensor,
    value_weight: float = 0.5, entropy_weight: float = 0.01,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """L of the head of this file and its parts; all arguments (T, N). advantages and returns are constants."""
    policy_loss = -(log_probs * advantages).mean()
    value_loss = (values - returns).square().mean()
    entropy = entropies.mean()
    parts = {"policy_loss": policy_loss.detach(), "value_loss": value_loss.detach(), "entropy": entropy.detach()}
    return policy_loss + value_weight * value_loss - entropy_weight * entropy, parts


@torch.no_grad()
def next_state_values(model: ActorCritic, rollout: Rollout, values: Tensor) -> Tensor:
    """V(s_{t+1}) (T, N). Inside an episode it is V of the next row; after a truncation V of the state in which the
    episode stopped, not of the next one's first state. (After a termination it is not used.)"""
    next_values = torch.cat([values[1:], model.values(rollout.next_observations[-1:])])
    truncated = rollout.truncated[:-1]
    if truncated.any():
        next_values[:-1][truncated] = model.values(rollout.next_observations[:-1][truncated])
    return next_values


def clip_(parameters: list[nn.Parameter], max_norm: float) -> None:
    ops.clip_grad_norm_([p.grad for p in parameters if p.grad is not None], max_norm)


def shuffled(values: Tensor, rng: torch.Generator) -> Tensor:
    """The control of `--shuffle`: advantages in a random order carry no signal."""
    return values.flatten()[torch.randperm(values.numel(), generator=rng)].view_as(values)
