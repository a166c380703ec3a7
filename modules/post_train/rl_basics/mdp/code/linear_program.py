"""The linear program of an MDP, solved by the simplex method: each pivot changes the action of one state.

    min Σ_s V(s)   subject to   V(s) ≥ R(s,a) + γ Σ_s' P(s'|s,a) V(s')   for all s, a

The bases are the deterministic policies, and the reduced cost of (s, a) is the advantage A^π(s,a). Dantzig's rule picks
the largest advantage (Ye 2011). Puterman 1994, section 6.9.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from finetune.errors import UserError
from finetune.rl.tabular.mdp import MDP, TIE, Array, check_ends, one_hot, solve, under

MAX_PIVOTS = 100_000
REFACTOR = 100  # pivots between two exact inversions, so that rounding does not accumulate


def linear_program(mdp: MDP) -> tuple[Array, Array, int]:
    """V*, an optimal policy and the number of pivots. UserError if the values are unbounded (possible with γ = 1).

    A pivot changes one row of I − γ P_π, hence its inverse by rank one (Sherman & Morrison).
    """
    inner = np.flatnonzero(~mdp.terminal)
    index = np.arange(len(inner))
    P, R = mdp.P[inner][:, :, inner], np.where(mdp.allowed, mdp.R, -np.inf)[inner]
    basis = terminating_policy(mdp)[inner].argmax(1)  # the action of each inner state
    inverse = V = np.empty(0)
    seen: set[bytes] = set()
    for pivot in range(MAX_PIVOTS):
        if pivot % REFACTOR == 0:
            check_ends(mdp, under(mdp, _policy(mdp, inner, basis))[0])
            inverse = np.linalg.inv(np.eye(len(inner)) - mdp.gamma * P[index, basis])
            V = inverse @ R[index, basis]
        advantage = R + mdp.gamma * (P @ V) - V[:, None]
        terms = np.where(np.isfinite(R), abs(R), 0) + mdp.gamma * (P @ abs(V)) + abs(V)[:, None]
        advantage = np.where(advantage > TIE * terms, advantage, 0.0)
        s, a = divmod(int(advantage.argmax()), mdp.size[1])
        if advantage[s, a] == 0 or basis.tobytes() in seen:
            policy = _policy(mdp, inner, basis)
            return solve(mdp, policy), policy, pivot
        change = mdp.gamma * (P[s, basis[s]] - P[s, a])  # of row s of I − γ P_π
        pivot_element = 1 + change @ inverse[:, s]
        if pivot_element <= 1e-13:
            raise UserError(f"the values have no bound: with γ = 1, state {inner[s]} pays for being returned to")
        seen.add(basis.tobytes())  # a basis recurs once only rounding is left
        column = inverse[:, s] / pivot_element
        inverse = inverse - np.outer(column, change @ inverse)
        V = V + column * advantage[s, a]
        basis[s] = a
    raise AssertionError(f"the simplex method made {MAX_PIVOTS:,} pivots")


def terminating_policy(mdp: MDP) -> Array:
    """A policy that reaches a terminal state from every state from which some policy does; the first basis."""
    actions = mdp.allowed.argmax(1)
    ends = mdp.terminal.copy()  # states from which the policy so far terminates
    while True:
        leads: NDArray[np.bool_] = np.any(mdp.P[:, :, ends] > 0, axis=2)  # (S, A)
        new = leads.any(1) & ~ends
        if not new.any():
            return one_hot(mdp, actions)
        actions[new] = leads[new].argmax(1)
        ends |= new


def _policy(mdp: MDP, inner: NDArray[np.intp], basis: NDArray[np.intp]) -> Array:
    """The policy (S, A) of a basis, which has actions for the inner states only."""
    actions = mdp.allowed.argmax(1)
    actions[inner] = basis
    return one_hot(mdp, actions)
