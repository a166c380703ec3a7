"""Experience for off-policy learning: batches of transitions, a replay buffer, prioritized sampling."""

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
    """N transitions (s, a, r, s') in any order, one a row.

    A step that a time limit cut off is not `terminated`: a target bootstraps from its next observation.
    """

    observations: Tensor  # (N, D) fp32, of images uint8
    actions: Tensor  # (N,) int64, or (N, A) fp32
    rewards: Tensor  # (N,) fp32
    next_observations: Tensor  # (N, D) of the same dtype
    terminated: Tensor  # (N,) bool
    steps: Tensor | None = None  # (N,) int64 environment steps that each spans; None: all span one
    returns_to_go: Tensor | None = None  # (N,) fp32 what the behavior policy earned from here on (Cal-QL)

    def __len__(self) -> int:
        return len(self.rewards)

    def __getitem__(self, rows: Any) -> Transitions:
        return Transitions(**{name: column[rows] for name, column in self.named_columns().items()})

    def named_columns(self) -> dict[str, Tensor]:
        """Field name → column; fields that are None are omitted."""
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: column for name, column in columns.items() if column is not None}

    def columns(self) -> tuple[Tensor, ...]:
        return tuple(self.named_columns().values())

    def sample(self, count: int, rng: torch.Generator) -> Transitions:
        """`count` rows, uniformly and with replacement."""
        rows = torch.randint(len(self), (count,), generator=rng)
        return Transitions(**{name: c.index_select(0, rows) for name, c in self.named_columns().items()})

    @classmethod
    def n_step(cls, rollout: Rollout, n: int, gamma: float) -> Transitions:
        """n-step transitions from every step of a rollout, time-major: the reward is r_t + γ r_{t+1} + … over n steps,
        the next observation that of the last of them. Fewer steps where the episode or the rollout ends earlier."""
        r, ends = rollout, rollout.ends
        rewards, next_observations = torch.zeros_like(r.rewards), r.next_observations.clone()
        terminated, steps = r.terminated.clone(), torch.ones_like(ends, dtype=torch.int64)
        running = torch.ones_like(ends)  # whether the episode of step t has not ended before step t + k
        for k in range(min(n, len(ends))):
            rows, step = running[: len(ends) - k].nonzero(as_tuple=True)
            later = rows + k, step
            rewards[rows, step] += gamma**k * r.rewards[later]
            next_observations[rows, step], terminated[rows, step] = r.next_observations[later], r.terminated[later]
            steps[rows, step] = k + 1
            running[rows, step] = ~ends[later]
            running[len(ends) - k - 1] = False
        columns = (r.observations, r.actions, rewards, next_observations, terminated, steps)
        return cls(*(column.flatten(0, 1) for column in columns))


class Replay:
    """Replay buffer: a ring of the last `capacity` transitions. The first `add` shows the shapes and allocates it."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.added = 0  # transitions, overwritten ones included
        self.rows: Transitions | None = None

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    def add(self, new: Transitions) -> Tensor:
        """Stores transitions over the oldest ones; returns the rows that they are in."""
        if self.rows is None:
            self.rows = self._empty(new)
        first = max(0, len(new) - self.capacity)  # this call would overwrite earlier ones itself
        rows = torch.arange(self.added + first, self.added + len(new)) % self.capacity
        for column, values in zip(self.rows.columns(), new.columns(), strict=True):
            column.index_copy_(0, rows, values[first:])
        self.added += len(new)
        return rows

    def sample(self, count: int, rng: torch.Generator) -> Transitions:
        """`count` stored transitions, uniformly and with replacement."""
        if self.rows is None:
            raise ValueError("nothing was added yet")
        return self.rows[: len(self)].sample(count, rng)

    def state_dict(self) -> dict[str, Any]:
        stored = None if self.rows is None else self.rows[: len(self)].named_columns()
        return {"added": self.added, "rows": stored}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.added, self.rows = state["added"], None
        if state["rows"] is not None:
            stored = Transitions(**state["rows"])
            self.rows = self._empty(stored)
            for column, values in zip(self.rows.columns(), stored.columns(), strict=True):
                column[: len(stored)] = values

    def _empty(self, like: Transitions) -> Transitions:
        """`capacity` rows of zeros. UserError if they do not fit into memory."""
        needed = self.capacity * sum(c.element_size() * math.prod(c.shape[1:]) for c in like.columns())
        room = machine.available_memory_bytes()
        if room is not None and needed > room:
            raise UserError(
                f"a replay of {self.capacity:,} transitions takes {needed / 2**30:,.1f} GiB, {room / 2**30:,.1f} GiB "
                "are free: choose a smaller capacity"
            )
        zeros = {name: c.new_zeros(self.capacity, *c.shape[1:]) for name, c in like.named_columns().items()}
        return Transitions(**zeros)


class Priorities:
    """Prioritized sampling of a Replay's rows (Schaul et al. 2016, arXiv:1511.05952), for `count` learners at once.

    A row is drawn with probability p / Σ p, where p = (|TD error| + floor)^α. Sampling sums over all rows: up to some
    hundred thousand of them one vectorized pass is faster than a sum tree.
    """

    def __init__(self, count: int, capacity: int, alpha: float = 0.6, floor: float = 1e-2) -> None:
        self.alpha, self.floor = alpha, floor
        self.p = torch.zeros(count, capacity, dtype=torch.float64)
        self.p_max = torch.ones(count, dtype=torch.float64)  # p of a row that was not learned from yet

    def add(self, rows: Tensor) -> None:
        """Gives new rows of the Replay the largest priority so far."""
        self.p[:, rows] = self.p_max[:, None]

    def sample(self, size: int, beta: float, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Rows (count, size), one from each of `size` strata of equal mass, and their importance weights, which are
        (N p / Σ p)^−β divided by the largest of the batch; N is the number of rows."""
        cumulative = self.p.cumsum(1)
        total = cumulative[:, -1:]
        strata = torch.rand(len(self.p), size, generator=rng, dtype=torch.float64) + torch.arange(size)
        rows = torch.searchsorted(cumulative, strata * (total / size), right=True).clamp(max=self.p.shape[1] - 1)
        weights = self.p.gather(1, rows).div(total).pow(-beta)  # N^−β cancels
        return rows, (weights / weights.amax(1, keepdim=True)).float()

    def update(self, rows: Tensor, errors: Tensor) -> None:
        """Sets the priorities of sampled rows (count, size) from their TD errors."""
        p = (errors.abs().double() + self.floor) ** self.alpha
        self.p.scatter_(1, rows, p)
        self.p_max = torch.maximum(self.p_max, p.amax(1))

    def state_dict(self) -> dict[str, Any]:
        return {"p": self.p, "p_max": self.p_max}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.p, self.p_max = state["p"], state["p_max"]
