"""How much the gradient estimate scatters with each baseline, at the same mean: exactly known, and on real episodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from finetune.rl.envs.rollout import Rollout
from finetune.rl.statistics import chi_square_z_correlated, variance_ratio

from . import enumerated
from .enumerated import batch_means, by_episode, discounts, to_go, z_score
from .losses import BASELINES, advantages, policy_loss

PROJECTIONS = 8  # random directions of the parameters, on which the means are compared


def exact_baselines(rollout: Rollout, world: Tensor, logits: Tensor, gamma: float) -> dict[str, Tensor]:
    """Baselines (T, S) of a listed process. learned: V^π with so many steps left. optimal: the function of step and
    state with the least variance of Σ_t γ^t ∇ log π_t (G_t − b_t): linear in b, so least squares."""
    p = enumerated.probabilities(rollout, world, logits)
    returns, factors = to_go(rollout, gamma), discounts(gamma, rollout.rewards)
    T, S = len(returns), logits.shape[0]
    value, columns = torch.zeros(T, S, dtype=p.dtype), []
    for t in range(T):
        for s in range(S):
            here = rollout.observations[t] == s
            value[t, s] = (p * returns[t])[here].sum() / p[here].sum()
            psi = torch.zeros_like(returns)
            psi[t] = factors[t] * here
            columns.append(by_episode(rollout, logits, psi))
    full = by_episode(rollout, logits, factors * returns)  # (K, D)
    root = p.sqrt()
    A = torch.stack(columns, -1) * root[:, None, None]  # (K, D, T·S)
    b = torch.linalg.lstsq(A.flatten(0, 1), (full * root[:, None]).flatten()[:, None], driver="gelsd").solution
    return {"learned": value, "optimal": b.view(T, S)}


def exact_variance(rollout: Rollout, world: Tensor, logits: Tensor, gamma: float, baseline: Tensor | None) -> float:
    """Of the estimate from one episode: Σ_τ p |g(τ)|² − |∇J|²."""
    p, psi = enumerated.probabilities(rollout, world, logits), to_go(rollout, gamma)
    if baseline is not None:
        psi = psi - taken(baseline, rollout)
    g = by_episode(rollout, logits, discounts(gamma, psi) * psi)
    return float(p @ g.square().sum(1) - (p @ g).square().sum())


def taken(baseline: Tensor, rollout: Rollout) -> Tensor:
    """(T, S) → its value at each step's state (T, N)."""
    return baseline.gather(1, rollout.observations)


@dataclass
class Share:
    """Of the estimate with one baseline: its variance as a part of that without one, with its standard error, and how
    far its mean is off, in standard deviations of chance."""

    share: float
    error: float
    z: float


def listed(draw: np.random.Generator, episodes: int, rows: int) -> dict[str, Share]:
    """By baseline, of the estimate from `rows` episodes, its mean against ∇J, on a listed process."""
    mdp, logits = enumerated.process(draw)
    everything, world = enumerated.trajectories(mdp)
    wanted = enumerated.gradient(everything, world, logits, mdp.gamma)
    known = exact_baselines(everything, world, logits, mdp.gamma)
    rollout = enumerated.sample(mdp, logits, episodes // rows * rows, draw)
    groups = [Rollout(*part) for part in zip(*(x.split(rows, 1) for x in vars(rollout).values()), strict=True)]
    found, whole = {}, None
    for name in sorted((*BASELINES, "optimal"), key="none".__ne__):
        if name in known:
            psi, _ = advantages(rollout, mdp.gamma, "learned", taken(known[name], rollout))
        elif name == "none":
            psi = to_go(rollout, mdp.gamma)
        else:
            psi = torch.cat([advantages(group, mdp.gamma, name, None)[0] for group in groups], 1)
        means = batch_means(by_episode(rollout, logits, discounts(mdp.gamma, psi) * psi), rows)
        whole = means if whole is None else whole
        found[name] = Share(*variance_ratio(means, whole), z_score(means, wanted))
    return found


def of_network(
    policy: nn.Module, groups: list[Rollout], values: list[tuple[Tensor, Tensor]], gamma: float,
    generator: torch.Generator,
) -> dict[str, Share]:  # fmt: skip
    """By baseline, its mean against that without one, of the gradient that each group of
    episodes gives; `values` are V of the states of each and of those they led to."""
    parameters = list(policy.parameters())
    estimates: dict[str, Any] = {name: [] for name in BASELINES}
    for rollout, (here, after) in zip(groups, values, strict=True):
        log_probs = policy.log_prob(policy(rollout.observations), rollout.actions)  # type: ignore[operator]
        for name in BASELINES:
            given = (here, after) if name == "learned" else (None,)
            psi, _ = advantages(rollout, gamma, name, *given)
            loss = policy_loss(log_probs, psi, rollout.first_episode) / psi.shape[1]
            gradient = torch.autograd.grad(-loss, parameters, retain_graph=True)
            estimates[name].append(nn.utils.parameters_to_vector(gradient))
    rows = {name: torch.stack(g).double() for name, g in estimates.items()}  # (M, D)
    directions = torch.randn(rows["none"].shape[1], PROJECTIONS, generator=generator, dtype=torch.float64)
    found = {}
    for name, g in rows.items():
        off = ((g - rows["none"]) @ directions).numpy()  # of the same episodes, so most of the noise is gone
        z = 0.0 if name == "none" else float(chi_square_z_correlated(off.mean(0), np.cov(off.T) / len(off)))
        found[name] = Share(*variance_ratio(g.numpy(), rows["none"].numpy()), z)
    return found
