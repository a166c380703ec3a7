"""Policy iteration: evaluate the policy exactly, act greedily, repeat until the policy is stable (Howard 1960).

    V = (I − γ P_π)⁻¹ R_π        π'(s) = argmax_a R(s,a) + γ Σ_s' P(s'|s,a) V(s')        V^π' ≥ V^π

Sutton & Barto 2018, section 4.3; Puterman 1994, section 6.4.
"""

from __future__ import annotations

import numpy as np

from finetune.rl.tabular.mdp import MDP, TIE, Array, action_values, greedy_actions, one_hot, solve, uniform

MAX_IMPROVEMENTS = 10_000


def improve(mdp: MDP, policy: Array, V: Array, tie: float = TIE) -> Array:
    """Policy improvement: the greedy policy under V, which keeps the action of `policy` where that one ties."""
    kept = policy.argmax(1)
    still_greedy = greedy_actions(mdp, V, tie)[np.arange(len(V)), kept]
    return one_hot(mdp, np.where(still_greedy, kept, action_values(mdp, V).argmax(1)))


def policy_iteration(mdp: MDP, policy: Array | None = None) -> tuple[Array, Array, int]:
    """V*, an optimal policy and the number of improvements, from `policy`.

    The default is the uniform policy: with γ = 1 it terminates if any policy does.
    """
    policy = uniform(mdp) if policy is None else policy
    V, seen = solve(mdp, policy), set[bytes]()
    for improvements in range(MAX_IMPROVEMENTS):
        better = improve(mdp, policy, V)
        if (better == policy).all() or better.tobytes() in seen:  # a policy recurs once only rounding is left
            return V, policy, improvements
        seen.add(better.tobytes())
        policy, V = better, solve(mdp, better)
    raise AssertionError(f"policy iteration made {MAX_IMPROVEMENTS:,} improvements")
