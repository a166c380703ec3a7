"""What TD(0) and Monte Carlo make of a fixed batch of episodes that they see again and again (sections 6.3, 6.4).

A sweep adds up the increments of all steps of the batch, and changes V after it. So a batch is as good as its counts:

    TD(0)        V(s) += α (Σ R + γ Σ_s' C(s, s') V(s') − N(s) V(s))      → the values of the most likely Markov process
    Monte Carlo  V(s) += α (Σ G − N(s) V(s))                              → the mean of the returns

`textbook.batch` sweeps over the episodes themselves; the tests hold the two equal.
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
    """Of R batches: how often each state was left, for which, and what that paid."""

    visits: Array  # (R, S)
    after: Array  # (R, S, S); going to an end counts as going there
    rewards: Array  # (R, S) sum of R
    returns: Array  # (R, S) sum of G

    @classmethod
    def none(cls, runs: int, states: int) -> Counts:
        table = (runs, states)
        return cls(np.zeros(table), np.zeros((*table, states)), np.zeros(table), np.zeros(table))

    def add(self, stream: Stream, G: Array, episode: int) -> None:
        """The steps of the episode of this number; G (T, R) is what `prediction.returns` has of each."""
        t, run = np.nonzero(stream.live & (stream.episode == episode))
        state = stream.states[t, run]
        np.add.at(self.visits, (run, state), 1.0)
        np.add.at(self.after, (run, state, stream.after[t, run]), 1.0)
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
    most: int = 100_000,
) -> Array:
    """Sweeps from V (R, S) until none moves a value by more than `tolerance` · α. The step is α over the visits of the
    state that has the most, with which it converges for every α up to 1."""
    V, step = V.copy(), alpha / counts.visits.max(1, keepdims=True).clip(1)
    for _ in range(most):
        if method == "td":
            targets = counts.rewards + gamma * (counts.after @ V[:, :, None])[:, :, 0]
        else:
            targets = counts.returns
        change = step * (targets - counts.visits * V)
        V += change
        if abs(change).max() <= tolerance * alpha:
            break
    return V


def certainty_equivalence(counts: Counts, run: int, gamma: float) -> Array:
    """The exact values (S,) of the Markov reward process under which the batch is most likely: every transition as
    probable as it was frequent. States that were never left are worth 0."""
    visits = counts.visits[run][:, None]
    P = np.where(visits > 0, counts.after[run] / visits.clip(1), np.eye(len(visits)))
    model = tables.make(P[:, None], counts.rewards[run][:, None] / visits.clip(1), gamma, terminal=visits[:, 0] == 0)
    return tables.solve(model, tables.uniform(model))


def predictor() -> Stream:
    """Example 6.4 as one run of eight episodes: A leads once to B for nothing; B ends six times with 1, twice with 0.
    States: A, B, the end."""
    steps = [(0, 1, 0.0), (1, 2, 0.0), *[(1, 2, 1.0)] * 6, (1, 2, 0.0)]
    states, after, rewards = (np.array(column)[:, None] for column in zip(*steps, strict=True))
    ends = after == 2
    return Stream(states, after, rewards, ends, np.ones_like(ends), ends.cumsum(0) - ends)
