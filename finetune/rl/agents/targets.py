"""Targets and losses of Q-learning, DQN, SAC and TD3 as functions of tensors.

DQN: Mnih et al. 2015; double: van Hasselt et al. 2015, arXiv:1509.06461. SAC: Haarnoja et al. 2018, arXiv:1812.05905.
TD3: Fujimoto et al. 2018, arXiv:1802.09477. Q of several critics is (C, …), the critic first. gamma is γⁿ for a
transition of n steps. Noise is an argument: the same noise gives the same numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def td_target(rewards: Tensor, next_values: Tensor, terminated: Tensor, gamma: float | Tensor) -> Tensor:
    """r + γ V(s'), where V(s') = 0 after a termination. A truncated episode still bootstraps from V(s')."""
    return rewards + (gamma * next_values).masked_fill(terminated, 0.0)


@torch.no_grad()
def polyak_(target: nn.Module, source: nn.Module, tau: float) -> None:
    """target ← (1 − τ) target + τ source, for every parameter."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)


def gather_actions(values: Tensor, actions: Tensor) -> Tensor:
    """Q(s, a) of the actions taken: (…, A) and (…,) → (…,)."""
    return values.gather(-1, actions[..., None])[..., 0]


# --- DQN


@torch.no_grad()
def double_dqn_target(
    online: Tensor, target: Tensor, rewards: Tensor, terminated: Tensor, gamma: float | Tensor
) -> Tensor:
    """r + γ Q_target(s', argmax_a Q(s', a)). online, target: Q(s', ·) (…, A)."""
    return td_target(rewards, gather_actions(target, online.argmax(-1)), terminated, gamma)


def td_loss(q: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Huber loss with threshold 1, as DQN's clipped errors. weights: of prioritized replay."""
    if weights is None:
        return F.smooth_l1_loss(q, target)
    return (weights * F.smooth_l1_loss(q, target, reduction="none")).mean()


# --- SAC and TD3


def critic_loss(q: Tensor, target: Tensor) -> Tensor:
    """Σ over the critics of the mean squared error. q (C, N), target (N,)."""
    return (q - target).square().mean(-1).sum()


def soft_value(q: Tensor, log_probs: Tensor, alpha: float | Tensor) -> Tensor:
    """SAC's V(s): min over the critics of Q(s, a) − α log π(a|s), with a drawn from π. q (C, N) → (N,)."""
    return q.amin(0) - alpha * log_probs


def sac_policy_loss(q: Tensor, log_probs: Tensor, alpha: float | Tensor) -> Tensor:
    """E[α log π − min Q], with reparameterized actions, so that the gradient passes through them."""
    return -soft_value(q, log_probs, alpha).mean()


def temperature_loss(log_alpha: Tensor, log_probs: Tensor, target_entropy: float) -> Tensor:
    """−log α · E[log π + target]: α rises while the entropy is below its target. The paper writes α in place of log α;
    the sign of the gradient is the same."""
    return -log_alpha * (log_probs.detach() + target_entropy).mean()


def smoothed_actions(actions: Tensor, noise: Tensor, clip: float | Tensor, low: Tensor, high: Tensor) -> Tensor:
    """TD3's target policy smoothing: the action plus noise clipped to ± clip (a number or (A,)), within the bounds."""
    return torch.clamp(actions + torch.clamp(noise, -clip, clip), low, high)  # type: ignore[arg-type]


def td3_policy_loss(q: Tensor) -> Tensor:
    """−E[Q₁(s, π(s))], of the first critic only. q (C, N)."""
    return -q[0].mean()
