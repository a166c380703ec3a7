"""Mean and variance of estimates, by pair of state and action, and how far they are from what is exact."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


POWERS = ("sums", "squares", "cubes", "fourths")  # of what a sample is more than one of the first of its cell


class Moments:
    """Of several estimators (K) in each of a number of cells; a run's checkpoints hold it. Powers are summed about a
    sample of each cell: about 0 the variance of 1e8 ± 1 would be the rounding of 1e16."""

    def __init__(self, estimators: int, cells: int) -> None:
        self.sums, self.squares, self.cubes, self.fourths, self.first = (
            torch.zeros(estimators, cells, dtype=torch.float64) for _ in range(5)
        )
        self.counts = torch.zeros(cells, dtype=torch.float64)

    def add(self, cells: Tensor, values: Tensor) -> None:
        """values (K, N) of the samples that belong to cells (N,)."""
        x, fresh = values.double(), self.counts[cells] == 0
        if fresh.any():
            self.first.numpy()[:, cells[fresh].numpy()] = x[:, fresh].numpy()  # of several the last one stays
        self.counts.index_add_(0, cells, torch.ones(len(cells), dtype=torch.float64))
        x = x - self.first[:, cells]
        for power, name in enumerate(POWERS, 1):
            getattr(self, name).index_add_(1, cells, x**power)

    def mean(self) -> Array:
        """(K, cells); 0 where nothing was added."""
        return self.first.numpy() + self._about(self.sums)

    def variance(self) -> Array:
        """(K, cells) of one sample, unbiased; infinite where fewer than two were added."""
        spread, n = self._about(self.squares) - self._about(self.sums) ** 2, self.counts.numpy()
        return np.where(n > 1, spread.clip(min=0) * n / (n - 1).clip(min=1), np.inf)

    def of_mean(self) -> Array:
        """(K, cells) variance of the mean."""
        return self.variance() / self.counts.clamp(min=1).numpy()

    def mean_variance(self, cells: NDArray[np.bool_]) -> tuple[Array, Array]:
        """(K,) the variance averaged over these cells, and its standard error: √((μ₄ − σ⁴) / n) of a cell's."""
        some = cells & (self.counts.numpy() > 1)
        n, v = self.counts.numpy()[some], self.variance()[:, some]
        m, squares, cubes, fourths = (self._about(getattr(self, name))[:, some] for name in POWERS)
        central = fourths - 4 * m * cubes + 6 * m**2 * squares - 3 * m**4
        error = np.sqrt(((central - v**2).clip(min=0) / n).sum(-1)) / max(1, some.sum())
        return v.sum(-1) / max(1, some.sum()), error

    def _about(self, sums: Tensor) -> Array:
        return (sums / self.counts.clamp(min=1)).numpy()

    def state_dict(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in (*POWERS, "first", "counts")}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        vars(self).update(state)


def critical_z(comparisons: int = 1) -> float:
    """The bar for the worst of so many z: right results pass it once in ten thousand runs."""
    return NormalDist().inv_cdf(1 - 1e-4 / comparisons)


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent values; NaN of fewer than two."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def mean_and_error(repeats: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Of what each training's episodes earned: their mean, and its standard error over the trainings; of one training,
    over its episodes."""
    means = [fmean(values) for values in repeats]
    return fmean(means), standard_error(means if len(means) > 1 else repeats[0])


def variance_share(found: Array, whole: Array) -> tuple[float, float]:
    """The total variance of estimates (M, D), as a part of that of others of the same samples, and its standard error
    (jackknife: with each sample omitted in turn). What does not vary has a share of 1 of what does not."""
    squares = [((x - x.mean(0)) ** 2).sum(1) for x in (found, whole)]
    m = len(found)
    if not squares[1].sum():
        return 1.0, math.nan
    omitted = [(s.sum() - s * m / (m - 1)) for s in squares]
    shares = omitted[0] / omitted[1]
    return float(squares[0].sum() / squares[1].sum()), float(shares.std() * math.sqrt(m - 1))


def chi(off: Array, variance: Array, size: float = 1.0) -> Array:
    """How far off means (…, cells) with these variances are, all cells together, in standard deviations of chance.

    Σ off² has mean Σ variance and variance 2 Σ variance² if the expectations are right and the cells independent. The
    sums are compared and not cell by cell: a cell whose rare outcome never came has too small a variance of its own.
    Of values as large as `size` a trillionth is rounding: in a world without chance nothing else is there.
    """
    v = np.where(np.isfinite(variance), np.maximum(variance, (1e-12 * size) ** 2), 0.0)
    return deviations(np.where(np.isfinite(variance), off**2, 0.0).sum(-1), v.sum(-1), 2 * (v**2).sum(-1))


def chi_correlated(off: Array, covariance: Array, size: float = 1.0) -> Array:
    """The same of a vector (…, D) whose components are not independent: |off|² has mean tr C and variance 2 tr C²."""
    rounding = off.shape[-1] * (1e-12 * size) ** 2
    mean = np.maximum(np.trace(covariance, axis1=-2, axis2=-1), rounding)
    return deviations((off**2).sum(-1), mean, np.maximum(2 * (covariance**2).sum((-2, -1)), rounding**2))


def deviations(square: Array, mean: Array, variance: Array) -> Array:
    """A weighted sum of squares of normal numbers as a standard normal number, so that 3 means the same for few squares
    as for many: the χ² of that mean and variance (Satterthwaite 1946), of which the cube root is all but normal (Wilson
    & Hilferty 1931). The plain (square − mean) / deviation of few squares passes 3 once in a hundred times."""
    mean = np.maximum(mean, 1e-150)
    spread = np.maximum(variance, 1e-300) / (9 * mean**2)  # 2 / 9f with f = 2 mean² / variance degrees of freedom
    return ((square / mean) ** (1 / 3) - (1 - spread)) / np.sqrt(spread)


def seen_by_the_gradient(off: Array, policy: Array, counted: NDArray[np.bool_], variance: Array | None = None) -> Array:
    """Root mean square, over the counted pairs (S, A), of off(s, a) − Σ_a π(a|s) off(s, a); off (…, S·A).

    A policy gradient is blind to the rest, as Σ_a ∇π(a|s) b(s) = 0. variance (…, S·A), where `off` is measured: what
    chance adds to the squares is taken away again.
    """
    full = off.reshape(*off.shape[:-1], *policy.shape)
    square = (full - (policy * full).sum(-1, keepdims=True)) ** 2
    if variance is not None:
        spread = np.where(np.isfinite(variance), variance, 0.0).reshape(full.shape)
        square = square - (1 - 2 * policy) * spread - (policy**2 * spread).sum(-1, keepdims=True)
    return np.sqrt(square[..., counted].mean(-1).clip(min=0))


def bias_interval(off: Array, policy: Array, counted: NDArray[np.bool_], variance: Array) -> tuple[Array, Array, Array]:
    """`seen_by_the_gradient` of measured means, less what chance adds, and one standard error to either side.

    A square c² of Σ (c_a + noise)² over a state's actions has the variance 4 cᵀCc + 2 tr C², C the covariance of the
    noise. The ends are the roots of (bias² ± its error), bias² at least 0: 0 is an end of what has no bias that shows.
    """
    full = off.reshape(*off.shape[:-1], *policy.shape)
    center = np.eye(policy.shape[1]) - policy[:, None, :]  # (S, A, A)
    center = center * counted[:, :, None]
    c = np.einsum("sab,...sb->...sa", center, full)
    spread = np.where(np.isfinite(variance), variance, 0.0).reshape(full.shape)
    C = np.einsum("sab,...sb,scb->...sac", center, spread, center)
    squares, noise = (c**2).sum((-2, -1)), np.einsum("...saa->...", C)
    own = 2 * (C**2).sum((-3, -2, -1))
    error = np.sqrt(np.maximum(own, 4 * np.einsum("...sa,...sac,...sc->...", c, C, c) - own))
    cells = max(1, int(counted.sum()))
    middle = (squares - noise).clip(min=0)
    return np.sqrt(middle / cells), np.sqrt((middle - error).clip(min=0) / cells), np.sqrt((middle + error) / cells)


class Welford:
    """Mean and variance of a stream, batch by batch, without the cancellation of Σ x² − (Σ x)² (Welford 1962; merged as
    in Chan, Golub & LeVeque 1979). A run's checkpoints hold it."""

    def __init__(self, *shape: int) -> None:
        self.mean, self.squares = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
        self.count = torch.zeros((), dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """(N, *shape)"""
        mine = x.double().mean(0)
        delta, total = mine - self.mean, self.count + len(x)
        self.squares = self.squares + (x - mine).square().sum(0) + delta.square() * self.count * len(x) / total
        self.mean, self.count = self.mean + delta * len(x) / total, total

    def variance(self) -> Tensor:
        """Of what was added (n, not n − 1); NaN before anything was."""
        return self.squares / self.count

    def state_dict(self) -> dict[str, Tensor]:
        return {"mean": self.mean, "squares": self.squares, "count": self.count}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.mean, self.squares, self.count = state["mean"], state["squares"], state["count"]
