"""The baselines of REINFORCE: nothing, the batch mean, the leave-one-out mean, or a learned V(s).

    A_t = G_t − b_t        G_t = r_t + γ r_{t+1} + …

A baseline that does not depend on the action leaves the mean of the gradient alone and lowers its variance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finetune import ops, optim
from finetune.rl.advantages import leave_one_out
from finetune.rl.agents import networks as nets
from finetune.rl.envs.rollout import Rollout
from finetune.rl.envs.spaces import Image

BASELINES = ("none", "mean", "leave_one_out", "learned")


def advantages(
    rollout: Rollout, gamma: float, baseline: str, values: Tensor | None = None, next_values: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Advantages and returns-to-go, both (T, N), of rollouts with one episode in each row; 0 behind its end.

    none: the return-to-go G_t. mean: minus the mean over the rows of G_t at the same t. leave_one_out: minus the mean
    of the other rows. A finished episode has G_t = 0, so all rows count. learned: minus `values`; an episode that a
    time limit truncated bootstraps from `next_values`, which the other baselines do not have: they take it for the end.
    """
    alive = rollout.first_episode
    zeros = torch.zeros_like(rollout.rewards)
    bootstrap, over = zeros, rollout.ends
    if next_values is not None:
        bootstrap, over = next_values.masked_fill(~rollout.truncated, 0.0), rollout.terminated
    _, returns = ops.gae(rollout.rewards, zeros, bootstrap, over, rollout.ends & ~over, gamma=gamma, lam=1.0)
    returns = returns.to(rollout.rewards.dtype) * alive
    if baseline == "mean":
        centered = returns - returns.mean(1, keepdim=True)
    elif baseline == "leave_one_out":
        centered = leave_one_out(returns)
    elif baseline == "learned" and values is not None:
        centered = returns - values
    else:
        centered = returns
    return centered * alive, returns


def discounts(gamma: float, like: Tensor) -> Tensor:
    """The factors γ^t (T, 1) of the policy gradient theorem, for tensors (T, N)."""
    return gamma ** torch.arange(len(like), dtype=like.dtype)[:, None]


class LearnedBaseline:
    """V(s): a network that is fitted to the returns-to-go of each batch, after the policy's step.

    Its output times `scale` is a return of rewards whose largest is 1, so that the network learns numbers near one.
    """

    def __init__(self, observations: int | Image, hidden: list[int], gamma: float, lr: float, epochs: int) -> None:
        self.net, self.epochs = nets.Value(observations, hidden), epochs
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=lr)
        self.scale = min(1 / max(1 - gamma, 1e-3), 100.0)

    @torch.no_grad()
    def values(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """V(s_t) and V(s_{t+1}), both (T, N)."""
        return self.scale * self.net(rollout.observations), self.scale * self.net(rollout.next_observations)

    def fit(self, observations: Tensor, returns: Tensor) -> float:
        """`epochs` steps on the squared error to the returns of these steps; the last loss."""
        targets, loss = returns / self.scale, torch.zeros(())
        for _ in range(self.epochs):
            loss = (self.net(observations) - targets).square().mean()
            optim.descend(loss, self.optimizer)
        return loss.item()

    @property
    def state(self) -> dict[str, object]:
        return {"value": self.net, "value_optimizer": self.optimizer}
