"""Off-policy policy gradients: six importance weights for episodes of a behavior policy μ, and one batch used often.

    ρ_{0:k} = Π_{j≤k} π(a_j|s_j) / μ(a_j|s_j)

The process is small enough to list all trajectories (enumerated.py), so biases are exact.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from finetune.rl.advantages import returns_to_go
from finetune.rl.envs.rollout import Rollout, numpy_generator
from finetune.rl.statistics import critical_z, standard_error, variance_ratio
from finetune.runs.run import Run

from . import enumerated, plots
from .baselines import discounts
from .enumerated import batch_means, episode_gradients, total_variance, z_score

WEIGHTS = ("uncorrected", "step", "truncated", "weighted", "trajectory", "per_decision")
UNBIASED = ("trajectory", "per_decision")
DISTANCES = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0)  # μ's logits are 1 − d times π's: at 1 uniform, at 2 π reversed
REVERSED = DISTANCES.index(2.0)
EPISODES = 32  # of one estimate


def weighted_returns(
    rewards: Tensor, ends: Tensor, log_ratios: Tensor, gamma: float, weights: str, bound: float = 2.0
) -> Tensor:
    """Returns-to-go (T, N) of episodes of μ, one in each row, with importance weights; log_ratios (T, N) are 0 behind
    the end.

    uncorrected: G_t. step: times π/μ of this action only, which keeps μ's state distribution. trajectory: times ρ of
    the whole episode. truncated: the same, at most `bound` (Ionides 2008). weighted: ρ divided by its mean over the
    rows. per_decision: every reward times ρ up to its own action, as later actions cannot have changed it (Precup et
    al. 2000).
    """
    returns, ratios = returns_to_go(rewards, ends, gamma), log_ratios.cumsum(0).exp()  # ρ_{0:t}
    if weights == "uncorrected":
        return returns
    if weights == "step":
        return log_ratios.exp() * returns
    if weights == "per_decision":
        return returns_to_go(ratios * rewards, ends, gamma)
    rho = ratios[-1]
    if weights == "truncated":
        rho = rho.clamp(max=bound)
    elif weights == "weighted":
        rho = rho / rho.mean()
    return rho * returns


def effective_sample_size(weights: Tensor) -> Tensor:
    """(Σ w)² / Σ w² over the last axis: the number of on-policy episodes that are worth as much (Kong 1992)."""
    return weights.sum(-1).square() / weights.square().sum(-1)


# --- One batch, used for many updates


def reuse(rng: np.random.Generator, weights: str, updates: int = 100, rows: int = 2000, lr: float = 1.0) -> list[float]:
    """Off-policy REINFORCE: exact J before the first and after each update, all on one batch of the uniform policy."""
    mdp, _ = enumerated.process(rng)
    everything, world = enumerated.trajectories(mdp)
    logits = torch.zeros(mdp.size, dtype=torch.float64)
    rollout = enumerated.sample(mdp, logits, rows, rng)
    behavior, path = enumerated.log_probs(rollout, logits), []
    for _ in range(updates):
        path.append(float(enumerated.objective(everything, world, logits, mdp.gamma)))
        log_ratios = enumerated.log_probs(rollout, logits) - behavior
        returns = weighted_returns(rollout.rewards, rollout.ends, log_ratios, mdp.gamma, weights)
        gradient = episode_gradients(rollout, logits, discounts(mdp.gamma, behavior) * returns).mean(0)
        logits = logits + lr * gradient.view_as(logits)
    return [*path, float(enumerated.objective(everything, world, logits, mdp.gamma))]


# --- Bias and variance of the six weights


def expectation(
    rollout: Rollout, world: Tensor, logits: Tensor, behavior: Tensor, gamma: float, weights: str, bound: float = 2.0
) -> Tensor:
    """Exact mean of the gradient estimate (S·A,) over the episodes of μ; the rollout lists all trajectories."""
    log_ratios = enumerated.log_probs(rollout, logits) - enumerated.log_probs(rollout, behavior)
    returns = discounts(gamma, log_ratios) * weighted_returns(
        rollout.rewards, rollout.ends, log_ratios, gamma, weights, bound
    )
    return enumerated.probabilities(rollout, world, behavior) @ episode_gradients(rollout, logits, returns)


def compare(rng: np.random.Generator, episodes: int) -> dict[str, dict[str, list[float]]]:
    """Over the distances of μ, for each of WEIGHTS: `bias` |E[estimate] − ∇J| / |∇J| (exact but for "weighted"), `z` of
    the mean estimate, `variance`, and `ratio` of that to the trajectory weight's ± `ratio_error`. Under "sample" the
    effective fraction of the episodes ± its error, and KL(μ ‖ π).

    π's two logits differ by 1 everywhere, so that no ratio exceeds 50: heavier tails would need more episodes.
    """
    mdp, logits = enumerated.process(rng)
    logits = logits / (logits[:, :1] - logits[:, 1:]).abs()
    everything, world = enumerated.trajectories(mdp)
    exact = enumerated.gradient(everything, world, logits, mdp.gamma)
    found: dict[str, dict[str, list[float]]] = {
        weights: {name: [] for name in ("bias", "z", "variance", "ratio", "ratio_error")} for weights in WEIGHTS
    }
    found["sample"] = {"effective": [], "effective_error": [], "kl": []}
    for distance in DISTANCES:
        behavior = (1 - distance) * logits
        rollout = enumerated.sample(mdp, behavior, episodes // EPISODES * EPISODES, rng)
        log_ratios = enumerated.log_probs(rollout, logits) - enumerated.log_probs(rollout, behavior)
        estimates = {}
        for weights in WEIGHTS:
            rows = EPISODES if weights == "weighted" else rollout.rewards.shape[1]  # it divides by the batch's mean
            columns = [x.split(rows, 1) for x in (rollout.rewards, rollout.ends, log_ratios)]
            parts = [
                weighted_returns(rewards, ends, part_ratios, mdp.gamma, weights)
                for rewards, ends, part_ratios in zip(*columns, strict=True)
            ]
            returns = discounts(mdp.gamma, log_ratios) * torch.cat(parts, 1)
            means = batch_means(episode_gradients(rollout, logits, returns), EPISODES)
            if weights == "weighted":
                error = torch.from_numpy(means.mean(0)) - exact
            else:
                error = expectation(everything, world, logits, behavior, mdp.gamma, weights) - exact
            found[weights]["bias"].append(float(error.norm() / exact.norm()))
            found[weights]["z"].append(z_score(means, exact))
            found[weights]["variance"].append(total_variance(means))
            estimates[weights] = means
        for weights, means in estimates.items():
            ratio, ratio_error = variance_ratio(means, estimates["trajectory"])
            found[weights]["ratio"].append(ratio)
            found[weights]["ratio_error"].append(ratio_error)
        effective = effective_sample_size(log_ratios.sum(0).exp().view(-1, EPISODES)) / EPISODES
        found["sample"]["effective"].append(float(effective.mean()))
        found["sample"]["effective_error"].append(standard_error(effective.tolist()))
        found["sample"]["kl"].append(float(-log_ratios.sum(0).mean()))
    return found


def report(run: Run, episodes: int) -> None:
    """The result is J after one batch was used to the end; biases and z-scores of the weights are checks."""
    found = compare(numpy_generator(run, "off_policy"), episodes)
    sample, uncorrected = found["sample"], found["uncorrected"]
    run.check("off_policy_bias", max(bias for name in UNBIASED for bias in found[name]["bias"]), at_most=1e-10)
    run.check("off_policy_bias_uncorrected", uncorrected["bias"][REVERSED])
    z = max(found[name]["z"][REVERSED] for name in UNBIASED)
    run.check("off_policy_z", z, at_most=critical_z(len(UNBIASED)))
    run.check("off_policy_z_uncorrected", uncorrected["z"][REVERSED])
    ratio, error = (found["per_decision"][part][REVERSED] for part in ("ratio", "ratio_error"))
    run.check("per_decision_variance_ratio", ratio, error=error)
    part, error = sample["effective"][REVERSED], sample["effective_error"][REVERSED]
    run.check("effective_sample_fraction", part, error=error)
    paths = {name: reuse(numpy_generator(run, "reuse"), name) for name in ("uncorrected", "step", "per_decision")}
    run.result("reused_batch_value", paths["per_decision"][-1], baseline=paths["uncorrected"][-1])
    plots.off_policy(run, DISTANCES, found, paths)
