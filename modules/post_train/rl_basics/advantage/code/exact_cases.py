"""Exact cases of the advantage: its mean under the policy, policy improvement, potential shaping. Checks of a run."""

from __future__ import annotations

import numpy as np

from finetune.rl.envs.rollout import numpy_generator
from finetune.rl.tabular import mdp as tables
from finetune.rl.tabular.mdp import MDP
from finetune.runs.run import Run


def check(run: Run, mdp: MDP, policy: np.ndarray, counted: np.ndarray) -> None:
    improvement(run, mdp, policy, counted)
    shaping(run, mdp, policy)


def improvement(run: Run, mdp: MDP, policy: np.ndarray, counted: np.ndarray) -> None:
    """The mean of A^π under π is 0, and never acting where A^π < 0 loses nothing in any state (policy improvement)."""
    A = np.where(counted, tables.advantages(mdp, policy), 0.0)
    size = magnitude(A)
    run.check("advantage_mean", abs((policy * A).sum(1)).max() / size, at_most=1e-8)
    kept = policy * (A >= -1e-12)  # never empty, as the mean is 0
    better = kept / kept.sum(1, keepdims=True)
    gained = tables.solve(mdp, better) - tables.solve(mdp, policy)
    run.check("improvement_in_the_worst_state", gained[~mdp.terminal].min(), at_least=-1e-9 * size)
    run.check("improvement", float(mdp.start @ gained))


def shaping(run: Run, mdp: MDP, policy: np.ndarray) -> None:
    """r + γ φ(s') − φ(s) for any potential φ moves V by −φ and leaves every advantage as it was (Ng et al. 1999)."""
    V = tables.solve(mdp, policy)
    size = magnitude(V)
    potential = numpy_generator(run, "potential").standard_normal(len(V)) * ~mdp.terminal * size
    rewards = mdp.rewards + mdp.gamma * potential - potential[:, None, None]
    shaped = tables.make(
        mdp.P, rewards, mdp.gamma, terminal=mdp.terminal, start=mdp.start, allowed=mdp.allowed, actions=mdp.actions
    )
    before, after = (tables.advantages(m, policy)[mdp.allowed] for m in (mdp, shaped))
    run.check("shaping_changes_advantages_by", abs(after - before).max() / size, at_most=1e-8)
    moved = tables.solve(shaped, policy) - V + potential
    run.check("shaping_changes_values_beyond_potential_by", abs(moved).max() / size, at_most=1e-8)


def magnitude(x: np.ndarray) -> float:
    """The largest absolute value, which errors are relative to; 1 if all are 0."""
    return float(abs(x).max()) or 1.0
