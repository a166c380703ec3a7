"""Partially observable MDPs: beliefs, exact value iteration with α-vectors, the QMDP approximation, simulation.

    b'(s') ∝ O(z|s',a) Σ_s P(s'|s,a) b(s)        V_h(b) = max_α Σ_s b(s) α(s),   α ∈ Γ_h

The optimal value of h steps is convex and piecewise linear in the belief: each α-vector (S,) is the value of a plan of
h steps in every state (Kaelbling, Littman & Cassandra 1998, *Planning and acting in partially observable domains*).
"""

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finetune.rl.tabular import mdp as tables
from finetune.rl.tabular.mdp import MDP, Array

Stage = tuple[Array, NDArray[np.intp]]  # α-vectors (K, S), and the first action (K,) of each plan


@dataclass(frozen=True)
class POMDP:
    """An MDP whose state is hidden: after each step an observation z is drawn from O(z|s',a)."""

    mdp: MDP
    observe: Array  # O (A, S, Z): probability of each observation after action a led to state s


def tiger(gamma: float = 0.95, penalty: float = -100.0, accuracy: float = 0.85) -> POMDP:
    """Two doors, a tiger behind one. Listening costs 1 and names the right door with probability `accuracy`; opening
    pays 10 or the penalty, and the tiger is placed again. States and observations: tiger left, tiger right."""
    P = np.full((2, 3, 2), 0.5)
    P[:, 0] = np.eye(2)
    R = np.array([[-1.0, penalty, 10.0], [-1.0, 10.0, penalty]])
    observe = np.full((3, 2, 2), 0.5)
    observe[0] = [[accuracy, 1 - accuracy], [1 - accuracy, accuracy]]
    return POMDP(tables.make(P, R, gamma, actions=("listen", "open left", "open right"), name="tiger"), observe)


def update(pomdp: POMDP, beliefs: Array, action: int) -> tuple[Array, Array]:
    """The Bayes filter: beliefs (…, S) → the beliefs (…, Z, S) after each observation, and its probability (…, Z).
    An impossible observation has a belief of zeros."""
    joint = (beliefs @ pomdp.mdp.P[:, action])[..., None, :] * pomdp.observe[action].T  # (…, Z, S)
    chance = joint.sum(-1)
    return joint / np.where(chance > 0, chance, 1)[..., None], chance


# --- The value function


def solve(pomdp: POMDP, horizon: int, margin: float = 1e-10) -> list[Stage]:
    """Stages [Γ_1, …, Γ_horizon]: the useful α-vectors (K, S) with h steps to go, and the first action (K,) of each.

    Incremental pruning (Cassandra, Littman & Zhang 1997): the vectors of one observation, summed with those of the
    next, are pruned before a third is added. One pruning lowers a value by at most `margin` times the largest reward.
    """
    mdp, (S, A) = pomdp.mdp, pomdp.mdp.size
    margin = margin * abs(mdp.R).max()
    alphas, stages = np.zeros((1, S)), list[Stage]()
    for _ in range(horizon):
        vectors, actions = [], []
        for a in range(A):
            plans = np.zeros((1, S))  # what follows action a, over the observations so far
            for z in range(pomdp.observe.shape[2]):  # g(s) = γ Σ_s' P(s'|s,a) O(z|s',a) α(s')
                after = mdp.gamma * (alphas * pomdp.observe[a, :, z]) @ mdp.P[:, a].T
                sums = (plans[:, None] + after[prune(after, margin)]).reshape(-1, S)
                plans = sums[prune(sums, margin)]
            vectors.append(plans + mdp.R[:, a])
            actions += [a] * len(plans)
        candidates = np.concatenate(vectors)
        kept = prune(candidates, margin)
        alphas = candidates[kept]
        stages.append((alphas, np.array(actions)[kept]))
    return stages


def prune(vectors: Array, margin: float) -> list[int]:
    """Indices of the vectors (K, S) that are the largest at some belief, by more than `margin`.

    First, vectors dominated in every state are dropped. Then Lark's method (White 1991): wherever a vector beats those
    kept so far, the best vector at that belief is kept too.
    """
    scale = abs(vectors).max() or 1.0
    vectors, margin = vectors / scale, margin / scale
    left = [int(k) for k in np.unique(vectors.round(10), axis=0, return_index=True)[1]]
    left = [k for k in left if not ((vectors[left] >= vectors[k]).all(1) & (vectors[left] > vectors[k]).any(1)).any()]
    kept: list[int] = []
    while left:
        belief, gap = np.eye(vectors.shape[1])[0], np.inf
        if kept:
            belief, gap = largest_gap(vectors[left[0]], vectors[kept])
        if gap <= margin:
            left.pop(0)
        else:
            values = vectors[left] @ belief
            ties = [k for k, value in zip(left, values, strict=True) if value >= values.max() - 1e-12]
            best = max(ties, key=lambda k: tuple(vectors[k]))  # of those that tie, the best at neighboring beliefs
            kept.append(best)
            left.remove(best)
    return kept


def largest_gap(vector: Array, others: Array) -> tuple[Array, float]:
    """The belief b (S,) at which `vector` exceeds all `others` (K, S) by the most, and that gap: the linear program

        max_b min_k b · (vector − others[k])

    It is a matrix game. The opponent's program, max Σ y subject to M y ≤ 1 with a positive M, is solved by the simplex
    method from y = 0; the dual prices of its constraints are the belief.
    """
    M = (vector - others).T  # (S, K)
    shift = 1 - M.min()
    states, choices = M.shape
    table = np.block([[M + shift, np.eye(states), np.ones((states, 1))],
                      [-np.ones((1, choices)), np.zeros((1, states + 1))]])  # fmt: skip
    basis = list(range(choices, choices + states))
    for pivot in itertools.count():
        prices = table[-1, :-1]
        if prices.min() >= -1e-12:
            break
        # Dantzig's rule is fast; Bland's, from the twentieth pivot on, never cycles
        enters = int(prices.argmin() if pivot < 20 else (prices < -1e-12).argmax())
        column = table[:-1, enters]
        ratios = np.where(column > 1e-12, table[:-1, -1] / np.where(column > 1e-12, column, 1), np.inf)
        leaves = min(np.flatnonzero(ratios <= ratios.min() + 1e-15), key=lambda row: basis[row])
        table[leaves] /= table[leaves, enters]
        rest = np.arange(states + 1) != leaves
        table[rest] -= np.outer(table[rest, enters], table[leaves])
        basis[leaves] = enters
    total = table[-1, -1]
    return table[-1, choices:-1] / total, 1 / total - shift


# --- Acting on it


def value(beliefs: Array, stage: Stage) -> Array:
    """V (…,) at beliefs (…, S)."""
    return (beliefs @ stage[0].T).max(-1)


def optimal_action(beliefs: Array, stage: Stage) -> NDArray[np.intp]:
    """The first action (…,) of the optimal plan at beliefs (…, S)."""
    return stage[1][(beliefs @ stage[0].T).argmax(-1)]


def qmdp(pomdp: POMDP, horizon: int) -> Stage:
    """The QMDP approximation as a stage: α_a = Q_h(·, a) of the fully observed MDP (Littman, Cassandra & Kaelbling
    1995). An upper bound of V_h: it assumes the state is observed from the next step on, so it never gathers
    information."""
    V = np.zeros(pomdp.mdp.size[0])
    for _ in range(horizon - 1):
        V = tables.action_values(pomdp.mdp, V).max(1)
    return tables.action_values(pomdp.mdp, V).T, np.arange(pomdp.mdp.size[1])


def simulate(pomdp: POMDP, stages: list[Stage], count: int, rng: np.random.Generator) -> tuple[Array, NDArray[np.intp]]:
    """Discounted returns (count,) over as many steps as there are stages, and the actions (steps, count). The state is
    drawn from mdp.start and hidden: the policy sees observations and updates a belief."""
    mdp = pomdp.mdp
    state = tables.pick(mdp.start.cumsum()[None], rng.random(count))
    beliefs, returns, taken = np.tile(mdp.start, (count, 1)), np.zeros(count), []
    for t, stage in enumerate(reversed(stages)):
        actions = optimal_action(beliefs, stage)
        next_state = tables.sample_next(mdp, state, actions, rng.random(count))
        returns += mdp.gamma**t * mdp.rewards[state, actions, next_state]
        observations = tables.pick(pomdp.observe[actions, next_state].cumsum(1), rng.random(count))
        for a in np.unique(actions):
            rows = np.flatnonzero(actions == a)
            beliefs[rows] = update(pomdp, beliefs[rows], int(a))[0][np.arange(len(rows)), observations[rows]]
        state = next_state
        taken.append(actions)
    return returns, np.array(taken)
