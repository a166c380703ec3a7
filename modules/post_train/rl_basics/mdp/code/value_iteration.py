"""Value iteration: repeated Bellman optimality backups, in three orders, and backward induction for a finite horizon.

    V ← T V,   (T V)(s) = max_a R(s,a) + γ Σ_s' P(s'|s,a) V(s')        ‖T V − V*‖∞ ≤ γ ‖V − V*‖∞

Sutton & Barto 2018, section 4.4; Puterman 1994, sections 4.5 and 6.3.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from finetune.errors import UserError
from finetune.rl.tabular.mdp import MDP, Array, action_values


def synchronous(mdp: MDP, V: Array) -> Array:
    """One sweep of value iteration, T V: every state is backed up from the old values."""
    return action_values(mdp, V).max(1)


def in_place(mdp: MDP, V: Array, order: NDArray[np.intp] | None = None) -> Array:
    """One sweep of Gauss–Seidel value iteration: each state, in `order`, is backed up from the newest values."""
    V = V.copy()
    reward = np.where(mdp.allowed, mdp.R, -np.inf)
    for s in range(len(V)) if order is None else order:
        V[s] = (reward[s] + mdp.gamma * (mdp.P[s] @ V)).max()
    return V


class Prioritized:
    """Prioritized sweeping (Moore & Atkeson 1993): always backs up the state whose Bellman error may be the largest.

    `priority[s]` bounds |(T V)(s) − V(s)|: a change δ of V(s) raises the bound of each predecessor p by
    γ max_a P(s|p,a) |δ|.
    """

    def __init__(self, mdp: MDP, V: Array) -> None:
        self.mdp, self.V = mdp, V.copy()
        self.priority = abs(synchronous(mdp, V) - V)
        self.reward = np.where(mdp.allowed, mdp.R, -np.inf)
        self.influence = mdp.gamma * mdp.P.max(1).T.copy()  # [s, p]: how much a change of V(s) moves the error of p

    def backups(self, count: int) -> None:
        for _ in range(count):
            s = int(self.priority.argmax())
            if self.priority[s] == 0:
                return
            value = (self.reward[s] + self.mdp.gamma * (self.mdp.P[s] @ self.V)).max()
            change = abs(value - self.V[s])
            self.V[s] = value
            self.priority[s] = 0
            self.priority += self.influence[s] * change


def bellman_error(mdp: MDP, V: Array) -> float:
    """‖T V − V‖∞"""
    return float(abs(synchronous(mdp, V) - V).max())


def iterate(
    sweep: Callable[[MDP, Array], Array], mdp: MDP, tolerance: float = 1e-10, max_sweeps: int = 100_000
) -> tuple[Array, int]:
    """Repeats `sweep` from V = 0 until V is within `tolerance` · max |V| of V*, or within rounding; V and the number of
    sweeps. UserError after `max_sweeps`.

    The stopping rule is ‖V' − V*‖ ≤ γ/(1−γ) ‖V' − V‖. With γ = 1 there is no such bound, and the change itself has to
    be small.
    """
    V = np.zeros(mdp.size[0])
    factor = mdp.gamma / (1 - mdp.gamma) if mdp.gamma < 1 else 1.0
    enough = max(tolerance / max(factor, 1e-300), 4 * np.finfo(np.float64).eps)
    for count in range(1, max_sweeps + 1):
        previous, V = V, sweep(mdp, V)
        change = float(abs(V - previous).max())
        if change <= enough * abs(previous).max():
            return V, count
    why = "with γ = 1 they may have no limit" if mdp.gamma == 1 else f"γ = {mdp.gamma:.12g} needs more of them"
    raise UserError(f"the values still change by {change:.3g} after {max_sweeps} sweeps: {why}")


def finite_horizon(mdp: MDP, horizon: int) -> tuple[Array, NDArray[np.intp]]:
    """Backward induction: V (horizon + 1, S), where V[h] is optimal with h steps to go, and the optimal actions
    (horizon, S), where actions[h] are those with h + 1 steps to go."""
    V = np.zeros((horizon + 1, mdp.size[0]))
    actions = np.zeros((horizon, mdp.size[0]), np.intp)
    for h in range(horizon):
        q = action_values(mdp, V[h])
        V[h + 1], actions[h] = q.max(1), q.argmax(1)
    return V, actions
