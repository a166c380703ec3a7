"""Batch updating: TD(0) and Monte Carlo on a fixed batch of episodes, repeated until convergence (sections 6.3, 6.4).

A sweep sums the increments of all steps of the batch and then applies them. It depends on the counts alone:

    TD(0)        V(s) += α (Σ R + γ Σ_s' C(s, s') V(s') − N(s) V(s))      → the values of the most likely Markov process
    Monte Carlo  V(s) += α (Σ G − N(s) V(s))                              → the mean of the returns

`textbook_more.batch` sweeps over the episodes themselves; the tests show the two equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from finetune.rl.tabular import mdp as tables
from finetune.rl.tabular.mdp import Array

from .prediction import Stream

Method = Literal["td", "mc"]
METHODS: tuple[Method, ...] = ("td", "mc")


@dataclass
class Counts:
    """Sufficient statistics of R batches."""

    visits: Array  # (R, S) how often each state was left
    transitions: Array  # (R, S, S) how often, for which next state
    rewards: Array  # (R, S) sum of R
    returns: Array  # (R, S) sum of G

    @classmethod
    def none(cls, runs: int, states: int) -> Counts:
        table = (runs, states)
        return cls(np.zeros(table), np.zeros((*table, states)), np.zeros(table), np.zeros(table))

    def add(self, stream: Stream, G: Array, episode: int) -> None:
        """Adds the steps of one episode of every run. G (T, R): their returns, of `prediction.returns`."""
        t, run = np.nonzero(stream.live & (stream.episode == episode))
        state = stream.states[t, run]
        np.add.at(self.visits, (run, state), 1.0)
        np.add.at(self.transitions, (run, state, stream.next_states[t, run]), 1.0)
        np.add.at(self.rewards, (run, state), stream.rewards[t, run])
        np.add.at(self.returns, (run, state), G[t, run])


def converge(
    counts: Counts,
    V: Array,
    gamma: float,
    alpha: float,
    method: Method,
    *,
    tolerance: float = 1e-6,
    max_sweeps: int = 100_000,
) -> Array:
    """Sweeps from V (R, S) until no value changes by more than `tolerance` · α. The step size is α divided by the
    visits of the most visited state, which converges for every α up to 1."""
    V, step = V.copy(), alpha / counts.visits.max(1, keepdims=True).clip(1)
    for _ in range(max_sweeps):
        if method == "td":
            targets = counts.rewards + gamma * (counts.transitions @ V[:, :, None])[:, :, 0]
        else:
            targets = counts.returns
        change = step * (targets - counts.visits * V)
        V += change
        if abs(change).max() <= tolerance * alpha:
            break
    return V


def certainty_equivalence(counts: Counts, run: int, gamma: float) -> Array:
    """The exact values (S,) of the maximum-likelihood Markov reward process of a batch, whose transition probabilities
    are the observed frequencies. States that were never left have value 0."""
    visits = counts.visits[run][:, None]
    P = np.where(visits > 0, counts.transitions[run] / visits.clip(1), np.eye(len(visits)))
    model = tables.make(P[:, None], counts.rewards[run][:, None] / visits.clip(1), gamma, terminal=visits[:, 0] == 0)
    return tables.solve(model, tables.uniform(model))


def predictor() -> Stream:
    """The batch of Example 6.4, eight episodes: A leads once to B with reward 0; B ends six times with 1, twice with 0.
    States: A, B, terminal."""
    steps = [(0, 1, 0.0), (1, 2, 0.0), *[(1, 2, 1.0)] * 6, (1, 2, 0.0)]
    states, next_states, rewards = (np.array(column)[:, None] for column in zip(*steps, strict=True))
    ends = next_states == 2
    return Stream(states, next_states, rewards, ends, np.ones_like(ends), ends.cumsum(0) - ends)
