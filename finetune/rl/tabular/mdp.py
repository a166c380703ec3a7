"""A Markov decision process in tables, and what is exact about a policy in it. NumPy, float64.

    V^π(s) = Σ_a π(a|s) Q^π(s,a)      Q^π(s,a) = R(s,a) + γ Σ_s' P(s'|s,a) V^π(s')      A^π = Q^π − V^π

A policy is an array (S, A) of probabilities. A terminal state absorbs: it stays where it is, with reward 0, so V = 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from finetune.errors import UserError
from finetune.rl.envs import npz

Array = NDArray[np.float64]
SUM = 1e-9  # how far the sum of a row of probabilities may be from 1, if it was not rounded
ROUNDED = 1e-3  # and however it was rounded
LARGEST = 1 << 26  # numbers of P: half a gigabyte
PART = 1 << 23  # numbers of P that are looked at together
HUGE = 1e100  # of a reward: sums and products of larger ones leave float64


@dataclass(frozen=True)
class MDP:
    """Made by `make`, which checks it."""

    P: Array  # (S, A, S) probability of the next state
    R: Array  # (S, A) expected reward
    rewards: Array  # (S, A, S) expected reward given the next state
    gamma: float
    terminal: NDArray[np.bool_]  # (S,)
    start: Array  # (S,) distribution of the first state
    allowed: NDArray[np.bool_]  # (S, A); every state has an action
    actions: tuple[str, ...]  # names
    shape: tuple[int, int] | None = None  # rows and columns, where the states are the cells of a grid
    name: str = ""
    rounding: float = 0.0  # how far a row of P was from 1 before it was divided by its sum

    @property
    def size(self) -> tuple[int, int]:
        """(S, A)"""
        return self.R.shape  # type: ignore[return-value]

    def discounted(self, gamma: float) -> MDP:
        """The same with another γ."""
        check_gamma(gamma)
        return replace(self, gamma=float(gamma))


# --- Policies and their exact values


def uniform(mdp: MDP) -> Array:
    """The policy that takes every allowed action equally often."""
    return mdp.allowed / mdp.allowed.sum(1, keepdims=True)


def one_hot(mdp: MDP, actions: ArrayLike) -> Array:
    """The policy that takes actions[s] in state s."""
    return np.eye(mdp.size[1])[np.asarray(actions)]


TIE = 1e-11  # part of the numbers that a Q is a sum of, within which two are equal but for rounding


def near_best(mdp: MDP, V: Array, tie: float = TIE) -> NDArray[np.bool_]:
    """(S, A) the actions whose Q under V is the largest, or less by `tie` of what it is a sum of: |R| + γ P |V|. So it
    holds for rewards of any size, and for a state whose numbers are small beside another's."""
    q = action_values(mdp, V)
    size = abs(mdp.R) + mdp.gamma * (mdp.P @ abs(V))
    best = np.take_along_axis(size, q.argmax(1, keepdims=True), 1)
    return np.asarray(q >= q.max(1, keepdims=True) - tie * np.maximum(size, best))


def greedy(mdp: MDP, V: Array, tie: float = TIE) -> Array:
    """The policy that takes an action of the largest Q(s, ·) under V; of those that tie (`near_best`), the first."""
    return one_hot(mdp, near_best(mdp, V, tie).argmax(1))


def under(mdp: MDP, policy: Array) -> tuple[Array, Array]:
    """Transition matrix (S, S) and expected reward (S,) when `policy` acts."""
    return np.einsum("sa,sat->st", policy, mdp.P), (policy * mdp.R).sum(1)


def solve(mdp: MDP, policy: Array) -> Array:
    """V^π (S,) by solving (I − γ P_π) V = R_π. UserError if γ = 1 and the policy may never end."""
    P, r = under(mdp, policy)
    inner = ~mdp.terminal
    check_ends(mdp, P)
    V = np.zeros(len(r))
    V[inner] = np.linalg.solve(np.eye(inner.sum()) - mdp.gamma * P[np.ix_(inner, inner)], r[inner])
    return V


def action_values(mdp: MDP, V: Array) -> Array:
    """Q (S, A) = R + γ P V; −inf where an action is not allowed."""
    return np.where(mdp.allowed, mdp.R + mdp.gamma * (mdp.P @ V), -np.inf)


def advantages(mdp: MDP, policy: Array) -> Array:
    """A^π (S, A) = Q^π − V^π; −inf where an action is not allowed."""
    V = solve(mdp, policy)
    return action_values(mdp, V) - V[:, None]


def visits(mdp: MDP, policy: Array) -> Array:
    """Σ_t γ^t Pr(s_t = s) for every state (S,) from `start`; 0 for terminal states, so that with γ = 1 it is finite."""
    P, _ = under(mdp, policy)
    inner = ~mdp.terminal
    check_ends(mdp, P)
    d = np.zeros(len(P))
    d[inner] = np.linalg.solve(np.eye(inner.sum()) - mdp.gamma * P[np.ix_(inner, inner)].T, mdp.start[inner])
    return d


def performance(mdp: MDP, policy: Array) -> float:
    """J(π) = Σ_s start(s) V^π(s)."""
    return float(mdp.start @ solve(mdp, policy))


def check_ends(mdp: MDP, P: Array) -> None:
    """With γ = 1, UserError unless a terminal state is reached with probability 1 under the transition matrix P."""
    if mdp.gamma < 1:
        return
    reached, edges = mdp.terminal.copy(), P > 0
    while True:
        more = reached | (edges & reached).any(1)
        if (more == reached).all():
            break
        reached = more
    if not reached.all():
        raise UserError(
            f"with γ = 1 a policy that never ends has no value, and here it does not end from state "
            f"{int((~reached).argmax())}: choose a γ below 1, or a policy that ends"
        )


def sample_next(mdp: MDP, states: NDArray[Any], actions: NDArray[Any], uniforms: Array) -> NDArray[np.intp]:
    """Next states (N,), one for each state, action and number from [0, 1) (the cumulative probability, inverted)."""
    rows = max(1, PART // len(mdp.P))  # at a time: each needs all probabilities of its pair
    parts = [slice(i, i + rows) for i in range(0, max(1, len(states)), rows)]
    return np.concatenate([pick(mdp.P[states[p], actions[p]].cumsum(1), uniforms[p]) for p in parts])


def pick(cumulative: Array, uniforms: Array) -> NDArray[np.intp]:
    """An index (N,) for each number from [0, 1), by cumulative probabilities (N, C), or (1, C) for all alike."""
    return (uniforms[:, None] * cumulative[:, -1:] >= cumulative).sum(1)


# --- Making one


def make(
    P: ArrayLike,
    R: ArrayLike,
    gamma: float,
    *,
    terminal: ArrayLike | None = None,
    start: ArrayLike | None = None,
    allowed: ArrayLike | None = None,
    actions: tuple[str, ...] | None = None,
    shape: tuple[int, int] | None = None,
    name: str = "",
) -> MDP:
    """P (S, A, S); R (S, A) or (S, A, S). UserError names what is wrong, row by row. Rows of P, and `start`, that sum
    to 1 as far as their type or their number of decimals can say are divided by their sum.

    terminal (S,): none given, those states that every action leaves where they are, for nothing. start (S,): none
    given, all states that are not terminal alike. allowed (S, A): all.
    """
    P, R = np.asarray(P), np.asarray(R)
    if P.ndim != 3 or P.shape[0] != P.shape[2] or 0 in P.shape:
        raise UserError(f"P has shape {P.shape}: it must be (states, actions, states)")
    S, A, _ = P.shape
    if P.size > LARGEST:
        raise UserError(f"P is {S:,} × {A:,} × {S:,}: more than the {LARGEST:,} numbers that are taken")
    if R.shape not in ((S, A), (S, A, S)):
        raise UserError(f"R has shape {R.shape}: with this P it must be {(S, A)} or {(S, A, S)}")
    check_gamma(gamma)
    of_type, P, R = P.dtype, np.array(P, np.float64), np.array(R, np.float64)
    may = np.ones((S, A), bool) if allowed is None else _flags("allowed", allowed, (S, A))
    refuse("allowed", ~np.asarray(may.any(1)), "has no action")
    sums = P.sum(2)
    refuse("P", may & ~np.isfinite(P).all(2), "holds a value that is not finite")
    refuse("P", may & (P < 0).any(2), "holds a negative probability")
    refuse("P", may & (sums == 0), "is empty", fix=NOT_ALLOWED)
    away = np.where(may, abs(sums - 1), 0.0)
    hint = DIVIDE if away.max() < 0.02 else ""
    refuse("P", away > rounding(P[may], of_type), "sums to {}, not to 1", sums, fix=hint)
    rounded = float(away.max()) if away.max() > SUM else 0.0
    if rounded:
        P /= np.where(may, sums, 1.0)[:, :, None]
    with np.errstate(over="ignore"):
        pays = R if R.ndim == 2 else np.where(P > 0, R, 0).sum(2)  # what cannot happen pays nothing
    refuse("R", may & (pays == -np.inf), "is −inf", fix=NOT_ALLOWED)
    refuse("R", may & ~np.isfinite(pays), "is not finite")
    refuse("R", may & (abs(pays) > HUGE), f"is beyond ±{HUGE:g}")
    P[~may] = 0
    R[~may] = 0
    rewards = R if R.ndim == 3 else np.broadcast_to(R[:, :, None], P.shape)
    rewards = np.where(P > 0, rewards, 0.0)
    stays = np.einsum("sas->sa", P) == 1
    if terminal is None:
        ends = ((stays & (np.einsum("sas->sa", rewards) == 0)) | ~may).all(1)
    else:
        ends = _flags("terminal", terminal, (S,))
    P[ends] = np.eye(S)[ends][:, None, :]
    P[~may] = 0
    rewards[ends] = 0.0
    if start is None:
        first = (~ends) / max(1, (~ends).sum())
    else:
        first = _shaped("start", start, (S,)).astype(np.float64)
        refuse("start", ~np.isfinite(first) | (first < 0), "is not a probability")
        if not abs(first.sum() - 1) <= rounding(first[None], np.asarray(start).dtype):
            raise UserError(f"start sums to {written(first.sum())}, not to 1")
        if abs(first.sum() - 1) > SUM:
            first = first / first.sum()
    names = tuple(map(str, range(A))) if actions is None else actions
    if len(names) != A:
        raise UserError(f"{len(names)} names for {A} actions")
    if shape is not None and shape[0] * shape[1] != S:
        raise UserError(f"shape {shape} is not that of {S} states")
    expected = (P * rewards).sum(2)
    for array in (P, expected, rewards, ends, first, may):
        array.flags.writeable = False
    return MDP(P, expected, rewards, float(gamma), ends, first, may, names, shape, name, rounded)


NOT_ALLOWED = ": where an action is not possible, say so with `allowed` (states, actions) of 0 and 1"
DIVIDE = ": if they were rounded, divide each row by its sum"


def rounding(rows: Array, of_type: np.dtype[Any]) -> float:
    """How far the sum of such rows (…, S) of probabilities may be from 1 because each number was rounded: to its type,
    or to a number of decimals that all of them have, from three on."""
    count = max(1, int((rows > 0).sum(-1).max(initial=0)))
    type_eps = float(np.finfo(of_type).eps) if of_type.kind == "f" else 0.0
    found = max(SUM, (count + 4) * type_eps / 2)
    for decimals in range(3, 10):
        scaled = rows * 10.0**decimals
        if (abs(scaled - scaled.round()) <= 10.0**decimals * max(type_eps, 1e-15)).all():
            found = max(found, 0.5 * count * 10.0**-decimals)
            break
    return min(found, ROUNDED)


def garnet(
    states: int,
    actions: int,
    branching: int,
    generator: np.random.Generator,
    gamma: float,
    *,
    reach: int | None = None,
    mean: float = 0.0,
    ending: float = 0.0,
) -> MDP:
    """A random MDP (Archibald et al. 1995): each pair leads to `branching` states, with rewards from N(mean, 1).

    reach: the states lie on a ring, and a step goes at most so far; none: anywhere. ending: probability that a step
    ends the episode; if it is above 0 there is one more state, the last, which is terminal.
    """
    near = np.arange(states) if reach is None else np.arange(-reach, reach + 1)
    if not (1 <= branching <= len(near) <= states and actions >= 1 and 0 <= ending < 1):
        raise UserError(
            f"no random MDP has {states} states, {actions} actions, {branching} successors"
            f"{'' if reach is None else f' at most {reach} away'} and the end with probability {ending}"
        )
    P = np.zeros((states, actions, states))
    for s in range(states):
        for a in range(actions):
            cuts = np.sort(generator.random(branching - 1))
            after = (s + generator.permutation(near)[:branching]) % states
            P[s, a, after] = np.diff(cuts, prepend=0.0, append=1.0)
    R = mean + generator.standard_normal((states, actions))
    if ending:
        P = np.pad((1 - ending) * P, ((0, 1), (0, 0), (0, 1)), constant_values=ending)
        R = np.pad(R, ((0, 1), (0, 0)))
        P[states] = np.eye(states + 1)[states]
    return make(P, R, gamma, terminal=np.arange(len(P)) >= states, name="garnet")


def from_gymnasium(env: Any, gamma: float, **kwargs: Any) -> MDP:
    """The table `P` of a gymnasium environment, or of the id of one (kwargs go to gymnasium.make).

    A state that is entered only at an end is terminal. If some state is entered both ways, what ends goes to one more
    state, the last. Rewards of several transitions from s to s' under one action are averaged: values do not change.
    """
    if isinstance(env, str):
        from finetune.rl.envs.environments import make_unlimited

        env = make_unlimited(env, **kwargs)
    name = env.spec.id if env.spec else type(env.unwrapped).__name__
    table = getattr(env.unwrapped, "P", None)
    if not isinstance(table, dict):
        raise UserError(f"'{name}' has no table of transitions (env.unwrapped.P); FrozenLake-v1 has one")
    rows, S, A = _rows(table, name, env)
    ends, goes_on = np.zeros(S, bool), np.zeros(S, bool)
    for s, _, p, after, _, done in rows:
        if p > 0 and s != after:
            (ends if done else goes_on)[after] = True
    extra = bool((ends & goes_on).any())
    states = S + extra
    P, total = np.zeros((states, A, states)), np.zeros((states, A, states))
    terminal = np.zeros(states, bool)
    for s, a, p, after, reward, done in rows:
        t = S if extra and done else int(after)
        P[s, a, t] += p
        total[s, a, t] += p * reward
        terminal[t] |= done and p > 0
    if extra:
        P[S, :, S] = 1
    rewards = np.divide(total, P, out=np.zeros_like(total), where=P > 0)
    first = getattr(env.unwrapped, "initial_state_distrib", None)
    start = None if first is None else np.append(np.asarray(first, np.float64), np.zeros(int(extra)))
    arrows, shape = _grid(env.unwrapped, S)
    try:
        return make(P, rewards, gamma, terminal=terminal, start=start, name=name,
                    actions=arrows or tuple(map(str, range(A))), shape=None if extra else shape)  # fmt: skip
    except UserError as e:
        raise UserError(f"'{name}': {e}") from None


Row = tuple[int, int, float, int, float, bool]


def _rows(table: dict[Any, Any], name: str, env: Any) -> tuple[list[Row], int, int]:
    """Of the table P[state][action] = [(probability, next state, reward, over), …]: (state, action, probability, next
    state, reward, over) in rows, and how many states and actions there are, counted from 0."""
    first = [int(getattr(getattr(env, space, None), "start", 0)) for space in ("observation_space", "action_space")]
    S, A = len(table), len(table.get(first[0], ()))
    rows = []
    try:
        if not S * A:
            raise ValueError("it is empty")
        for s, a in np.ndindex(S, A):
            for p, after, reward, over in table[first[0] + s][first[1] + a]:
                rows.append((s, a, float(p), int(after) - first[0], float(reward), bool(over)))
                if not 0 <= rows[-1][3] < S:
                    raise ValueError(f"the next state {after} is none of {S}")
    except (TypeError, ValueError, KeyError, IndexError) as e:
        raise UserError(
            f"'{name}': its table P is not {{state: {{action: [(probability, next state, reward, over), …]}}}}: "
            f"{type(e).__name__}: {e}"
        ) from None
    return rows, S, A


def _grid(env: Any, states: int) -> tuple[tuple[str, ...] | None, tuple[int, int] | None]:
    """Names of the actions of gymnasium's own worlds, and the rows and columns of those that are a grid."""
    kind = type(env).__name__
    if kind == "FrozenLakeEnv":
        return ("←", "↓", "→", "↑"), (env.nrow, env.ncol)
    if kind == "CliffWalkingEnv":
        return ("↑", "→", "↓", "←"), env.shape
    if kind == "TaxiEnv":
        return ("↓", "↑", "→", "←", "pick up", "drop off"), None
    return None, None


FIELDS = ("P", "R", "gamma", "terminal", "start", "allowed")


def load(path: Path, gamma: float | None = None, say: Callable[[str], None] = lambda text: None) -> MDP:
    """An MDP from an npz of P and R and, if they differ from `make`'s own, gamma, terminal, start and allowed. `say` is
    told if rows were divided by their sums."""
    found, unknown = npz.read(path, FIELDS, numbers=2 * LARGEST)
    for name in ("P", "R"):
        if name not in found:
            raise UserError(f"{path} has no {name}: it needs P (states, actions, states) and R (states, actions)")
    if unknown:
        raise UserError(f"{path} holds {', '.join(sorted(unknown))[:100]}, which is none of {', '.join(FIELDS)}")
    for name, array in found.items():
        if array.dtype.kind not in "biuf":
            raise UserError(f"{path}: {name} is not numeric but {array.dtype}")
    if found.get("gamma", np.zeros(())).ndim:
        raise UserError(f"{path}: gamma must be one number")
    own = float(found["gamma"]) if "gamma" in found else None
    chosen = own if gamma is None else gamma
    if chosen is None:
        raise UserError(f"{path} has no gamma: give one with --gamma")
    rest: dict[str, Any] = {name: found[name] for name in ("terminal", "start", "allowed") if name in found}
    try:
        made = make(found["P"], found["R"], chosen, name=Path(path).stem, **rest)
    except UserError as e:
        raise UserError(f"{path}: {e}") from None
    if made.rounding:
        say(f"{path}: rows of P sum to 1 within {made.rounding:.1e}, as rounded numbers do; each is divided by its sum")
    return made


def save(mdp: MDP, path: Path) -> None:
    """The npz that `load` reads."""
    np.savez_compressed(path, P=mdp.P, R=mdp.rewards, gamma=mdp.gamma, terminal=mdp.terminal, start=mdp.start,
                        allowed=mdp.allowed)  # fmt: skip


def check_gamma(gamma: float) -> None:
    if not 0 <= gamma <= 1:
        raise UserError(f"gamma {gamma} is not within 0 and 1")


def refuse(name: str, wrong: ArrayLike, what: str, values: Array | None = None, fix: str = "") -> None:
    """UserError that names the first rows that are wrong, how many are, and how to fix it."""
    at = [tuple(map(int, row)) for row in np.argwhere(wrong)]
    if not at:
        return
    said = [f"{name}{list(i)} {what.format('' if values is None else written(values[i]))}" for i in at[:3]]
    raise UserError("; ".join(said) + (f"; and {len(at) - 3} more" if len(at) > 3 else "") + fix)


def written(x: float) -> str:
    """A number with nine digits, or with all if with nine it would read as 1."""
    return f"{x:.17g}" if f"{x:.9g}" == "1" else f"{x:.9g}"


def _flags(name: str, array: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    found = _shaped(name, array, shape)
    refuse(name, (found != 0) & (found != 1), "is neither 0 nor 1")
    return found.astype(bool)


def _shaped(name: str, array: ArrayLike, shape: tuple[int, ...]) -> NDArray[Any]:
    """`array` itself, once it is known to have this shape."""
    found = np.array(array)
    if found.shape != shape:
        raise UserError(f"{name} has shape {found.shape}: it must be {shape}")
    return found
