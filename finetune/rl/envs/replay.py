"""Transitions in rows, of one step or of several; a ring of them to learn from more than once; priorities."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from finetune.errors import UserError
from finetune.rl.envs.rollout import Rollout
from finetune.runs import machine


@dataclass
class Transitions:
    """N steps in any order. A step that a time limit cut off is not `terminated`: what follows it still counts."""

    observations: Tensor  # (N, D) fp32
    actions: Tensor  # (N,) int64, or (N, A) fp32
    rewards: Tensor  # (N,) fp32
    next_observations: Tensor  # (N, D) fp32
    terminated: Tensor  # (N,) bool
    steps: Tensor | None = None  # (N,) int64 how many of the environment's steps each is, if they are not all one

    def __len__(self) -> int:
        return len(self.rewards)

    def __getitem__(self, rows: Any) -> Transitions:
        return Transitions(*(column[rows] for column in self.columns()))

    def columns(self) -> tuple[Tensor, ...]:
        found = (getattr(self, f.name) for f in fields(self))
        return tuple(column for column in found if column is not None)

    def sample(self, count: int, generator: torch.Generator) -> Transitions:
        """`count` rows, each drawn from all alike, with replacement."""
        rows = torch.randint(len(self), (count,), generator=generator)
        return Transitions(*(column.index_select(0, rows) for column in self.columns()))

    @classmethod
    def n_step(cls, rollout: Rollout, n: int, gamma: float) -> Transitions:
        """From each step of a rollout, time by time, over up to n steps: r_t + γ r_{t+1} + …, and what the last of them
        reached; fewer where the episode or the rollout ends before."""
        r, ends = rollout, rollout.ends
        rewards, reached = torch.zeros_like(r.rewards), r.next_observations.clone()
        terminated, steps = r.terminated.clone(), torch.ones_like(ends, dtype=torch.int64)
        going = torch.ones_like(ends)  # has the episode of step t gone on until now?
        for k in range(min(n, len(ends))):
            rows, step = going[: len(ends) - k].nonzero(as_tuple=True)
            later = rows + k, step
            rewards[rows, step] += gamma**k * r.rewards[later]
            reached[rows, step], terminated[rows, step] = r.next_observations[later], r.terminated[later]
            steps[rows, step] = k + 1
            going[rows, step] = ~ends[later]
            going[len(ends) - k - 1] = False
        columns = (r.observations, r.actions, rewards, reached, terminated, steps)
        return cls(*(column.flatten(0, 1) for column in columns))


class Replay:
    """The last `capacity` transitions. Memory is taken at the first `add`, which shows the shapes."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.added = 0  # in all
        self.rows: Transitions | None = None

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    def add(self, new: Transitions) -> Tensor:
        """Puts them behind the newest, over the oldest; the rows in which they lie now."""
        if self.rows is None:
            self.rows = self._empty(new)
        first = max(0, len(new) - self.capacity)  # earlier ones would be overwritten by this very call
        to = torch.arange(self.added + first, self.added + len(new)) % self.capacity
        for column, values in zip(self.rows.columns(), new.columns(), strict=True):
            column.index_copy_(0, to, values[first:])
        self.added += len(new)
        return to

    def sample(self, count: int, generator: torch.Generator) -> Transitions:
        """`count` rows, each drawn from all that are there alike, with replacement."""
        if self.rows is None:
            raise ValueError("nothing was added yet")
        return self.rows[: len(self)].sample(count, generator)

    def state_dict(self) -> dict[str, Any]:
        kept = None if self.rows is None else {f.name: c[: len(self)] for f, c in self._named(self.rows)}
        return {"added": self.added, "rows": kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.added, self.rows = state["added"], None
        if state["rows"] is not None:
            held = Transitions(**state["rows"])
            self.rows = self._empty(held)
            for column, values in zip(self.rows.columns(), held.columns(), strict=True):
                column[: len(held)] = values

    def _empty(self, like: Transitions) -> Transitions:
        """UserError if there is not so much memory."""
        needed = self.capacity * sum(c.element_size() * math.prod(c.shape[1:]) for c in like.columns())
        room = machine.available_memory_bytes()
        if room is not None and needed > room:
            raise UserError(
                f"a replay of {self.capacity:,} transitions takes {needed / 2**30:,.1f} GiB, {room / 2**30:,.1f} GiB "
                "are free: choose a smaller capacity"
            )
        return Transitions(*(c.new_zeros(self.capacity, *c.shape[1:]) for c in like.columns()))

    @staticmethod
    def _named(rows: Transitions) -> list[tuple[Any, Tensor]]:
        return list(zip(fields(rows), rows.columns(), strict=False))  # `steps`, the last, may be missing


class Priorities:
    """Which rows of a Replay to learn from: with probability p / Σ p, p = (|TD error| + floor)^α (Schaul et al. 2016,
    arXiv:1511.05952), for `count` learners alike. A draw sums up all rows, which in one vectorized pass is quicker than
    a tree of sums up to some hundred thousand of them."""

    def __init__(self, count: int, capacity: int, alpha: float = 0.6, floor: float = 1e-2) -> None:
        self.alpha, self.floor = alpha, floor
        self.p = torch.zeros(count, capacity, dtype=torch.float64)
        self.largest = torch.ones(count, dtype=torch.float64)  # p of a row that was not learned from yet

    def add(self, rows: Tensor) -> None:
        """These rows of the Replay are new."""
        self.p[:, rows] = self.largest[:, None]

    def sample(self, size: int, beta: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Rows (count, size), one from each of `size` parts of equal mass, and their weights (N p / Σ p)^−β over the
        largest of the batch, N being the number of rows there are."""
        cumulative = self.p.cumsum(1)
        total = cumulative[:, -1:]
        drawn = torch.rand(len(self.p), size, generator=generator, dtype=torch.float64) + torch.arange(size)
        rows = torch.searchsorted(cumulative, drawn * (total / size), right=True).clamp(max=self.p.shape[1] - 1)
        weights = self.p.gather(1, rows).div(total).pow(-beta)  # N^−β cancels
        return rows, (weights / weights.amax(1, keepdim=True)).float()

    def update(self, rows: Tensor, errors: Tensor) -> None:
        """TD errors (count, size) of the rows that were drawn."""
        p = (errors.abs().double() + self.floor) ** self.alpha
        self.p.scatter_(1, rows, p)
        self.largest = torch.maximum(self.largest, p.amax(1))

    def state_dict(self) -> dict[str, Any]:
        return {"p": self.p, "largest": self.largest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.p, self.largest = state["p"], state["largest"]
