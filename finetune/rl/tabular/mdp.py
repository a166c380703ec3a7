"""Finite Markov decision processes as NumPy tables, and the exact values of a policy (float64).

    V^π(s) = Σ_a π(a|s) Q^π(s,a)      Q^π(s,a) = R(s,a) + γ Σ_s' P(s'|s,a) V^π(s')      A^π = Q^π − V^π

A policy is an array (S, A) of probabilities. A terminal state is absorbing: it leads to itself with reward 0, so V = 0.
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
SUM_TOLERANCE = 1e-9  # how far a row of unrounded probabilities may sum from 1
ROUNDED_SUM_TOLERANCE = 1e-3  # the same for a row of rounded ones, at most
MAX_P_SIZE = 1 << 26  # entries of P: half a gigabyte
CHUNK = 1 << 23  # entries of P that `sample_next` gathers at a time
MAX_REWARD = 1e100  # sums and products of larger rewards overflow float64


@dataclass(frozen=True)
class MDP:
    """The tables of a finite MDP. Build one with `make`, which validates them."""

    P: Array  # (S, A, S) transition probabilities P(s'|s,a)
    R: Array  # (S, A) expected reward
    rewards: Array  # (S, A, S) expected reward given the next state as well
    gamma: float
    terminal: NDArray[np.bool_]  # (S,)
    start: Array  # (S,) distribution of the first state
    allowed: NDArray[np.bool_]  # (S, A); every state has at least one action
    actions: tuple[str, ...]  # names of the actions
    shape: tuple[int, int] | None = None  # rows and columns, where the states are the cells of a grid
    name: str = ""
    rounding: float = 0.0  # how far the worst row of P summed from 1 before it was normalized

    @property
    def size(self) -> tuple[int, int]:
        """(S, A)"""
        return self.R.shape  # type: ignore[return-value]

    def discounted(self, gamma: float) -> MDP:
        """The same MDP with another γ."""
        check_gamma(gamma)
        return replace(self, gamma=float(gamma))


# --- Policies and their exact values


def uniform(mdp: MDP) -> Array:
    """The policy that takes every allowed action equally often."""
    return mdp.allowed / mdp.allowed.sum(1, keepdims=True)


def one_hot(mdp: MDP, actions: ArrayLike) -> Array:
    """The policy that takes actions[s] in state s."""
    return np.eye(mdp.size[1])[np.asarray(actions)]


TIE = 1e-11  # relative difference of two action values that may be rounding alone


def greedy_actions(mdp: MDP, V: Array, tie: float = TIE) -> NDArray[np.bool_]:
    """Mask (S, A) of the actions that maximize Q(s, ·) under V, ties included.

    Two values tie within `tie` times the terms they are summed from, |R| + γ P |V|. This is scale-free: it holds for
    rewards of any unit, and for a state with small values next to one with large values.
    """
    q = action_values(mdp, V)
    terms = abs(mdp.R) + mdp.gamma * (mdp.P @ abs(V))
    terms_of_max = np.take_along_axis(terms, q.argmax(1, keepdims=True), 1)
    return np.asarray(q >= q.max(1, keepdims=True) - tie * np.maximum(terms, terms_of_max))


def greedy(mdp: MDP, V: Array, tie: float = TIE) -> Array:
    """The policy that is greedy with respect to V: the first of the `greedy_actions` in each state."""
    return one_hot(mdp, greedy_actions(mdp, V, tie).argmax(1))


def under(mdp: MDP, policy: Array) -> tuple[Array, Array]:
    """The Markov reward process under `policy`: P_π (S, S) and R_π (S,)."""
    return np.einsum("sa,sat->st", policy, mdp.P), (policy * mdp.R).sum(1)


def solve(mdp: MDP, policy: Array) -> Array:
    """V^π (S,), the solution of (I − γ P_π) V = R_π. UserError if γ = 1 and the policy may never terminate."""
    P, r = under(mdp, policy)
    inner = ~mdp.terminal
    check_ends(mdp, P)
    V = np.zeros(len(r))
    V[inner] = np.linalg.solve(np.eye(inner.sum()) - mdp.gamma * P[np.ix_(inner, inner)], r[inner])
    return V


def evaluate(mdp: MDP, policy: Array, V: Array, sweeps: int = 1) -> Array:
    """Iterative policy evaluation: `sweeps` times V ← R_π + γ P_π V, all states at once."""
    P, r = under(mdp, policy)
    for _ in range(sweeps):
        V = r + mdp.gamma * (P @ V)
    return V


def action_values(mdp: MDP, V: Array) -> Array:
    """Q (S, A) = R + γ P V; −inf where an action is not allowed."""
    return np.where(mdp.allowed, mdp.R + mdp.gamma * (mdp.P @ V), -np.inf)


def advantages(mdp: MDP, policy: Array) -> Array:
    """A^π (S, A) = Q^π − V^π; −inf where an action is not allowed."""
    V = solve(mdp, policy)
    return action_values(mdp, V) - V[:, None]


def visits(mdp: MDP, policy: Array) -> Array:
    """Discounted state visitation Σ_t γ^t Pr(s_t = s) (S,) from `start`; 0 in terminal states, finite with γ = 1."""
    P, _ = under(mdp, policy)
    inner = ~mdp.terminal
    check_ends(mdp, P)
    d = np.zeros(len(P))
    d[inner] = np.linalg.solve(np.eye(inner.sum()) - mdp.gamma * P[np.ix_(inner, inner)].T, mdp.start[inner])
    return d


def performance(mdp: MDP, policy: Array) -> float:
    """Expected return of a policy, J(π) = Σ_s start(s) V^π(s)."""
    return float(mdp.start @ solve(mdp, policy))


def check_ends(mdp: MDP, P: Array) -> None:
    """With γ = 1, UserError unless a terminal state is reached with probability 1 under the transition matrix P."""
    if mdp.gamma < 1:
        return
    ends, edges = mdp.terminal.copy(), P > 0  # states from which a terminal state can be reached
    while True:
        more = ends | (edges & ends).any(1)
        if (more == ends).all():
            break
        ends = more
    if not ends.all():
        raise UserError(
            f"with γ = 1 a policy that never ends has no value, and here it does not end from state "
            f"{int((~ends).argmax())}: choose a γ below 1, or a policy that ends"
        )


def sample_next(mdp: MDP, states: NDArray[Any], actions: NDArray[Any], uniforms: Array) -> NDArray[np.intp]:
    """Next states (N,) for states, actions and uniform numbers in [0, 1), by inverting the cumulative probability."""
    rows = max(1, CHUNK // len(mdp.P))  # at a time: each gathers the S probabilities of its state and action
    parts = [slice(i, i + rows) for i in range(0, max(1, len(states)), rows)]
    return np.concatenate([pick(mdp.P[states[p], actions[p]].cumsum(1), uniforms[p]) for p in parts])


def pick(cumulative: Array, uniforms: Array) -> NDArray[np.intp]:
    """Samples (N,) from categorical distributions: cumulative probabilities (N, C) or (1, C), uniform numbers (N,)."""
    return (uniforms[:, None] * cumulative[:, -1:] >= cumulative).sum(1)


# --- Construction


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
    """An MDP from P (S, A, S) and R (S, A) or (S, A, S), validated. UserError names the first wrong rows.

    Rows of P, and `start`, that sum to 1 within the precision of their dtype or their decimals are normalized.
    Defaults: terminal (S,), the states where every action leads back with reward 0; start (S,), uniform over the
    states that are not terminal; allowed (S, A), every action.
    """
    P, R = np.asarray(P), np.asarray(R)
    if P.ndim != 3 or P.shape[0] != P.shape[2] or 0 in P.shape:
        raise UserError(f"P has shape {P.shape}: it must be (states, actions, states)")
    S, A, _ = P.shape
    if P.size > MAX_P_SIZE:
        raise UserError(f"P is {S:,} × {A:,} × {S:,}: more than the {MAX_P_SIZE:,} numbers that fit")
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
    rounded = float(away.max()) if away.max() > SUM_TOLERANCE else 0.0
    if rounded:
        P /= np.where(may, sums, 1.0)[:, :, None]
    with np.errstate(over="ignore"):
        pays = R if R.ndim == 2 else np.where(P > 0, R, 0).sum(2)  # what cannot happen pays nothing
    refuse("R", may & (pays == -np.inf), "is −inf", fix=NOT_ALLOWED)
    refuse("R", may & ~np.isfinite(pays), "is not finite")
    refuse("R", may & (abs(pays) > MAX_REWARD), f"is beyond ±{MAX_REWARD:g}")
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
        if abs(first.sum() - 1) > SUM_TOLERANCE:
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
    """How far rows (…, S) of probabilities may sum from 1 because of rounding: to their dtype, or to the number of
    decimals (three or more) that all entries share."""
    count = max(1, int((rows > 0).sum(-1).max(initial=0)))
    type_eps = float(np.finfo(of_type).eps) if of_type.kind == "f" else 0.0
    found = max(SUM_TOLERANCE, (count + 4) * type_eps / 2)
    for decimals in range(3, 10):
        scaled = rows * 10.0**decimals
        if (abs(scaled - scaled.round()) <= 10.0**decimals * max(type_eps, 1e-15)).all():
            found = max(found, 0.5 * count * 10.0**-decimals)
            break
    return min(found, ROUNDED_SUM_TOLERANCE)


def garnet(
    states: int,
    actions: int,
    branching: int,
    rng: np.random.Generator,
    gamma: float,
    *,
    reach: int | None = None,
    mean: float = 0.0,
    ending: float = 0.0,
) -> MDP:
    """A random MDP (Archibald et al. 1995): each state–action pair leads to `branching` states; rewards are N(mean, 1).

    reach: the states form a ring and a step moves at most this far; None: anywhere. ending: probability that a step
    ends the episode; above 0 it adds a last, terminal state.
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
            cuts = np.sort(rng.random(branching - 1))
            after = (s + rng.permutation(near)[:branching]) % states
            P[s, a, after] = np.diff(cuts, prepend=0.0, append=1.0)
    R = mean + rng.standard_normal((states, actions))
    if ending:
        P = np.pad((1 - ending) * P, ((0, 1), (0, 0), (0, 1)), constant_values=ending)
        R = np.pad(R, ((0, 1), (0, 0)))
        P[states] = np.eye(states + 1)[states]
    return make(P, R, gamma, terminal=np.arange(len(P)) >= states, name="garnet")


FIELDS = ("P", "R", "gamma", "terminal", "start", "allowed")


def load(path: Path, gamma: float | None = None, report: Callable[[str], None] = lambda text: None) -> MDP:
    """An MDP from an npz file with P and R and, optionally, gamma, terminal, start and allowed. `report` is called with
    one line if rows had to be normalized."""
    found, unknown = npz.read(path, FIELDS, numbers=2 * MAX_P_SIZE)
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
        report(
            f"{path}: rows of P sum to 1 within {made.rounding:.1e}, as rounded numbers do; each is divided by its sum"
        )
    return made


def save(mdp: MDP, path: Path) -> None:
    """Writes an npz file that `load` reads."""
    np.savez_compressed(path, P=mdp.P, R=mdp.rewards, gamma=mdp.gamma, terminal=mdp.terminal, start=mdp.start,
                        allowed=mdp.allowed)  # fmt: skip


def check_gamma(gamma: float) -> None:
    if not 0 <= gamma <= 1:
        raise UserError(f"gamma {gamma} is not within 0 and 1")


def refuse(name: str, wrong: ArrayLike, what: str, values: Array | None = None, fix: str = "") -> None:
    """UserError that names the first three wrong rows, their number and the fix; nothing if none is wrong."""
    at = [tuple(map(int, row)) for row in np.argwhere(wrong)]
    if not at:
        return
    rows = [f"{name}{list(i)} {what.format('' if values is None else written(values[i]))}" for i in at[:3]]
    raise UserError("; ".join(rows) + (f"; and {len(at) - 3} more" if len(at) > 3 else "") + fix)


def written(x: float) -> str:
    """A number with nine digits, or with all 17 where nine would read as 1."""
    return f"{x:.17g}" if f"{x:.9g}" == "1" else f"{x:.9g}"


def _flags(name: str, array: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    found = _shaped(name, array, shape)
    refuse(name, (found != 0) & (found != 1), "is neither 0 nor 1")
    return found.astype(bool)


def _shaped(name: str, array: ArrayLike, shape: tuple[int, ...]) -> NDArray[Any]:
    """`array` as a NumPy array; UserError unless it has this shape."""
    found = np.array(array)
    if found.shape != shape:
        raise UserError(f"{name} has shape {found.shape}: it must be {shape}")
    return found
