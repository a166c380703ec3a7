"""Learning from the episodes of another policy μ: six ways to weigh them, and what happens to a batch used many times.

ρ_{0:k} = Π_{j≤k} π(a_j|s_j) / μ(a_j|s_j)
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from finetune.rl.advantages import returns_to_go
from finetune.rl.envs.rollout import Rollout
from finetune.rl.statistics import standard_error, variance_ratio

from . import enumerated
from .enumerated import batch_means, by_episode, discounts, total_variance, z_score

WAYS = ("uncorrected", "step", "truncated", "weighted", "trajectory", "decision")
UNBIASED = ("trajectory", "decision")
DISTANCES = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0)  # μ's logits are 1 − d times π's: at 1 uniform, at 2 π turned round
ROWS = 32  # episodes of an estimate


def weighed(rewards: Tensor, ends: Tensor, log_ratios: Tensor, gamma: float, way: str, bound: float = 2.0) -> Tensor:
    """Ψ (T, N) of episodes that μ played, one a row; log_ratios (T, N) are 0 behind the end.

    uncorrected: G_t. step: π/μ of this action only, which leaves μ's states. trajectory: ρ of the whole episode.
    truncated: the same, at most `bound` (Ionides 2008). weighted: divided by its mean over the rows. decision: every
    reward with ρ up to its own action, as later ones cannot have changed it (Precup et al. 2000).
    """
    returns, product = returns_to_go(rewards, ends, gamma), log_ratios.cumsum(0).exp()  # ρ_{0:t}
    if way == "uncorrected":
        return returns
    if way == "step":
        return log_ratios.exp() * returns
    if way == "decision":
        return returns_to_go(product * rewards, ends, gamma)
    whole = product[-1]
    if way == "truncated":
        whole = whole.clamp(max=bound)
    elif way == "weighted":
        whole = whole / whole.mean()
    return whole * returns


def effective_size(weights: Tensor) -> Tensor:
    """(Σ w)² / Σ w² over the last axis: so many episodes of one's own are worth as much (Kong 1992)."""
    return weights.sum(-1).square() / weights.square().sum(-1)


def compare(draw: np.random.Generator, episodes: int) -> dict[str, dict[str, list[float]]]:
    """Of each way, over the distances: |E[estimate] − ∇J| / |∇J|, exact but of `weighted`; z of the mean estimate from
    `ROWS` episodes of μ; their variance, and that as a part of the whole trajectory's with its standard error. Under
    "sample" the effective part of the episodes and KL(μ ‖ π).

    π's two logits differ by 1 everywhere, so that no ratio is above 50: heavier tails would need more episodes.
    """
    mdp, logits = enumerated.process(draw)
    logits = logits / (logits[:, :1] - logits[:, 1:]).abs()
    everything, world = enumerated.trajectories(mdp)
    wanted = enumerated.gradient(everything, world, logits, mdp.gamma)
    columns_ = ("bias", "z", "variance", "share", "share_error")
    found: dict[str, dict[str, list[float]]] = {way: {name: [] for name in columns_} for way in WAYS}
    found["sample"] = {"effective": [], "effective_error": [], "kl": []}
    for distance in DISTANCES:
        behavior = (1 - distance) * logits
        rollout = enumerated.sample(mdp, behavior, episodes // ROWS * ROWS, draw)
        log_ratios = enumerated.log_probs(rollout, logits) - enumerated.log_probs(rollout, behavior)
        estimates = {}
        for way in WAYS:
            rows = ROWS if way == "weighted" else rollout.rewards.shape[1]  # it divides by the mean of the batch
            columns = [x.split(rows, 1) for x in (rollout.rewards, rollout.ends, log_ratios)]
            psi = torch.cat([weighed(*part, mdp.gamma, way) for part in zip(*columns, strict=True)], 1)
            means = batch_means(by_episode(rollout, logits, discounts(mdp.gamma, psi) * psi), ROWS)
            if way == "weighted":
                off = torch.from_numpy(means.mean(0)) - wanted
            else:
                off = expected(everything, world, logits, behavior, mdp.gamma, way) - wanted
            found[way]["bias"].append(float(off.norm() / wanted.norm()))
            found[way]["z"].append(z_score(means, wanted))
            found[way]["variance"].append(total_variance(means))
            estimates[way] = means
        for way, means in estimates.items():
            share, error = variance_ratio(means, estimates["trajectory"])
            found[way]["share"].append(share)
            found[way]["share_error"].append(error)
        weights = log_ratios.sum(0).exp()
        effective = effective_size(weights.view(-1, ROWS)) / ROWS
        found["sample"]["effective"].append(float(effective.mean()))
        found["sample"]["effective_error"].append(standard_error(effective.tolist()))
        found["sample"]["kl"].append(float(-log_ratios.sum(0).mean()))
    return found


def expected(
    rollout: Rollout, world: Tensor, logits: Tensor, behavior: Tensor, gamma: float, way: str, bound: float = 2.0
) -> Tensor:
    """What the estimate is on average over the episodes of μ (S·A,); the rollout lists all trajectories."""
    log_ratios = enumerated.log_probs(rollout, logits) - enumerated.log_probs(rollout, behavior)
    psi = weighed(rollout.rewards, rollout.ends, log_ratios, gamma, way, bound)
    return enumerated.probabilities(rollout, world, behavior) @ by_episode(rollout, logits, discounts(gamma, psi) * psi)


def reuse(draw: np.random.Generator, way: str, updates: int = 100, rows: int = 2000, lr: float = 1.0) -> list[float]:
    """J of the policy before the first update and after each of `updates`, all on one batch of the uniform policy."""
    mdp, _ = enumerated.process(draw)
    everything, world = enumerated.trajectories(mdp)
    logits = torch.zeros(mdp.size, dtype=torch.float64)
    rollout = enumerated.sample(mdp, logits, rows, draw)
    behavior, path = enumerated.log_probs(rollout, logits), []
    for _ in range(updates):
        path.append(float(enumerated.objective(everything, world, logits, mdp.gamma)))
        log_ratios = enumerated.log_probs(rollout, logits) - behavior
        psi = discounts(mdp.gamma, behavior) * weighed(rollout.rewards, rollout.ends, log_ratios, mdp.gamma, way)
        logits = logits + lr * by_episode(rollout, logits, psi).mean(0).view_as(logits)
    return [*path, float(enumerated.objective(everything, world, logits, mdp.gamma))]
