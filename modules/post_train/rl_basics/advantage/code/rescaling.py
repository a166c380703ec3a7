"""Rescaling of advantages (whitening, reward scaling, RLOO, GRPO): the exact mean gradient over all possible batches.

A contextual bandit: two states, three actions, one step. A batch of n is a multinomial draw of n pairs (s, a), so
E[ĝ] = Σ_counts Pr(counts) Σ_pairs (count / n) f(pair, counts) ∇ log π is a finite sum, and nothing is sampled.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np

from finetune.rl.envs.rollout import numpy_generator
from finetune.runs.run import Run

from . import plots

Array = np.ndarray
EPS, CLIP = 1e-8, 10.0  # those of whitened and RewardScale
GROUP_EPS = 1e-4  # that of group_normalized
METHODS = ("centered", "whitened", "scaled_rewards", "leave_one_out", "group_normalized")
SIZES = (2, 4, 8, 16)


def problem(rng: np.random.Generator) -> tuple[Array, Array]:
    """A policy (2, 3) and rewards (2, 3) that are four times as large in one state as in the other."""
    return rng.dirichlet(np.full(3, 2.0), 2), rng.standard_normal((2, 3)) * [[1.0], [4.0]]


def counts_of(n: int, kinds: int) -> Array:
    """(M, kinds): every way to distribute n draws over this number of kinds."""
    bars = np.array(list(combinations(range(n + kinds - 1), kinds - 1)))
    edges = np.pad(bars, ((0, 0), (1, 0)), constant_values=-1)
    return np.diff(np.pad(edges, ((0, 0), (0, 1)), constant_values=n + kinds - 1), axis=1) - 1


def expected(method: str, n: int, p: Array, x: Array) -> Array:
    """(kinds,): E[count / n · f(x, counts)] for batches of n draws from p with values x (kinds,), the weight of a kind
    in the mean gradient. Without rescaling the weights are p · x."""
    counts = counts_of(n, len(p))
    with np.errstate(divide="ignore"):
        logs = np.where(counts > 0, counts * np.log(p), 0.0).sum(1)
    factorials = np.cumsum(np.log(np.maximum(np.arange(n + 1), 1)))  # log k!
    chance = np.exp(factorials[n] - factorials[counts].sum(1) + logs)  # (M,)
    share = counts / n
    mean = share @ x
    off = x - mean[:, None]  # (M, kinds)
    variance = (share * off**2).sum(1, keepdims=True)
    if method == "centered":
        f = off
    elif method == "whitened":
        f = off / (np.sqrt(variance * n / (n - 1)) + EPS)
    elif method == "scaled_rewards":  # all n seen so far; by symmetry the last one is any of them
        f = (x / np.sqrt(variance + EPS)).clip(-CLIP, CLIP)
    elif method == "leave_one_out":
        f = off * n / (n - 1)
    else:
        f = off / (np.sqrt(variance * n / (n - 1)) + GROUP_EPS)
    return chance @ (share * f)


def mean_gradient(method: str, n: int, policy: Array, rewards: Array) -> Array:
    """E[ĝ] (S, A) of a batch of n with both states equally likely; RLOO and GRPO: of groups of n in one state."""
    start = 1 / len(policy)
    if method in ("leave_one_out", "group_normalized"):
        weights = np.stack([start * expected(method, n, p, r) for p, r in zip(policy, rewards, strict=True)])
    else:
        center = 0.0 if method == "scaled_rewards" else (policy * rewards).sum(1, keepdims=True)
        weights = expected(method, n, (start * policy).ravel(), (rewards - center).ravel()).reshape(policy.shape)
    return through_softmax(weights, policy)


def exact(policy: Array, rewards: Array) -> Array:
    return through_softmax(policy * rewards / len(policy), policy)


def through_softmax(weights: Array, policy: Array) -> Array:
    """Σ_a w(s, a) ∂ log π(a|s) / ∂ θ(s, b) = w(s, b) − π(b|s) Σ_a w(s, a)"""
    return weights - policy * weights.sum(1, keepdims=True)


def angle(a: Array, b: Array) -> float:
    """Degrees between two gradients."""
    u, v = (x.ravel() / np.linalg.norm(x) for x in (a, b))
    return float(np.degrees(2 * np.arctan2(np.linalg.norm(u - v), np.linalg.norm(u + v))))  # exact near 0 as well


def report(run: Run) -> None:
    """The result is the angle that GRPO's division by the group's deviation leaves, against that of whitening."""
    policy, rewards = problem(numpy_generator(run, "bandit"))
    target = exact(policy, rewards)
    found = {name: [mean_gradient(name, n, policy, rewards) for n in SIZES] for name in METHODS}
    angles = {name: [angle(g, target) for g in gs] for name, gs in found.items()}
    lengths = {name: [np.linalg.norm(g) / np.linalg.norm(target) for g in gs] for name, gs in found.items()}
    off = max(abs(g - (1 - 1 / n) * target).max() for n, g in zip(SIZES, found["centered"], strict=True))
    run.check("centered_gradient_error", off, at_most=1e-10)
    for name in ("whitened", "scaled_rewards"):
        run.check(f"angle_{name}", angles[name][-1])
    run.result("angle_group_normalized", angles["group_normalized"][-1], baseline=angles["whitened"][-1], higher=False)
    run.table(
        "the mean gradient over all batches of n: angle to ∇J and length (∇J = 1)",
        [
            {"method": name}
            | {f"n = {n}": f"{a:.2f}° · {k:.2f}" for n, a, k in zip(SIZES, angles[name], lengths[name], strict=True)}
            for name in METHODS
        ],
    )
    plots.rescaling(run, SIZES, angles, lengths)
