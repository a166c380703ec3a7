"""Statistics of estimators: running moments, standard errors, z-scores against exact values, gradient bias."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


# --- Running moments

POWERS = ("sums", "squares", "cubes", "fourths")  # of a sample's distance from the first sample of its cell


class Moments:
    """Running mean and variance of K estimators in each of a number of cells, such as pairs of state and action.

    Powers are summed about the first sample of each cell: about 0, the variance of 1e8 ± 1 would be lost in the
    rounding of 1e16.
    """

    def __init__(self, estimators: int, cells: int) -> None:
        self.sums, self.squares, self.cubes, self.fourths, self.first = (
            torch.zeros(estimators, cells, dtype=torch.float64) for _ in range(5)
        )
        self.counts = torch.zeros(cells, dtype=torch.float64)

    def add(self, cells: Tensor, values: Tensor) -> None:
        """Adds samples: values (K, N) in the cells (N,)."""
        x, fresh = values.double(), self.counts[cells] == 0
        if fresh.any():
            self.first.numpy()[:, cells[fresh].numpy()] = x[:, fresh].numpy()  # of several the last one stays
        self.counts.index_add_(0, cells, torch.ones(len(cells), dtype=torch.float64))
        x = x - self.first[:, cells]
        for power, name in enumerate(POWERS, 1):
            getattr(self, name).index_add_(1, cells, x**power)

    def mean(self) -> Array:
        """Means (K, cells); 0 in an empty cell."""
        return self.first.numpy() + self._average(self.sums)

    def variance(self) -> Array:
        """Unbiased variances of one sample (K, cells); infinite in a cell of fewer than two."""
        spread, n = self._average(self.squares) - self._average(self.sums) ** 2, self.counts.numpy()
        return np.where(n > 1, spread.clip(min=0) * n / (n - 1).clip(min=1), np.inf)

    def variance_of_mean(self) -> Array:
        """Variances of the means (K, cells)."""
        return self.variance() / self.counts.clamp(min=1).numpy()

    def average_variance(self, cells: NDArray[np.bool_]) -> tuple[Array, Array]:
        """The variance averaged over these cells (K,) and its standard error, from √((μ₄ − σ⁴) / n) of each cell."""
        some = cells & (self.counts.numpy() > 1)
        n, v = self.counts.numpy()[some], self.variance()[:, some]
        m, squares, cubes, fourths = (self._average(getattr(self, name))[:, some] for name in POWERS)
        central = fourths - 4 * m * cubes + 6 * m**2 * squares - 3 * m**4
        error = np.sqrt(((central - v**2).clip(min=0) / n).sum(-1)) / max(1, some.sum())
        return v.sum(-1) / max(1, some.sum()), error

    def _average(self, sums: Tensor) -> Array:
        return (sums / self.counts.clamp(min=1)).numpy()

    def state_dict(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in (*POWERS, "first", "counts")}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        vars(self).update(state)


class Welford:
    """Running mean and variance of a stream, batch by batch, without the cancellation of Σ x² − (Σ x)² (Welford 1962;
    batches merged as in Chan, Golub & LeVeque 1979)."""

    def __init__(self, *shape: int) -> None:
        self.mean, self.squares = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
        self.count = torch.zeros((), dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Adds a batch (N, *shape)."""
        batch_mean = x.double().mean(0)
        delta, total = batch_mean - self.mean, self.count + len(x)
        self.squares = self.squares + (x - batch_mean).square().sum(0) + delta.square() * self.count * len(x) / total
        self.mean, self.count = self.mean + delta * len(x) / total, total

    def variance(self) -> Tensor:
        """The variance of everything added (over n, not n − 1); NaN before the first batch."""
        return self.squares / self.count

    def state_dict(self) -> dict[str, Tensor]:
        return {"mean": self.mean, "squares": self.squares, "count": self.count}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.mean, self.squares, self.count = state["mean"], state["squares"], state["count"]


# --- Standard errors


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean of independent values; NaN for fewer than two."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def mean_and_error(repeats: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Mean over trainings of the mean of each training's values, and its standard error over the trainings; with one
    training, over its values."""
    means = [fmean(values) for values in repeats]
    return fmean(means), standard_error(means if len(means) > 1 else repeats[0])


def variance_ratio(samples: Array, reference: Array) -> tuple[float, float]:
    """Total variance of estimates (M, D) over that of reference estimates from the same samples, and its standard error
    by the jackknife. 1 if the reference does not vary."""
    squares = [((x - x.mean(0)) ** 2).sum(1) for x in (samples, reference)]
    m = len(samples)
    if not squares[1].sum():
        return 1.0, math.nan
    omitted = [(s.sum() - s * m / (m - 1)) for s in squares]  # with each sample omitted in turn
    ratios = omitted[0] / omitted[1]
    return float(squares[0].sum() / squares[1].sum()), float(ratios.std() * math.sqrt(m - 1))


# --- z-scores: how far measured means are from exact values, in standard deviations of chance


def critical_z(comparisons: int = 1) -> float:
    """The bar for the largest of several z-scores: correct results exceed it once in ten thousand runs."""
    return NormalDist().inv_cdf(1 - 1e-4 / comparisons)


def chi_square_z(error: Array, variance: Array, size: float = 1.0) -> Array:
    """z-score of the errors (…, cells) of independent means with these variances, all cells together.

    With correct expectations Σ error² has the mean Σ variance and the variance 2 Σ variance². The sums are compared
    rather than single cells: a cell whose rare outcome was never sampled has too small a variance estimate. Errors of
    a trillionth of `size`, the magnitude of the values, count as rounding.
    """
    v = np.where(np.isfinite(variance), np.maximum(variance, (1e-12 * size) ** 2), 0.0)
    squares = np.where(np.isfinite(variance), error**2, 0.0).sum(-1)
    return wilson_hilferty_z(squares, v.sum(-1), 2 * (v**2).sum(-1))


def chi_square_z_correlated(error: Array, covariance: Array, size: float = 1.0) -> Array:
    """`chi_square_z` of a vector (…, D) with correlated components: |error|² has mean tr C and variance 2 tr C²."""
    rounding = error.shape[-1] * (1e-12 * size) ** 2
    mean = np.maximum(np.trace(covariance, axis1=-2, axis2=-1), rounding)
    variance = np.maximum(2 * (covariance**2).sum((-2, -1)), rounding**2)
    return wilson_hilferty_z((error**2).sum(-1), mean, variance)


def wilson_hilferty_z(square: Array, mean: Array, variance: Array) -> Array:
    """A weighted sum of squared normal numbers as a standard normal number, so that z = 3 is as rare for few squares as
    for many: the χ² of the same mean and variance (Satterthwaite 1946), whose cube root is nearly normal
    (Wilson & Hilferty 1931). The plain (square − mean) / deviation of few squares exceeds 3 once in a hundred times."""
    mean = np.maximum(mean, 1e-150)
    spread = np.maximum(variance, 1e-300) / (9 * mean**2)  # 2 / 9f with f = 2 mean² / variance degrees of freedom
    return ((square / mean) ** (1 / 3) - (1 - spread)) / np.sqrt(spread)


# --- The bias that a policy gradient sees


def gradient_bias(error: Array, policy: Array, counted: NDArray[np.bool_], variance: Array | None = None) -> Array:
    """The part of the errors (…, S·A) of advantages that a policy gradient sees: the root mean square, over the counted
    pairs (S, A), of error(s, a) − Σ_a π(a|s) error(s, a). The rest cancels, as Σ_a ∇π(a|s) b(s) = 0.

    variance (…, S·A), for measured errors, is that of the means: what it adds to the squares is subtracted again.
    """
    full = error.reshape(*error.shape[:-1], *policy.shape)
    square = (full - (policy * full).sum(-1, keepdims=True)) ** 2
    if variance is not None:
        spread = np.where(np.isfinite(variance), variance, 0.0).reshape(full.shape)
        square = square - (1 - 2 * policy) * spread - (policy**2 * spread).sum(-1, keepdims=True)
    return np.sqrt(square[..., counted].mean(-1).clip(min=0))


def gradient_bias_interval(
    error: Array, policy: Array, counted: NDArray[np.bool_], variance: Array
) -> tuple[Array, Array, Array]:
    """`gradient_bias` of measured means and the interval of one standard error around it: (bias, low, high).

    A square c² of Σ (c_a + noise)² over a state's actions has the variance 4 cᵀCc + 2 tr C², C the covariance of the
    noise. The ends are the roots of bias² ± its error, clipped at 0, so low is 0 where no bias shows.
    """
    full = error.reshape(*error.shape[:-1], *policy.shape)
    center = np.eye(policy.shape[1]) - policy[:, None, :]  # (S, A, A)
    center = center * counted[:, :, None]
    c = np.einsum("sab,...sb->...sa", center, full)
    spread = np.where(np.isfinite(variance), variance, 0.0).reshape(full.shape)
    C = np.einsum("sab,...sb,scb->...sac", center, spread, center)
    squares, noise = (c**2).sum((-2, -1)), np.einsum("...saa->...", C)
    own = 2 * (C**2).sum((-3, -2, -1))
    deviation = np.sqrt(np.maximum(own, 4 * np.einsum("...sa,...sac,...sc->...", c, C, c) - own))
    cells = max(1, int(counted.sum()))
    middle = (squares - noise).clip(min=0)
    ends = (middle - deviation).clip(min=0), middle + deviation
    return np.sqrt(middle / cells), np.sqrt(ends[0] / cells), np.sqrt(ends[1] / cells)
