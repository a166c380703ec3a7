"""Average reward in place of discounting: gain and bias, Howard's policy iteration, relative value iteration.

    h(s) + g = R_π(s) + Σ_s' P_π(s'|s) h(s')        h + g* = T₁ h        min (T₁ h − h) ≤ g* ≤ max (T₁ h − h)

g is the reward per step in the long run, h the head start of each state; γ plays no part. Puterman 1994, chapter 8.
"""

from __future__ import annotations

import numpy as np

from finetune.errors import UserError
from finetune.rl.tabular.mdp import MDP, Array, under

from .policy_iteration import MAX_IMPROVEMENTS, improve
from .value_iteration import synchronous


def gain_and_bias(mdp: MDP, policy: Array) -> tuple[float, Array]:
    """g = lim E[Σ r] / T and the bias h (S,), from linear systems. UserError unless the policy is unichain.

    h + c solves the same equation for any c; the bias is h(s) = Σ_t (E[r_t | s_0 = s] − g), with mean 0 in the long
    run. Unichain: there is one recurrent class, so that g does not depend on the start.
    """
    P, r = under(mdp, policy)
    reachable = np.eye(len(r)) + P > 0
    for _ in range(len(r).bit_length()):
        reachable = reachable @ reachable
    if not reachable.all(0).any():
        raise UserError(
            "the policy is not unichain: no state is reached from all others, so its gain depends on the start"
        )
    stationary = np.linalg.solve((np.eye(len(r)) - P + 1).T, np.ones(len(r)))  # d (I − P + 𝟏𝟏ᵀ) = 𝟏ᵀ
    gain = float(stationary @ r)
    return gain, np.asarray(np.linalg.solve(np.eye(len(r)) - P + stationary, r - gain), np.float64)


def average_reward_iteration(mdp: MDP, policy: Array) -> tuple[float, Array, Array, int]:
    """The optimal gain, its bias, the policy and the number of improvements (Howard 1960), from `policy`. Every policy
    on the way has to be unichain."""
    undiscounted, seen = mdp.discounted(1.0), set[bytes]()
    for improvements in range(MAX_IMPROVEMENTS):
        gain, bias = gain_and_bias(mdp, policy)
        better = improve(undiscounted, policy, bias)
        if (better == policy).all() or better.tobytes() in seen:  # a policy recurs once only rounding is left
            return gain, bias, policy, improvements
        seen.add(better.tobytes())
        policy = better
    raise AssertionError(f"policy iteration made {MAX_IMPROVEMENTS:,} improvements")


def relative_sweep(mdp: MDP, h: Array, step: float = 0.9) -> tuple[Array, float, float]:
    """One sweep of relative value iteration: h + step · (T₁ h − h) minus its value in state 0, and the two bounds on
    the optimal gain that h implies (Odoni 1969; Puterman, theorem 8.5.5).

    A step below 1 makes a periodic chain aperiodic (Schweitzer 1971): without it the bounds of an alternating chain
    never meet.
    """
    change = synchronous(mdp.discounted(1.0), h) - h
    h = h + step * change
    return h - h[0], float(change.min()), float(change.max())
