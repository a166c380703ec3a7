"""Transitions in rows, and a ring of them to learn from more than once."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from finetune.rl.rollout import Rollout


@dataclass
class Transitions:
    """N steps in any order. A step that a time limit cut off is not `terminated`: what follows it still counts."""

    observations: Tensor  # (N, D) fp32
    actions: Tensor  # (N,) int64, or (N, A) fp32
    rewards: Tensor  # (N,) fp32
    next_observations: Tensor  # (N, D) fp32
    terminated: Tensor  # (N,) bool

    def __len__(self) -> int:
        return len(self.rewards)

    def __getitem__(self, rows: Any) -> Transitions:
        return Transitions(*(column[rows] for column in self.columns()))

    def columns(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, f.name) for f in fields(self))

    def sample(self, count: int, generator: torch.Generator) -> Transitions:
        """`count` rows, each drawn from all alike, with replacement."""
        rows = torch.randint(len(self), (count,), generator=generator)
        return Transitions(*(column.index_select(0, rows) for column in self.columns()))

    @classmethod
    def of(cls, rollout: Rollout) -> Transitions:
        """The steps of a rollout, time by time."""
        r = rollout
        columns = (r.observations, r.actions, r.rewards, r.next_observations, r.terminated)
        return cls(*(column.flatten(0, 1) for column in columns))


class Replay:
    """The last `capacity` transitions. Memory is taken at the first `add`, which shows the shapes."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.added = 0  # in all
        self.rows: Transitions | None = None

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    def add(self, new: Transitions) -> None:
        """Puts them behind the newest, over the oldest."""
        if self.rows is None:
            self.rows = Transitions(*(c.new_zeros(self.capacity, *c.shape[1:]) for c in new.columns()))
        first = max(0, len(new) - self.capacity)  # earlier ones would be overwritten by this very call
        to = torch.arange(self.added + first, self.added + len(new)) % self.capacity
        for column, values in zip(self.rows.columns(), new.columns(), strict=True):
            column.index_copy_(0, to, values[first:])
        self.added += len(new)

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
            self.rows = Transitions(*(c.new_zeros(self.capacity, *c.shape[1:]) for c in held.columns()))
            for column, values in zip(self.rows.columns(), held.columns(), strict=True):
                column[: len(held)] = values

    @staticmethod
    def _named(rows: Transitions) -> list[tuple[Any, Tensor]]:
        return list(zip(fields(rows), rows.columns(), strict=True))
