"""Modified policy iteration: act greedily, then evaluate that policy by a few sweeps only (Puterman & Shin 1978).

    π = greedy(V)        V ← T_π^m V        m = 1: value iteration, m = ∞: policy iteration

Puterman 1994, section 6.5.
"""

from __future__ import annotations

from finetune.rl.tabular.mdp import MDP, Array, evaluate, greedy


def modified(mdp: MDP, V: Array, sweeps: int = 5) -> Array:
    """One iteration: the greedy policy under V, then `sweeps` sweeps of iterative policy evaluation from V."""
    return evaluate(mdp, greedy(mdp, V), V, sweeps)
