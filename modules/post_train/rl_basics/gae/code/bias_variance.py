"""Bias and variance of GAE over λ, with the exact critic and a half-learned one, against exact expectations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from finetune import ops
from finetune.rl.envs.rollout import Rollout
from finetune.rl.statistics import Moments, chi_square_z, critical_z, gradient_bias, gradient_bias_interval
from finetune.rl.tabular.mdp import MDP
from finetune.runs.run import Run

from . import plots

if TYPE_CHECKING:
    from .main import Config


def estimates(rollout: Rollout, critics: list[np.ndarray], cfg: Config) -> Tensor:
    """Â_0 of each row with each critic and λ: (critics · λ, N)."""
    found = []
    for V in map(torch.from_numpy, critics):
        values, next_values = V[rollout.observations], V[rollout.next_observations]
        for lam in cfg.lambdas:
            advantages, _ = ops.gae(
                rollout.rewards, values, next_values, rollout.terminated, rollout.truncated, gamma=cfg.gamma, lam=lam
            )
            found.append(advantages[0])
    return torch.stack(found)


def expected_advantages(mdp: MDP, policy: np.ndarray, V: np.ndarray, lam: float, steps: int) -> np.ndarray:
    """E[Â_0 | s, a] (S, A) of GAE over `steps` steps with the critic V, by dynamic programming.

    A(s, a) = δ(s, a) + γλ Σ_s' P(s'|s, a) Σ_a' π(a'|s') A'(s', a') with A' over one step less, and 0 over no step.
    """
    deltas = mdp.R + mdp.gamma * mdp.P @ V - V[:, None]
    advantages = np.zeros_like(deltas)
    for _ in range(steps):
        advantages = deltas + mdp.gamma * lam * mdp.P @ (policy * advantages).sum(1)
    return advantages


def report(
    cfg: Config, run: Run, policy: np.ndarray, counted: np.ndarray, moments: Moments, expected: dict[str, np.ndarray],
    size: float,
) -> None:  # fmt: skip
    """The results are the half-learned critic's bias at the largest λ against that at the smallest, and its variance at
    the smallest against that at the largest. z-scores and the order in between are checks."""
    truth = expected["exact"]

    def split(values: np.ndarray) -> dict[str, np.ndarray]:  # (critics · λ, …) → name: (λ, …)
        return dict(zip(expected, values.reshape(len(expected), -1, *values.shape[1:]), strict=True))

    mean, noise = split(moments.mean()), split(moments.variance_of_mean())
    z = {name: chi_square_z(mean[name] - expected[name], noise[name], size).max() for name in expected}
    bar = critical_z(2 * len(cfg.lambdas))  # two critics at every λ
    run.check("exact_critic_z", z["exact"], at_most=bar)
    run.check("half_learned_critic_z", z["half_learned"], at_most=bar)  # against its own expectation
    against_truth = chi_square_z(mean["half_learned"] - truth, noise["half_learned"], size)
    run.check("half_learned_v_bias_z", against_truth.max())
    bias = gradient_bias(expected["half_learned"] - truth, policy, counted)  # (λ,)
    measured = {n: gradient_bias_interval(mean[n] - truth, policy, counted, noise[n]) for n in expected}
    variance, variance_error = map(split, moments.average_variance(counted.ravel()))  # (λ,)
    random = cfg.data is None  # in an MDP of one's own neither must hold
    run.check("bias_ratio_largest", growth(bias).max(), at_most=1.0 if random else None)
    run.check("variance_ratio_smallest", growth(variance["half_learned"]).min(), at_least=1.0 if random else None)
    run.result("bias_largest_lambda", bias[-1], baseline=bias[0], higher=False)
    run.result("variance_smallest_lambda", variance["half_learned"][0], error=variance_error["half_learned"][0],
               baseline=variance["half_learned"][-1], higher=False)  # fmt: skip
    plots.bias_variance(run, cfg.lambdas, bias, measured, variance)


def growth(values: np.ndarray) -> np.ndarray:
    """Each value over the one before it; 1 where that is 0, as in a world without chance."""
    return np.divide(values[1:], values[:-1], out=np.ones(len(values) - 1), where=values[:-1] > 0)
