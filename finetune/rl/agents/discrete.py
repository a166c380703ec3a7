"""Discrete actions: action values as networks, and the targets and losses of DQN and its variants as functions.

Mnih et al. 2015; double: van Hasselt et al. 2015, arXiv:1509.06461; dueling: Wang et al. 2016, arXiv:1511.06581.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.rl.agents.continuous import relu_mlp, td_target
from finetune.rl.agents.policies import Ensemble
from finetune.rl.envs.environments import Act


class QNetwork(nn.Module):
    """Q(s, ·) of discrete actions; logits of a policy where it clones."""

    def __init__(self, observations: int, actions: int, hidden: list[int]) -> None:
        super().__init__()
        self.actions = actions
        self.net = relu_mlp([observations, *hidden, actions])

    def forward(self, observations: Tensor) -> Tensor:
        return self.net(observations)  # (N, A)


class QNetworks(Ensemble):
    """`count` independent networks of Q(s, ·), with a dueling head or without. size (D,): observations are divided by
    it."""

    size: Tensor

    def __init__(
        self, count: int, actions: int, hidden: list[int], size: Tensor | list[float], dueling: bool = False
    ) -> None:
        super().__init__(count, [len(size), *hidden, actions + dueling])
        self.register_buffer("size", torch.as_tensor(size), persistent=False)
        self.dueling = dueling

    def forward(self, observations: Tensor) -> Tensor:
        """(count, N, D) → (count, N, A)"""
        outputs = super().forward(observations / self.size)
        return dueling(outputs) if self.dueling else outputs


def dueling(outputs: Tensor) -> Tensor:
    """(…, 1 + A) → Q = V + advantage − mean of the advantages (…, A): V is the mean of Q, taught by all."""
    value, advantages = outputs[..., :1], outputs[..., 1:]
    return value + advantages - advantages.mean(-1, keepdim=True)


def picked(values: Tensor, actions: Tensor) -> Tensor:
    """(…, A) and (…,) → (…,): the column of each row's action."""
    return values.gather(-1, actions[..., None])[..., 0]


def greedy(q: nn.Module) -> Act:
    """The policy that takes the action of the largest output."""

    @torch.no_grad()
    def act(observations: Tensor) -> Tensor:
        return q(observations).argmax(-1)

    return act


# --- Targets and losses. gamma: of a transition of n steps it is γⁿ.


@torch.no_grad()
def dqn_target(target: Tensor, rewards: Tensor, terminated: Tensor, gamma: float | Tensor) -> Tensor:
    """r + γ max_a Q_target(s', a). target: Q_target(s', ·) (…, A)."""
    return td_target(rewards, target.amax(-1), terminated, gamma)


@torch.no_grad()
def double_dqn_target(
    online: Tensor, target: Tensor, rewards: Tensor, terminated: Tensor, gamma: float | Tensor
) -> Tensor:
    """r + γ Q_target(s', argmax_a Q(s', a)). online, target: Q(s', ·) (…, A)."""
    return td_target(rewards, picked(target, online.argmax(-1)), terminated, gamma)


def td_loss(q: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Huber's with threshold 1, as DQN's clipped errors. weights: of prioritized replay."""
    if weights is None:
        return F.smooth_l1_loss(q, target)
    return (weights * F.smooth_l1_loss(q, target, reduction="none")).mean()
