"""Variance of the policy gradient estimate by baseline: on a process whose trajectories are listed, and on CartPole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from finetune.rl.agents.reward_scale import RewardSize
from finetune.rl.envs import environments
from finetune.rl.envs.rollout import Rollout, numpy_generator
from finetune.rl.statistics import chi_square_z_correlated, critical_z, variance_ratio
from finetune.runs.display import uncertain
from finetune.runs.run import Run

from . import enumerated, plots
from .baselines import BASELINES, advantages, discounts
from .enumerated import batch_means, episode_gradients, to_go, z_score
from .reinforce import collect, networks, policy_loss

if TYPE_CHECKING:
    from .main import Config

PROJECTIONS = 8  # random directions of the parameters, on which the means are compared


@dataclass
class Spread:
    """One baseline's gradient estimate: its variance relative to that without a baseline, the standard error of that
    ratio, and the z-score of its mean."""

    ratio: float
    error: float
    z: float


# --- On a process whose trajectories are all listed


def exact_baselines(rollout: Rollout, world: Tensor, logits: Tensor, gamma: float) -> dict[str, Tensor]:
    """Baselines (T, S) of a listed process. learned: the exact V^π with the steps that are left. optimal: the function
    of step and state with the least variance of Σ_t γ^t ∇ log π_t (G_t − b_t), by least squares, as it is linear in b.
    """
    p = enumerated.probabilities(rollout, world, logits)
    returns, factors = to_go(rollout, gamma), discounts(gamma, rollout.rewards)
    T, S = len(returns), logits.shape[0]
    value, columns = torch.zeros(T, S, dtype=p.dtype), []
    for t in range(T):
        for s in range(S):
            here = rollout.observations[t] == s
            value[t, s] = (p * returns[t])[here].sum() / p[here].sum()
            indicator = torch.zeros_like(returns)
            indicator[t] = factors[t] * here
            columns.append(episode_gradients(rollout, logits, indicator))
    full = episode_gradients(rollout, logits, factors * returns)  # (K, D)
    root = p.sqrt()
    A = torch.stack(columns, -1) * root[:, None, None]  # (K, D, T·S)
    b = torch.linalg.lstsq(A.flatten(0, 1), (full * root[:, None]).flatten()[:, None], driver="gelsd").solution
    return {"learned": value, "optimal": b.view(T, S)}


def exact_variance(rollout: Rollout, world: Tensor, logits: Tensor, gamma: float, baseline: Tensor | None) -> float:
    """Σ_τ p |g(τ)|² − |∇J|², the variance of the estimate from one episode."""
    p, A = enumerated.probabilities(rollout, world, logits), to_go(rollout, gamma)
    if baseline is not None:
        A = A - at_states(baseline, rollout)
    g = episode_gradients(rollout, logits, discounts(gamma, A) * A)
    return float(p @ g.square().sum(1) - (p @ g).square().sum())


def at_states(baseline: Tensor, rollout: Rollout) -> Tensor:
    """A baseline (T, S) at each step's state (T, N)."""
    return baseline.gather(1, rollout.observations)


def listed(rng: np.random.Generator, episodes: int, rows: int) -> dict[str, Spread]:
    """Each baseline's estimate from `rows` episodes on the listed process; its mean against the exact ∇J."""
    mdp, logits = enumerated.process(rng)
    everything, world = enumerated.trajectories(mdp)
    exact = enumerated.gradient(everything, world, logits, mdp.gamma)
    known = exact_baselines(everything, world, logits, mdp.gamma)
    rollout = enumerated.sample(mdp, logits, episodes // rows * rows, rng)
    groups = [Rollout(*part) for part in zip(*(x.split(rows, 1) for x in vars(rollout).values()), strict=True)]
    found, without = {}, None
    for name in ("none", "mean", "leave_one_out", "learned", "optimal"):
        if name in known:
            A, _ = advantages(rollout, mdp.gamma, "learned", at_states(known[name], rollout))
        else:
            A = torch.cat([advantages(group, mdp.gamma, name)[0] for group in groups], 1)
        means = batch_means(episode_gradients(rollout, logits, discounts(mdp.gamma, A) * A), rows)
        without = means if without is None else without
        found[name] = Spread(*variance_ratio(means, without), z_score(means, exact))
    return found


# --- On gymnasium, at the untrained policy


def of_network(
    policy: Any, groups: list[Rollout], values: list[tuple[Tensor, Tensor]], gamma: float, generator: torch.Generator
) -> dict[str, Spread]:
    """Each baseline's estimate from one group of episodes; its mean against that without a baseline. `values` are V of
    the states and of the next states of each group."""
    parameters = list(policy.parameters())
    estimates: dict[str, list[Tensor]] = {name: [] for name in BASELINES}
    for rollout, V in zip(groups, values, strict=True):
        log_probs = policy.log_prob(policy(rollout.observations), rollout.actions)
        for name in BASELINES:
            A, _ = advantages(rollout, gamma, name, *(V if name == "learned" else ()))
            loss = policy_loss(log_probs, A, rollout.first_episode) / A.shape[1]
            gradient = torch.autograd.grad(-loss, parameters, retain_graph=True)
            estimates[name].append(torch.cat([g.reshape(-1) for g in gradient]))
    rows = {name: torch.stack(g).double() for name, g in estimates.items()}  # (M, D)
    directions = torch.randn(rows["none"].shape[1], PROJECTIONS, generator=generator, dtype=torch.float64)
    found = {}
    for name, g in rows.items():
        off = ((g - rows["none"]) @ directions).numpy()  # of the same episodes, so most of the noise cancels
        z = 0.0 if name == "none" else float(chi_square_z_correlated(off.mean(0), np.cov(off.T) / len(off)))
        found[name] = Spread(*variance_ratio(g.numpy(), rows["none"].numpy()), z)
    return found


def on_gymnasium(cfg: Config, run: Run, envs: list[environments.Env]) -> dict[str, Spread]:
    """Each baseline at the untrained policy, all on the same episodes. The learned baseline is fitted to others, half
    as many."""
    policy, learned = networks(cfg, run, envs)
    others = [collect(run, policy, envs, "variance", "fit", i) for i in range(-(-cfg.variance_groups // 2))]
    groups = [collect(run, policy, envs, "variance", i) for i in range(cfg.variance_groups)]
    unit = RewardSize()
    unit.see(torch.cat([r.rewards.flatten() for r in others]))
    for rollout in (*others, *groups):
        rollout.rewards = rollout.rewards / unit.size
    seen = torch.cat([r.observations[r.first_episode] for r in others])
    returns = torch.cat([advantages(r, cfg.gamma, "none")[1][r.first_episode] for r in others])
    for _ in range(20):
        learned.fit(seen, returns)
    return of_network(policy, groups, [learned.values(g) for g in groups], cfg.gamma, run.generator("variance"))


# --- What is shown


def report(cfg: Config, run: Run, envs: list[environments.Env]) -> None:
    """The result is the variance with the learned baseline; that the means agree is checked."""
    exact = listed(numpy_generator(run, "score"), cfg.score_episodes, cfg.episodes)
    unbiased = [found.z for name, found in exact.items() if name != "mean"]
    run.check("gradient_z", max(unbiased), at_most=critical_z(len(unbiased)))
    run.check("gradient_z_mean_baseline", exact["mean"].z)  # the batch mean is biased
    if not cfg.variance_groups:
        return
    found = on_gymnasium(cfg, run, envs)
    learned = found["learned"]
    target = 1 - 3 * learned.error if cfg.env == "CartPole-v1" else None  # less, by more than its noise
    run.result("variance_with_learned_baseline", learned.ratio, error=learned.error, baseline=1.0, target=target,
               higher=False)  # fmt: skip
    run.check("baseline_means_z", max(found[b].z for b in ("leave_one_out", "learned")), at_most=critical_z(2))
    run.table(
        "variance of the gradient estimate by baseline ± standard error (without a baseline = 1), and z of its mean",
        [
            {
                "baseline": name.replace("_", " "),
                "two-step MDP": uncertain(spread.ratio, spread.error),
                "z": f"{spread.z:.1f}",
                cfg.env: uncertain(found[name].ratio, found[name].error) if name in found else "–",
                f"z on {cfg.env}": f"{found[name].z:.1f}" if name in found else "–",
            }
            for name, spread in exact.items()
        ],
    )
    plots.variance(run, cfg.env, exact, found)
