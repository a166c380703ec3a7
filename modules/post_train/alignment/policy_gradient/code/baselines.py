"""REINFORCE: the loss whose gradient is the policy gradient, and the baselines."""

import torch
from torch import Tensor

from finetune import ops
from finetune.rl.advantages import leave_one_out
from finetune.rl.envs.rollout import Rollout

BASELINES = ("none", "mean", "leave_one_out", "learned")


def advantages(
    rollout: Rollout, gamma: float, baseline: str, values: Tensor | None, next_values: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(Ψ, returns-to-go), both (T, N), of rollouts with one episode a row; behind its end they are 0.

    none: the return-to-go G_t. mean: less the mean over the rows of G_t at the same t. leave_one_out: less the mean of
    the other rows'. An episode that is over has G_t = 0 there, so all rows count. learned: less `values`; an episode
    that a time limit cut off goes on with `next_values`, where the other baselines take the limit for the end.
    """
    alive = rollout.first_episode
    zeros = torch.zeros_like(rollout.rewards)
    after, over = zeros, rollout.ends
    if next_values is not None:
        after, over = next_values.masked_fill(~rollout.truncated, 0.0), rollout.terminated
    _, returns = ops.gae(rollout.rewards, zeros, after, over, rollout.ends & ~over, gamma=gamma, lam=1.0)
    returns = returns.to(rollout.rewards.dtype) * alive
    if baseline == "mean":
        psi = returns - returns.mean(1, keepdim=True)
    elif baseline == "leave_one_out":
        psi = leave_one_out(returns)
    elif baseline == "learned" and values is not None:
        psi = returns - values
    else:
        psi = returns
    return psi * alive, returns


def policy_loss(log_probs: Tensor, psi: Tensor, alive: Tensor) -> Tensor:
    """− Σ log π(a_t|s_t) Ψ_t over the steps that count; its gradient is the score-function estimate, negated."""
    return -(log_probs * psi.detach() * alive).sum()
