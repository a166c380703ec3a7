"""One-step control, many runs in lockstep: SARSA, expected SARSA, Q-learning, double Q-learning, SARSA(λ), Q(λ).

    Q(S,A) ← Q(S,A) + α [R + γ · target − Q(S,A)]       target: one of the four functions below

Behavior is ε-greedy with ties broken evenly. `textbook.py` has each algorithm as a plain loop over one table; the tests
feed both the same experience and find the same tables. `n_step_control.py` has the algorithms of several steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from finetune.rl.tabular.mdp import MDP, Array, pick

Kind = Literal["sarsa", "expected_sarsa", "q_learning", "double_q"]
Rows = NDArray[np.intp]  # (N,) one number a row: states, actions
Step = tuple[Rows, Rows, Array, NDArray[np.bool_]]  # states, actions, rewards, episode over


# --- The four targets


def sarsa(after: AfterStep, rows: slice) -> Array:
    """Q(S', A'), A' being the action taken next: the value of the policy that explores."""
    return at_actions(after.q[rows], after.action[rows])


def expected_sarsa(after: AfterStep, rows: slice) -> Array:
    """Σ_a π(a|S') Q(S', a): the same mean without the variance of A'."""
    return (after.policy[rows] * np.where(after.allowed[rows], after.q[rows], 0.0)).sum(1)


def q_learning(after: AfterStep, rows: slice) -> Array:
    """max_a Q(S', a): the value of the greedy policy, whatever the behavior (Watkins 1989)."""
    return after.q[rows].max(1)


def double_q(after: AfterStep, rows: slice) -> Array:
    """Q₂(S', argmax_a Q₁(S', a)): one table chooses, the other evaluates (van Hasselt 2010)."""
    return at_actions(after.other_q[rows], after.q[rows].argmax(1))


TARGETS: dict[Kind, Callable[[AfterStep, slice], Array]] = {
    "sarsa": sarsa, "expected_sarsa": expected_sarsa, "q_learning": q_learning, "double_q": double_q
}  # fmt: skip
KINDS: tuple[Kind, ...] = tuple(TARGETS)


def at_actions(q: Array, actions: Rows) -> Array:
    """(N, A) and (N,) → (N,): the column of each row's action."""
    return np.take_along_axis(q, actions[:, None], 1)[:, 0]


def epsilon_greedy(q: Array, allowed: NDArray[np.bool_], epsilon: float) -> Array:
    """Probabilities (N, A): ε spread over the allowed actions, 1 − ε over the greedy ones."""
    q = np.where(allowed, q, -np.inf)
    greedy = q == q.max(1, keepdims=True)
    return allowed * (epsilon / allowed.sum(1, keepdims=True)) + greedy * ((1 - epsilon) / greedy.sum(1, keepdims=True))


# --- Environments


class TabularEnvs:
    """N copies of a tabular MDP, each in its own episode. `noise` (S,) is the standard deviation of the reward of
    leaving a state, `limit` the number of steps after which an episode is truncated."""

    def __init__(self, mdp: MDP, rows: int, noise: Array | None = None, limit: int | None = None) -> None:
        self.mdp, self.noise, self.limit = mdp, noise, limit
        order = np.argsort(-mdp.P, axis=2, kind="stable")[:, :, : int((mdp.P > 0).sum(2).max())]
        self.successors, self.cumulative = order, np.take_along_axis(mdp.P, order, 2).cumsum(2)
        self.start = mdp.start.cumsum()[None]
        self.state: Rows = np.full(rows, -1)
        self.total: Array = np.zeros(rows)  # rewards of the running episode
        self.age: Rows = np.zeros(rows, np.intp)  # its steps
        self.episode: Rows = np.zeros(rows, np.intp)  # how many are finished

    def reset(self, rows: NDArray[np.bool_], rng: np.random.Generator) -> None:
        """Starts a new episode in these rows."""
        count = int(rows.sum())
        if count:
            self.state[rows] = pick(self.start, rng.random(count))
            self.total[rows], self.age[rows] = 0, 0

    def keep(self, rows: NDArray[np.bool_]) -> None:
        """Drops all other rows."""
        self.state, self.total = self.state[rows], self.total[rows]
        self.age, self.episode = self.age[rows], self.episode[rows]

    def step(self, action: Rows, rng: np.random.Generator) -> tuple[Rows, Array, NDArray, NDArray]:
        """Next states, rewards, terminated, and over: terminated or truncated. Rows that are over need a `reset`."""
        state = self.state
        if self.successors.shape[2] == 1:
            next_state = self.successors[state, action, 0]
        else:
            which = pick(self.cumulative[state, action], rng.random(len(action)))
            next_state = self.successors[state, action, which]
        reward = self.mdp.rewards[state, action, next_state]
        if self.noise is not None:
            reward = reward + self.noise[state] * rng.standard_normal(len(action))
        terminated = self.mdp.terminal[next_state]
        self.total += reward
        self.age += 1
        over = terminated if self.limit is None else terminated | (self.age >= self.limit)
        self.episode += over
        self.state = next_state.copy()
        return next_state, reward, terminated, over


@dataclass(frozen=True)
class Unknown:
    """What is known of a world without a table of transitions: its size, and that every action is allowed."""

    size: tuple[int, int]  # (S, A)
    gamma: float

    @cached_property
    def allowed(self) -> NDArray[np.bool_]:
        return np.ones(self.size, bool)


# --- Learning


class AfterStep:
    """What a target may use: Q(S', ·) and, computed if it is used, the ε-greedy policy there and the action A'."""

    def __init__(self, learners: Learners, states: Rows, table: Rows, uniforms: Array) -> None:
        self.learners, self.states, self.table, self.uniforms = learners, states, table, uniforms
        self.allowed = learners.mdp.allowed[states]
        self.q = self._q(table)  # (N, A) of the table that learns, −inf where an action is not allowed

    def _q(self, table: Rows) -> Array:
        return np.where(self.allowed, self.learners.Q[table, self.learners.rows, self.states], -np.inf)

    @cached_property
    def other_q(self) -> Array:
        """(N, A) of double Q-learning's other table."""
        return self._q(1 - self.table)

    @cached_property
    def policy(self) -> Array:
        return self.learners.policy(self.states)

    @cached_property
    def action(self) -> Rows:
        return pick(self.policy.cumsum(1), self.uniforms)


class Learners:
    """`runs` independent tables for each of `kinds`, one step and update of all of them at a time."""

    def __init__(
        self,
        mdp: Any,
        kinds: tuple[Kind, ...],
        runs: int,
        alpha: float,
        epsilon: float,
        rng: np.random.Generator,
        *,
        noise: Array | None = None,
        limit: int | None = None,
        envs: Any = None,
    ) -> None:
        """mdp: an MDP, or `Unknown` with `envs` that are stepped as TabularEnvs are."""
        rows = len(kinds) * runs
        self.mdp, self.kinds, self.runs, self.alpha, self.epsilon = mdp, kinds, runs, alpha, epsilon
        self.envs = envs or TabularEnvs(mdp, rows, noise, limit)
        self.Q = np.zeros((2, rows, *mdp.size))  # the second table is double Q-learning's
        self.rows = np.arange(rows)
        self.parts = {kind: slice(i * runs, (i + 1) * runs) for i, kind in enumerate(kinds)}
        self.envs.reset(np.ones(rows, bool), rng)
        self.action = pick(self.policy(self.envs.state).cumsum(1), rng.random(rows))

    def policy(self, states: Rows) -> Array:
        """ε-greedy in the sum of the two tables; the second one is zero except in double Q-learning."""
        q = self.Q[0, self.rows, states]
        if "double_q" in self.parts:
            q = q + self.Q[1, self.rows, states]
        return epsilon_greedy(q, self.mdp.allowed[states], self.epsilon)

    def step(self, rng: np.random.Generator) -> Step:
        """One step and one update of every row."""
        state, action = self.envs.state, self.action
        next_state, reward, terminated, over = self.envs.step(action, rng)
        table = np.zeros(len(self.rows), np.intp)  # the one that learns
        if "double_q" in self.parts:
            table[self.parts["double_q"]] = rng.integers(2, size=self.runs)
        after = AfterStep(self, next_state, table, rng.random(len(self.rows)))
        target = np.empty(len(self.rows))
        for kind, rows in self.parts.items():
            target[rows] = TARGETS[kind](after, rows)
        target = reward + self.mdp.gamma * np.where(terminated, 0.0, target)
        self.learn(table, state, action, target - self.Q[table, self.rows, state, action])
        self.envs.reset(over, rng)
        self.choose(after, over)
        return state, action, reward, over

    def learn(self, table: Rows, state: Rows, action: Rows, error: Array) -> None:
        self.Q[table, self.rows, state, action] += self.alpha * error

    def choose(self, after: AfterStep, over: NDArray[np.bool_]) -> None:
        """The next action, by the updated table. SARSA takes the A' of its target, unless a new episode has begun."""
        self.action = pick(self.policy(self.envs.state).cumsum(1), after.uniforms)
        if "sarsa" in self.parts:
            rows = self.parts["sarsa"]
            self.action[rows] = np.where(over[rows], self.action[rows], after.action[rows])

    def greedy(self) -> NDArray[np.intp]:
        """Greedy actions (N, S); of those that tie, the first."""
        return np.where(self.mdp.allowed, self.Q.sum(0), -np.inf).argmax(2)

    def state_dict(self) -> dict[str, Any]:
        e = self.envs
        arrays = {"Q": self.Q, "action": self.action, "state": e.state, "total": e.total, "age": e.age,
                  "episode": e.episode}  # fmt: skip
        return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        arrays = {name: value.numpy().copy() for name, value in state.items()}
        e = self.envs
        self.Q, self.action = arrays["Q"], arrays["action"]
        e.state, e.total, e.age, e.episode = (arrays[name] for name in ("state", "total", "age", "episode"))


class TraceLearners(Learners):
    """SARSA(λ) and Watkins' Q(λ) with replacing traces: every visited pair is updated by α δ E(s,a), and E decays by
    γλ. Q(λ) cuts its traces at an action that is not greedy."""

    def __init__(
        self,
        mdp: MDP,
        kinds: tuple[Kind, ...],
        runs: int,
        alpha: float,
        epsilon: float,
        rng: np.random.Generator,
        *,
        lam: float,
        limit: int | None = None,
    ) -> None:
        if "double_q" in kinds:
            raise ValueError("double Q-learning has no traces here")
        super().__init__(mdp, kinds, runs, alpha, epsilon, rng, limit=limit)
        self.lam, self.E = lam, np.zeros((len(self.rows), *mdp.size))

    def learn(self, table: Rows, state: Rows, action: Rows, error: Array) -> None:
        self.E *= self.mdp.gamma * self.lam
        self.E[self.rows, state, action] = 1
        self.Q[0] += (self.alpha * error)[:, None, None] * self.E

    def choose(self, after: AfterStep, over: NDArray[np.bool_]) -> None:
        super().choose(after, over)
        cut = over.copy()
        if rows := self.parts.get("q_learning"):
            state = self.envs.state[rows]
            q = np.where(self.mdp.allowed[state], self.Q[0, self.rows[rows], state], -np.inf)
            cut[rows] |= at_actions(q, self.action[rows]) < q.max(1)
        self.E[cut] = 0


class Stepping(Protocol):
    """What `run_episodes` needs of learners: of this file or of `n_step_control`."""

    envs: TabularEnvs
    kinds: tuple[Any, ...]
    runs: int

    def step(self, rng: np.random.Generator) -> Step: ...


def run_episodes(learners: Stepping, episodes: int, rng: np.random.Generator) -> Array:
    """Steps until every row has finished `episodes` episodes; their sums of rewards (kinds, runs, episodes)."""
    envs = learners.envs
    rows = len(learners.kinds) * learners.runs
    sums, running = np.full((rows, episodes), np.nan), np.zeros(rows)
    while (envs.episode < episodes).any():
        _, _, reward, over = learners.step(rng)
        running += reward
        ended = np.flatnonzero(over & (envs.episode <= episodes))
        sums[ended, envs.episode[ended] - 1] = running[ended]
        running[over] = 0
    return sums.reshape(len(learners.kinds), learners.runs, episodes)
