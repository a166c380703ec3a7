"""Statistics of repeated runs, and what an experiment is: one batch of runs, its figures, its results, its picture."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from finetune.rl.tabular.mdp import Array
from finetune.runs.run import Run

if TYPE_CHECKING:
    from .main import Config

Estimate = tuple[float, float]  # mean over the runs, and its standard error


class Totals:
    """Means and standard errors over runs, by name: running sums and sums of squares. A checkpoint holds them."""

    def __init__(self) -> None:
        self.parts: dict[str, dict[str, Any]] = {}

    def add(self, name: str, values: Array, axis: int = -1) -> None:
        """Adds values whose runs lie along `axis`."""
        with np.errstate(over="ignore", invalid="ignore"):
            values = np.nan_to_num(np.moveaxis(values, axis, -1), nan=np.inf, posinf=np.inf, neginf=-np.inf)
            new = {"sum": values.sum(-1), "square": (values**2).sum(-1)}
        self._add(name, {"runs": values.shape[-1], **new})

    def merge(self, other: Totals) -> None:
        """Adds the runs of another batch."""
        for name, part in other.parts.items():
            self._add(name, part)

    def _add(self, name: str, new: dict[str, Any]) -> None:
        part = self.parts.get(name, {"runs": 0, "sum": 0.0, "square": 0.0})
        self.parts[name] = {key: part[key] + new[key] for key in part}

    def mean(self, name: str) -> Array:
        return self.parts[name]["sum"] / self.parts[name]["runs"]

    def error(self, name: str) -> Array:
        """Standard error of the mean."""
        n = self.parts[name]["runs"]
        with np.errstate(over="ignore", invalid="ignore"):
            variance = (self.parts[name]["square"] / n - self.mean(name) ** 2).clip(0) * n / max(1, n - 1)
        return np.sqrt(variance / n)

    def state_dict(self) -> dict[str, Any]:
        return {
            name: {"runs": part["runs"], **{key: torch.tensor(part[key]) for key in ("sum", "square")}}
            for name, part in self.parts.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.parts = {
            name: {"runs": part["runs"], **{key: part[key].numpy().copy() for key in ("sum", "square")}}
            for name, part in state.items()
        }


def pairs(first: Iterable[float], second: Iterable[float]) -> list[Array]:
    """The Cartesian product, as two flat arrays."""
    return [x.ravel() for x in np.meshgrid(np.asarray(first), np.asarray(second), indexing="ij")]


def estimate(totals: Totals, name: str, *index: int) -> Estimate:
    """Mean and standard error of one number of what was added as `name`."""
    return float(totals.mean(name)[index]), float(totals.error(name)[index])


def smallest(totals: Totals, name: str, rows: slice | int = slice(None)) -> Estimate:
    """Mean and standard error of the entry with the smallest mean: of the best learning rate, say."""
    mean, error = (np.ravel(x[rows]) for x in (totals.mean(name), totals.error(name)))
    return float(mean.min()), float(error[mean.argmin()])


@dataclass(frozen=True)
class Experiment:
    """One of the book's experiments."""

    run: Callable[[Config, Totals, np.random.Generator], None]  # adds one batch of independent runs
    summary: Callable[[Totals], dict[str, float]]  # the columns of metrics.csv that describe a batch
    judge: Callable[[Run, Totals], None]  # records results and checks
    picture: Callable[[Run, Totals], None]
