"""Prediction, many runs in lockstep: Monte Carlo, n-step TD (n = 1: TD(0)), TD(λ) with four kinds of trace.

Every function learns many tables at once, V (K, R, S): K settings, R independent runs; all settings see the same
episodes. `textbook.py` has each algorithm as the book prints it, for one table; the tests show the two equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from finetune.rl.tabular.mdp import MDP, Array, pick, uniform
from finetune.rl.tabular.sample import sample_tabular

Trace = Literal["accumulating", "replacing", "dutch", "true_online"]


@dataclass
class Stream:
    """The first E episodes of each of R runs, one after the other. A run that is done waits with live = False."""

    states: NDArray[np.intp]  # (T, R)
    next_states: NDArray[np.intp]  # (T, R)
    rewards: Array  # (T, R)
    ends: NDArray[np.bool_]  # (T, R) the episode ends with this step
    live: NDArray[np.bool_]  # (T, R)
    episode: NDArray[np.intp]  # (T, R) its number


def sample(mdp: MDP, runs: int, episodes: int, rng: np.random.Generator) -> Stream:
    """Episodes under the uniform policy; the random walks have no other."""
    policy, first = uniform(mdp), mdp.start.cumsum()[None]
    states = pick(first, rng.random(runs))
    parts: list[list[NDArray]] = []
    done = np.zeros(runs, np.intp)
    while (done < episodes).any():
        chunk = sample_tabular(mdp, policy, 256, states, rng)
        arrays = [x.numpy() for x in (chunk.observations, chunk.next_observations, chunk.rewards, chunk.terminated)]
        parts.append(arrays)
        done += arrays[3].sum(0)
        states = np.where(arrays[3][-1], pick(first, rng.random(runs)), arrays[1][-1])
    observed, next_states, rewards, ends = (np.concatenate([part[i] for part in parts]) for i in range(4))
    episode = ends.cumsum(0) - ends
    live = episode < episodes
    length = int(live.any(1).sum())
    return Stream(*(x[:length] for x in (observed, next_states, rewards, ends & live, live, episode)))


class Record:
    """Root mean square error over the states that are not terminal, at the end of each episode: (K, R, E)."""

    def __init__(self, mdp: MDP, truth: Array, settings: int, stream: Stream) -> None:
        self.inner = ~mdp.terminal
        self.truth = truth[self.inner]
        self.errors = np.full((settings, stream.states.shape[1], int(stream.episode[stream.live].max()) + 1), np.nan)

    def __call__(self, V: Array, ended: NDArray[np.bool_], episode: NDArray[np.intp]) -> None:
        rows = np.flatnonzero(ended)
        if len(rows):
            off = V[:, rows][:, :, self.inner] - self.truth
            self.errors[:, rows, episode[rows]] = np.sqrt((off**2).mean(2))


def returns(stream: Stream, gamma: float, n: int | None = None) -> tuple[Array, NDArray[np.intp], Array]:
    """n-step returns in three parts: the discounted sum of the next n rewards (None: of all rewards to the end of the
    episode), the state to bootstrap from, and its factor γⁿ, 0 if the episode ends before."""
    T, _ = stream.rewards.shape
    total = np.zeros_like(stream.rewards)
    if n is None:
        running = np.zeros(stream.rewards.shape[1])
        for t in reversed(range(T)):
            running = stream.rewards[t] + gamma * np.where(stream.ends[t], 0.0, running)
            total[t] = running
        return total, stream.next_states, np.zeros_like(total)
    going = np.ones_like(stream.ends)  # does the episode of step t last until t + k?
    boot = stream.next_states.copy()
    for k in range(min(n, T)):
        there = slice(0, T - k)
        total[there] += gamma**k * np.where(going[there], stream.rewards[k:], 0.0)
        boot[there] = np.where(going[there], stream.next_states[k:], boot[there])
        going[there] &= ~stream.ends[k:]
        going[T - k :] = False
        if not going.any():
            break
    going[T - n + 1 if n <= T else 0 :] = False
    return total, boot, np.where(going, gamma**n, 0.0)


def monte_carlo(
    mdp: MDP, stream: Stream, V0: Array, alphas: Array | None, truth: Array, *, first_visit: bool = False
) -> tuple[Array, Array]:
    """V(s) ← V(s) + α (G − V(s)) at every visit, or at the first of an episode; α = 1/visits without alphas.

    The returns depend on no value, so updating before the end of the episode changes nothing.
    """
    G, _, _ = returns(stream, mdp.gamma)
    settings = 1 if alphas is None else len(alphas)
    V, record = _tables(V0, settings, stream), Record(mdp, truth, settings, stream)
    runs = np.arange(V.shape[1])
    visits = np.zeros((len(runs), V.shape[2]))
    seen = np.full((len(runs), V.shape[2]), -1)  # the last episode in which the state was visited
    for t in range(len(G)):
        s, episode = stream.states[t], stream.episode[t]
        counts = stream.live[t] & ((seen[runs, s] < episode) | (not first_visit))
        seen[runs, s] = episode
        visits[runs, s] += counts
        rate = counts / visits[runs, s].clip(1) if alphas is None else alphas[:, None] * counts
        V[:, runs, s] += rate * (G[t] - V[:, runs, s])
        record(V, stream.ends[t], episode)
    return V, record.errors


def n_step(
    mdp: MDP, stream: Stream, V0: Array, n: NDArray[np.intp], alphas: Array, truth: Array
) -> tuple[Array, Array]:
    """n-step TD for K pairs of (n, α): V(S_t) moves towards R_{t+1} + … + γⁿ⁻¹ R_{t+n} + γⁿ V(S_{t+n}). n = 1 is TD(0).

    Updates are made in the order of t. The book updates S_t once S_{t+n} is known, after all earlier states: the same.
    """
    kinds, which = np.unique(n, return_inverse=True)
    G, boot, factor = (np.stack(x) for x in zip(*(returns(stream, mdp.gamma, int(k)) for k in kinds), strict=True))
    V, record = _tables(V0, len(n), stream), Record(mdp, truth, len(n), stream)
    rows, runs = np.arange(len(n))[:, None], np.arange(V.shape[1])
    rate = alphas[:, None] * stream.live[:, None, :]
    for t in range(len(stream.states)):
        s = stream.states[t]
        target = G[which, t] + factor[which, t] * V[rows, runs, boot[which, t]]
        V[:, runs, s] += rate[t] * (target - V[:, runs, s])
        record(V, stream.ends[t], stream.episode[t])
    return V, record.errors


def td_lambda(
    mdp: MDP, stream: Stream, V0: Array, lambdas: Array, alphas: Array, truth: Array, trace: Trace = "accumulating"
) -> tuple[Array, Array]:
    """TD(λ) for K pairs of (λ, α): every state is updated by α δ_t e(s), with a trace e that decays by γλ.

    The trace of S_t becomes e + 1 (accumulating), 1 (replacing) or (1 − α) e + 1 (dutch). True online TD(λ) (van Seijen
    et al. 2016) uses the dutch trace and corrects for the change of V(S_t) in the last update; it equals the online
    λ-return algorithm exactly.
    """
    V, record = _tables(V0, len(lambdas), stream), Record(mdp, truth, len(lambdas), stream)
    e, runs = np.zeros_like(V), np.arange(V.shape[1])
    a, decay = alphas[:, None], (mdp.gamma * lambdas)[:, None, None]
    old = np.zeros(V.shape[:2])  # the value that S_t had before the last update
    with np.errstate(over="ignore", invalid="ignore"):  # some settings diverge, as in the figure
        for t in range(len(stream.states)):
            s, live, ends = stream.states[t], stream.live[t], stream.ends[t]
            here, after = V[:, runs, s], V[:, runs, stream.next_states[t]]
            delta = stream.rewards[t] + mdp.gamma * np.where(ends, 0.0, after) - here  # (K, R)
            e *= decay
            if trace == "accumulating":
                e[:, runs, s] += 1
            elif trace == "replacing":
                e[:, runs, s] = 1
            else:
                e[:, runs, s] += 1 - a * e[:, runs, s]
            if trace == "true_online":
                V += (a * live * (delta + here - old))[:, :, None] * e
                V[:, runs, s] -= a * live * (here - old)
                old = np.where(ends, 0.0, after)
            else:
                V += (a * live * delta)[:, :, None] * e
            record(V, ends, stream.episode[t])
            e[:, ends] = 0
    return V, record.errors


def _tables(V0: Array, settings: int, stream: Stream) -> Array:
    return np.tile(V0, (settings, stream.states.shape[1], 1))
