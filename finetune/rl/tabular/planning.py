"""Dynamic programming: V* and V^π of a known MDP, by every classical road.

    (T V)(s) = max_a Q(s,a),   Q = R + γ P V        ‖T V − V*‖∞ ≤ γ ‖V − V*‖∞

The functions of one sweep or one improvement take what they start from and return what they reach; `solve_by` goes on
until the values are within a tolerance. Sutton & Barto, chapter 4; Puterman, chapters 4 and 6.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from finetune.errors import UserError
from finetune.rl.tabular.mdp import (
    MDP,
    TIE,
    Array,
    action_values,
    check_ends,
    greedy,
    near_best,
    one_hot,
    solve,
    under,
    uniform,
)

# --- Sweeps


def evaluate(mdp: MDP, policy: Array, V: Array, sweeps: int = 1) -> Array:
    """Iterative policy evaluation: V ← R_π + γ P_π V, for all states at once."""
    P, r = under(mdp, policy)
    for _ in range(sweeps):
        V = r + mdp.gamma * (P @ V)
    return V


def synchronous(mdp: MDP, V: Array) -> Array:
    """Value iteration: V ← max_a Q(·, a), all states from the old values."""
    return action_values(mdp, V).max(1)


def in_place(mdp: MDP, V: Array, order: NDArray[np.intp] | None = None) -> Array:
    """Gauss–Seidel value iteration: each state, in `order`, from the values there are now."""
    V = V.copy()
    reward = np.where(mdp.allowed, mdp.R, -np.inf)
    for s in range(len(V)) if order is None else order:
        V[s] = (reward[s] + mdp.gamma * (mdp.P[s] @ V)).max()
    return V


class Prioritized:
    """Prioritized value iteration (Moore & Atkeson 1993): always the state whose value may be wrong the most.

    `priority[s]` bounds |(T V)(s) − V(s)|: a change δ of V(s) adds γ max_a P(s|p,a) |δ| to that of each p.
    """

    def __init__(self, mdp: MDP, V: Array) -> None:
        self.mdp, self.V = mdp, V.copy()
        self.priority = abs(synchronous(mdp, V) - V)
        self.reward = np.where(mdp.allowed, mdp.R, -np.inf)
        self.influence = mdp.gamma * mdp.P.max(1).T.copy()  # [s, p]

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


def modified(mdp: MDP, V: Array, sweeps: int = 5) -> Array:
    """Modified policy iteration (Puterman & Shin 1978): the greedy policy, then some sweeps of evaluating it.

    One sweep is value iteration; infinitely many are policy iteration.
    """
    return evaluate(mdp, greedy(mdp, V), V, sweeps)


def improve(mdp: MDP, policy: Array, V: Array, tie: float = TIE) -> Array:
    """Policy improvement: greedy by V, but an action that ties with the best (`near_best`) is kept."""
    kept = policy.argmax(1)
    best = np.where(near_best(mdp, V, tie)[np.arange(len(V)), kept], kept, action_values(mdp, V).argmax(1))
    return one_hot(mdp, best)


# --- Whole solutions


def policy_iteration(mdp: MDP, policy: Array | None = None) -> tuple[Array, Array, int]:
    """V*, an optimal policy and the number of improvements. Starts from the uniform policy, which ends if any does."""
    policy = uniform(mdp) if policy is None else policy
    V, seen = solve(mdp, policy), set[bytes]()
    for improvements in range(1, 10_000):
        better = improve(mdp, policy, V)
        if (better == policy).all() or better.tobytes() in seen:  # it comes back if all that is left is rounding
            return V, policy, improvements - 1
        seen.add(better.tobytes())
        policy, V = better, solve(mdp, better)
    raise AssertionError("policy iteration went through 10,000 policies")


def solve_by(
    sweep: Callable[[MDP, Array], Array], mdp: MDP, tolerance: float = 1e-10, most: int = 100_000
) -> tuple[Array, int]:
    """Repeats `sweep` from V = 0; values within `tolerance` · max |V| of V*, or as near as float64 comes, and how many
    sweeps it took. UserError after `most`.

    ‖V' − V*‖ ≤ γ/(1−γ) ‖V' − V‖; with γ = 1 there is no such bound and the change itself is what is small.
    """
    V = np.zeros(mdp.size[0])
    factor = mdp.gamma / (1 - mdp.gamma) if mdp.gamma < 1 else 1.0
    enough = max(tolerance / max(factor, 1e-300), 4 * np.finfo(np.float64).eps)
    for count in range(1, most + 1):
        after = sweep(mdp, V)
        change = float(abs(after - V).max())
        V = after
        if change <= enough * abs(V).max():
            return V, count
    why = "with γ = 1 they may have no limit" if mdp.gamma == 1 else f"γ = {mdp.gamma:.12g} needs more of them"
    raise UserError(f"the values still change by {change:.3g} after {most} sweeps: {why}")


def linear_program(mdp: MDP) -> tuple[Array, Array, int]:
    """V*, policy and pivots of the simplex method on

        min Σ_s V(s)   such that   V(s) ≥ R(s,a) + γ Σ_s' P(s'|s,a) V(s')   for all s, a

    Its bases are the deterministic policies, and the reduced cost of (s, a) is the advantage A^π(s,a): a pivot by
    Dantzig's rule changes the action of one state, that of the largest advantage (Ye 2011). Changing one row of
    I − γ P_π changes its inverse by rank one (Sherman & Morrison).
    """
    inner = np.flatnonzero(~mdp.terminal)
    index = np.arange(len(inner))
    P, R = mdp.P[inner][:, :, inner], np.where(mdp.allowed, mdp.R, -np.inf)[inner]
    basis = ending(mdp)[inner].argmax(1)
    inverse = V = np.empty(0)
    seen: set[bytes] = set()
    for pivot in range(100_000):
        if pivot % 100 == 0:  # anew, so that rounding does not add up
            check_ends(mdp, under(mdp, _whole(mdp, inner, basis))[0])
            inverse = np.linalg.inv(np.eye(len(inner)) - mdp.gamma * P[index, basis])
            V = inverse @ R[index, basis]
        advantage = R + mdp.gamma * (P @ V) - V[:, None]
        size = np.where(np.isfinite(R), abs(R), 0) + mdp.gamma * (P @ abs(V)) + abs(V)[:, None]
        advantage = np.where(advantage > TIE * size, advantage, 0.0)
        s, a = divmod(int(advantage.argmax()), mdp.size[1])
        if advantage[s, a] == 0 or basis.tobytes() in seen:
            policy = _whole(mdp, inner, basis)
            return solve(mdp, policy), policy, pivot
        change = mdp.gamma * (P[s, basis[s]] - P[s, a])  # of row s of I − γ P_π
        pivot_element = 1 + change @ inverse[:, s]
        if pivot_element <= 1e-13:
            raise UserError(f"the values have no bound: with γ = 1, state {inner[s]} pays for being returned to")
        seen.add(basis.tobytes())  # one that comes back is as good as the next but for rounding
        column = inverse[:, s] / pivot_element
        inverse = inverse - np.outer(column, change @ inverse)
        V = V + column * advantage[s, a]
        basis[s] = a
    raise AssertionError("the simplex method made 100,000 pivots")


def ending(mdp: MDP) -> Array:
    """A policy that comes to a terminal state from wherever some policy does: the first action towards one."""
    actions = mdp.allowed.argmax(1)
    reached = mdp.terminal.copy()
    while True:
        leads: NDArray[np.bool_] = np.any(mdp.P[:, :, reached] > 0, axis=2)  # (S, A)
        new = leads.any(1) & ~reached
        if not new.any():
            return one_hot(mdp, actions)
        actions[new] = leads[new].argmax(1)
        reached |= new


def _whole(mdp: MDP, inner: NDArray[np.intp], basis: NDArray[np.intp]) -> Array:
    actions = mdp.allowed.argmax(1)
    actions[inner] = basis
    return one_hot(mdp, actions)


def finite_horizon(mdp: MDP, horizon: int) -> tuple[Array, NDArray[np.intp]]:
    """Backward induction: V (horizon + 1, S) with V[h] the best value of h steps to go, and the actions (horizon, S)
    that reach it, actions[h] with h + 1 steps to go."""
    V = np.zeros((horizon + 1, mdp.size[0]))
    actions = np.zeros((horizon, mdp.size[0]), np.intp)
    for h in range(horizon):
        q = action_values(mdp, V[h])
        V[h + 1], actions[h] = q.max(1), q.argmax(1)
    return V, actions


# --- The average reward


def gain_and_bias(mdp: MDP, policy: Array) -> tuple[float, Array]:
    """g = lim E[Σ r] / T and h (S,) with h + g = R_π + P_π h, by linear systems; γ plays no part (Puterman, chapter 8).

    Of all solutions h + c the bias: h(s) = Σ_t (E[r_t | s_0 = s] − g), whose mean in the long run is 0. UserError
    unless the policy is unichain (one set of states that is never left), as g would depend on where it starts.
    """
    P, r = under(mdp, policy)
    reaches = np.eye(len(r)) + P > 0
    for _ in range(len(r).bit_length()):
        reaches = reaches @ reaches
    if not reaches.all(0).any():
        raise UserError(
            "the policy is not unichain: no state is reached from all others, so its gain depends on the start"
        )
    limit = np.linalg.solve((np.eye(len(r)) - P + 1).T, np.ones(len(r)))  # d (I − P + 𝟏𝟏ᵀ) = 𝟏ᵀ: the stationary d
    gain = float(limit @ r)
    return gain, np.asarray(np.linalg.solve(np.eye(len(r)) - P + limit, r - gain), np.float64)


def average_reward_iteration(mdp: MDP, policy: Array) -> tuple[float, Array, Array, int]:
    """The best gain, its bias, the policy and the number of improvements, by Howard's policy iteration (1960) from
    `policy`. Every policy on the way has to be unichain."""
    endless, seen = mdp.discounted(1.0), set[bytes]()
    for improvements in range(10_000):
        gain, bias = gain_and_bias(mdp, policy)
        better = improve(endless, policy, bias)
        if (better == policy).all() or better.tobytes() in seen:  # it comes back if all that is left is rounding
            return gain, bias, policy, improvements
        seen.add(better.tobytes())
        policy = better
    raise AssertionError("policy iteration went through 10,000 policies")


def relative_sweep(mdp: MDP, h: Array, step: float = 0.9) -> tuple[Array, float, float]:
    """Relative value iteration: h + step · (T h − h), less its value in state 0; and what the best gain lies between,
    min (T h − h) ≤ g* ≤ max (T h − h), which holds for any h (Odoni 1969; Puterman, theorem 8.5.5).

    A step below 1 is the transform that makes a periodic chain aperiodic (Schweitzer 1971): without it the bounds of
    one that alternates never meet.
    """
    change = synchronous(mdp.discounted(1.0), h) - h
    h = h + step * change
    return h - h[0], float(change.min()), float(change.max())
