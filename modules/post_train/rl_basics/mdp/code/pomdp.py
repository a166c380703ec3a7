"""A world that is seen through observations only: beliefs, and the exact value function over them.

    b'(s') ∝ O(z|s',a) Σ_s P(s'|s,a) b(s)        V_h(b) = max_α Σ_s b(s) α(s),   α ∈ Γ_h

The best value of h steps is convex and piecewise linear in the belief: each α-vector (S,) is the value of a plan of
h steps, state by state (Kaelbling, Littman & Cassandra 1998, *Planning and acting in partially observable domains*).
"""

import itertools
from dataclasses import dataclass

import numpy as np

from finetune.rl.tabular import mdp as mdps
from finetune.rl.tabular.mdp import MDP, Array


@dataclass(frozen=True)
class POMDP:
    mdp: MDP
    seen: Array  # O (A, S, Z): probability of each observation after action a led to state s


def tiger(gamma: float = 0.95, penalty: float = -100.0, accuracy: float = 0.85) -> POMDP:
    """Two doors, a tiger behind one: to listen costs 1 and names the right door with probability `accuracy`; to open
    pays 10 or the penalty, and the doors are closed anew. States and observations: tiger left, right."""
    P = np.full((2, 3, 2), 0.5)
    P[:, 0] = np.eye(2)
    R = np.array([[-1.0, penalty, 10.0], [-1.0, 10.0, penalty]])
    seen = np.full((3, 2, 2), 0.5)
    seen[0] = [[accuracy, 1 - accuracy], [1 - accuracy, accuracy]]
    return POMDP(mdps.make(P, R, gamma, actions=("listen", "open left", "open right"), name="tiger"), seen)


def update(pomdp: POMDP, beliefs: Array, action: int) -> tuple[Array, Array]:
    """Bayes' filter: beliefs (…, S) → the beliefs (…, Z, S) after each observation, and its probability (…, Z).
    An observation that cannot come leaves a belief of zeros."""
    joint = (beliefs @ pomdp.mdp.P[:, action])[..., None, :] * pomdp.seen[action].T  # (…, Z, S)
    chance = joint.sum(-1)
    return joint / np.where(chance > 0, chance, 1)[..., None], chance


# --- The value function


def solve(pomdp: POMDP, horizon: int, margin: float = 1e-10) -> list[tuple[Array, Array]]:
    """[Γ_1, …, Γ_horizon]: the useful α-vectors (K, S) with h steps to go, and the first action (K,) of each.

    Incremental pruning (Cassandra, Littman & Zhang 1997): the vectors of one observation, summed with those of the
    next, are pruned before the third is added. Each of its prunings lowers a value by `margin` of the largest reward at
    most.
    """
    mdp, (S, A) = pomdp.mdp, pomdp.mdp.size
    margin = margin * abs(mdp.R).max()
    alphas, stages = np.zeros((1, S)), []
    for _ in range(horizon):
        found, actions = [], []
        for a in range(A):
            mine = np.zeros((1, S))
            for z in range(pomdp.seen.shape[2]):  # g(s) = γ Σ_s' P(s'|s,a) O(z|s',a) α(s')
                after = mdp.gamma * (alphas * pomdp.seen[a, :, z]) @ mdp.P[:, a].T
                sums = (mine[:, None] + after[prune(after, margin)]).reshape(-1, S)
                mine = sums[prune(sums, margin)]
            found.append(mine + mdp.R[:, a])
            actions += [a] * len(mine)
        together = np.concatenate(found)
        kept = prune(together, margin)
        alphas = together[kept]
        stages.append((alphas, np.array(actions)[kept]))
    return stages


def prune(vectors: Array, margin: float) -> list[int]:
    """Indices of the vectors (K, S) that are the largest, by more than `margin`, somewhere among the beliefs.

    What another vector beats in every state goes first; then Lark's method (White 1991): a vector that beats those kept
    at some belief shows that one more is needed, namely the best at that belief.
    """
    scale = abs(vectors).max() or 1.0
    vectors, margin = vectors / scale, margin / scale
    left = [int(k) for k in np.unique(vectors.round(10), axis=0, return_index=True)[1]]
    left = [k for k in left if not ((vectors[left] >= vectors[k]).all(1) & (vectors[left] > vectors[k]).any(1)).any()]
    kept: list[int] = []
    while left:
        belief, by = np.eye(vectors.shape[1])[0], np.inf
        if kept:
            belief, by = where_best(vectors[left[0]], vectors[kept])
        if by <= margin:
            left.pop(0)
        else:
            values = vectors[left] @ belief
            ties = [k for k, value in zip(left, values, strict=True) if value >= values.max() - 1e-12]
            best = max(ties, key=lambda k: tuple(vectors[k]))  # that one is the best beside the belief too
            kept.append(best)
            left.remove(best)
    return kept


def where_best(vector: Array, others: Array) -> tuple[Array, float]:
    """The belief b (S,) at which `vector` beats all `others` (K, S) by the most, and by how much: the linear program

        max_b min_k b · (vector − others[k])

    It is a matrix game, and its opponent's program, max Σ y such that M y ≤ 1 for a positive M, is solved by the
    simplex method from y = 0; the prices of its constraints are the belief.
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
            break  # Dantzig's rule is fast, and Bland's never goes in a circle
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


# --- What follows from it


def value(beliefs: Array, stage: tuple[Array, Array]) -> Array:
    """V (…,) of beliefs (…, S)."""
    return (beliefs @ stage[0].T).max(-1)


def best_action(beliefs: Array, stage: tuple[Array, Array]) -> Array:
    """(…,) the first action of the best plan."""
    return stage[1][(beliefs @ stage[0].T).argmax(-1)]


def qmdp(pomdp: POMDP, horizon: int) -> tuple[Array, Array]:
    """Littman, Cassandra & Kaelbling 1995, as a stage: α_a = Q_h(·, a) of the world whose states are seen from the next
    step on. An upper bound of V_h; in it nothing is ever done in order to know more."""
    V = np.zeros(pomdp.mdp.size[0])
    for _ in range(horizon - 1):
        V = mdps.action_values(pomdp.mdp, V).max(1)
    return mdps.action_values(pomdp.mdp, V).T, np.arange(pomdp.mdp.size[1])


def simulate(
    pomdp: POMDP, stages: list[tuple[Array, Array]], count: int, draw: np.random.Generator
) -> tuple[Array, Array]:
    """Discounted returns (count,) of as many steps as there are stages, and the actions taken (steps, count). The state
    comes from mdp.start and is hidden: the policy sees observations and keeps a belief."""
    mdp = pomdp.mdp
    state = mdps.pick(mdp.start.cumsum()[None], draw.random(count))
    beliefs, total, taken = np.tile(mdp.start, (count, 1)), np.zeros(count), []
    for t, stage in enumerate(reversed(stages)):
        actions = best_action(beliefs, stage)
        after = mdps.sample_next(mdp, state, actions, draw.random(count))
        total += mdp.gamma**t * mdp.rewards[state, actions, after]
        signs = mdps.pick(pomdp.seen[actions, after].cumsum(1), draw.random(count))
        for a in np.unique(actions):
            rows = np.flatnonzero(actions == a)
            beliefs[rows] = update(pomdp, beliefs[rows], int(a))[0][np.arange(len(rows)), signs[rows]]
        state = after
        taken.append(actions)
    return total, np.array(taken)
