"""MDPs from gymnasium: environments that come with a table of transitions (FrozenLake, CliffWalking, Taxi)."""

from __future__ import annotations

from typing import Any

import numpy as np

from finetune.errors import UserError
from finetune.rl.tabular.mdp import MDP, make


class NoTable(UserError):
    """An environment whose transitions are not known."""


def from_gymnasium(env: Any, gamma: float, /, **kwargs: Any) -> MDP:
    """The MDP of a gymnasium environment with a transition table, or of an environment's id (kwargs: its arguments).

    gymnasium marks transitions as done, not states. A state that is only entered by done transitions is terminal. If
    some state is entered both ways, done transitions lead to an extra, last state instead. Rewards of several
    transitions from s to s' under one action are averaged, which changes no value.
    """
    if isinstance(env, str):
        from finetune.rl.envs import creators

        env = creators.create(env, creators.find(env), kwargs)
    spec = getattr(env, "spec", None)
    env = getattr(env, "unwrapped", env)
    name = spec.id if spec else type(env).__name__
    table = getattr(env, "P", None)
    if not isinstance(table, dict):
        raise NoTable(f"'{name}' has no table of transitions (env.P); FrozenLake-v1 has one")
    rows, S, A = _rows(table, name, env)
    by_end, by_step = np.zeros(S, bool), np.zeros(S, bool)  # how each state is entered
    for s, _, p, after, _, done in rows:
        if p > 0 and s != after:
            (by_end if done else by_step)[after] = True
    extra = bool((by_end & by_step).any())
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
    first = getattr(env, "initial_state_distrib", None)
    start = None if first is None else np.append(np.asarray(first, np.float64), np.zeros(int(extra)))
    arrows, shape = _grid(env, S)
    try:
        return make(P, rewards, gamma, terminal=terminal, start=start, name=name,
                    actions=arrows or tuple(map(str, range(A))), shape=None if extra else shape)  # fmt: skip
    except UserError as e:
        raise UserError(f"'{name}': {e}") from None


Row = tuple[int, int, float, int, float, bool]  # state, action, probability, next state, reward, done


def _rows(table: dict[Any, Any], name: str, env: Any) -> tuple[list[Row], int, int]:
    """The table P[state][action] = [(probability, next state, reward, done), …] as flat rows, and its size (S, A).
    States and actions are renumbered from 0."""
    first = [int(getattr(getattr(env, space, None), "start", 0)) for space in ("observation_space", "action_space")]
    S, A = len(table), len(table.get(first[0], ()))
    rows = []
    try:
        if not S * A:
            raise ValueError("it is empty")
        for s, a in np.ndindex(S, A):
            for p, after, reward, done in table[first[0] + s][first[1] + a]:
                rows.append((s, a, float(p), int(after) - first[0], float(reward), bool(done)))
                if not 0 <= rows[-1][3] < S:
                    raise ValueError(f"the next state {after} is none of {S}")
    except (TypeError, ValueError, KeyError, IndexError) as e:
        raise UserError(
            f"'{name}': its table P is not {{state: {{action: [(probability, next state, reward, done), …]}}}}: "
            f"{type(e).__name__}: {e}"
        ) from None
    return rows, S, A


def _grid(env: Any, states: int) -> tuple[tuple[str, ...] | None, tuple[int, int] | None]:
    """Action names of gymnasium's own worlds, and (rows, columns) of those that are a grid."""
    kind = type(env).__name__
    if kind == "FrozenLakeEnv":
        return ("←", "↓", "→", "↑"), (env.nrow, env.ncol)
    if kind == "CliffWalkingEnv":
        return ("↑", "→", "↓", "←"), env.shape
    if kind == "TaxiEnv":
        return ("↓", "↑", "→", "←", "pick up", "drop off"), None
    return None, None
