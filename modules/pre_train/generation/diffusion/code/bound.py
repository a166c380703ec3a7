"""The variational bound of DDPM in bits a dimension (Ho et al. 2020, equation 5), and a Gaussian's likelihood.

    − log p(x₀) ≤ KL(q(x_T|x₀) ‖ N(0, I)) + Σ_{t > c} KL(q(x_{t−1}|x_t, x₀) ‖ p(x_{t−1}|x_t)) − log p(x₀|x_c)

All terms are KLs of Gaussians but the last: there a pixel has the probability of its cell, one of `levels`. The chain
is cut at c, the first timestep whose noise is as wide as half a cell: below it the image is known up to rounding, but
a network that was trained on the noise alone does not round. With 256 levels and the paper's T, c is its first step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from finetune.diffusion import targets
from finetune.diffusion.draw import Predict
from finetune.diffusion.images import Images, to_unit
from finetune.diffusion.process import Process


def log_variance(process: Process, t: Tensor, x: Tensor, spread: Tensor | None, variance: str) -> Tensor:
    """log of the variance of p(x_{t−1}|x_t): β̃ or β, or between them where the network says (spread in [−1, 1])."""
    small, large = (targets.over(v[t], x) for v in process.log_variances())
    if spread is None:
        return small if variance == "small" else large
    share = (spread + 1) / 2
    return share * large + (1 - share) * small


def step_bits(process: Process, x0: Tensor, found: Tensor, log_var: Tensor, t: Tensor) -> Tensor:
    """The KL at t > 0 (N,) in bits a dimension, (N,), where the network predicts `found` for x₀ (N, C, H, W). At t = 0
    it is 0 for a perfect prediction: there the bound has the last term instead."""
    bar = process.bar[t]
    before = torch.where(t > 0, process.bar[(t - 1).clamp(min=0)], 1.0)
    pull = targets.over(before.sqrt() * (1 - bar / before) / (1 - bar), x0)  # of x₀ in the posterior's mean
    true = targets.over(process.log_variances()[0][t], x0)  # log β̃
    kl = 0.5 * (log_var - true - 1 + (true - log_var).exp() + (pull * (x0 - found)) ** 2 * (-log_var).exp())
    return kl.flatten(1).mean(1) / math.log(2)


def cut(process: Process, levels: int) -> int:
    """The first timestep whose noise, in units of x₀, is as wide as half a cell of `levels` values in [−1, 1]."""
    wide = (1 - process.bar).sqrt() / process.bar.clamp(min=1e-12).sqrt() >= 1 / (levels - 1)
    return int(wide.nonzero()[0])


def cell_log_probability(x0: Tensor, mean: Tensor, log_var: Tensor, levels: int) -> Tensor:
    """log of a Gaussian's probability of the cell of each pixel; the first and the last cell reach to infinity."""
    scale, half = (-0.5 * log_var).exp(), 1 / (levels - 1)
    x0 = ((x0 + 1) / (2 * half)).round() * (2 * half) - 1  # in the middle of its cell
    normal = torch.special.ndtr
    above = normal((x0 - mean + half) * scale).where(x0 < 1 - half, torch.ones_like(x0))
    below = normal((x0 - mean - half) * scale).where(x0 > -1 + half, torch.zeros_like(x0))
    return (above - below).clamp(min=1e-12).log()


def prior_bits(process: Process, x0: Tensor) -> Tensor:
    """KL(q(x_T|x₀) ‖ N(0, I)) in bits a dimension, (N,)."""
    bar = process.bar[-1].item()
    nats = 0.5 * (-math.log1p(-bar) - bar + bar * x0**2)
    return nats.flatten(1).mean(1) / math.log(2)


@torch.no_grad()
def bound(
    predict: Any, process: Process, train: Images, test: Images, variance: str, rng: torch.Generator, rows: int = 8
) -> tuple[float, Tensor]:
    """(bits a dimension of `test`, its terms (T,)): each timestep with `rows` random images, the last term with fifty
    times as many. predict(labels) → Predict. The last term's variance is the error at x_c on training images."""

    def terms_at(images: Images, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x₀ of random images, what the network says of it at t (N,), and the log variance of the step."""
        chosen = torch.randint(len(images), (len(t),), generator=rng)
        x0 = to_unit(images.x[chosen])
        x = process.add_noise(x0, torch.randn(x0.shape, generator=rng), t)
        return x0, *denoised(predict(images.labels[chosen]), process, x, t, variance)

    terms, first = torch.zeros(process.T, dtype=torch.float64), cut(process, test.levels)
    for t in torch.arange(first + 1, process.T).repeat_interleave(rows).split(256):
        x0, found, log_var = terms_at(test, t)
        terms.index_add_(0, t, step_bits(process, x0, found, log_var, t).double() / rows)
    last = torch.full((50 * rows,), first)
    x0, found, _ = terms_at(train, last)
    log_var = (x0 - found).square().mean().log()
    x0, found, _ = terms_at(test, last)
    terms[first] = -cell_log_probability(x0, found, log_var, test.levels).double().mean() / math.log(2)
    return float(terms.sum() + prior_bits(process, to_unit(test.x)).mean()), terms


def denoised(predict: Predict, process: Process, x: Tensor, t: Any, variance: str) -> tuple[Tensor, Tensor]:
    """The predicted x₀, clipped to [−1, 1], and the log variance of the step below, at t (N,)."""
    output, spread = predict(x, t), None
    if output.shape[1] == 2 * x.shape[1]:
        output, spread = output.chunk(2, 1)
    x0 = targets.to_x0(process.kind, x, output, process.bar[t]).clamp(-1, 1)
    return x0, log_variance(process, t, x, spread, variance)


def gaussian_bits(train: Images, test: Images) -> float:
    """Bits a dimension of `test` under a Gaussian for each class of `train`, given the class: its density in the middle
    of a pixel's cell. What is added to the covariance's diagonal, without which constant pixels have no density, is
    chosen by the test set itself, which favors this baseline."""
    step, added = (train.levels - 1) / 255, torch.tensor([1 / 12, 0.15, 0.3, 0.6, 1.2, 2.5, 5.0], dtype=torch.float64)
    nats = torch.zeros_like(added)
    for label in test.labels.unique().tolist():
        rows, seen = (i.x[i.labels == label].flatten(1).double() * step for i in (test, train))
        size = rows.shape[1]
        centered = (seen - seen.mean(0)) / max(len(seen) - 1, 1) ** 0.5
        _, spread, axes = torch.linalg.svd(centered, full_matrices=False)
        off = rows - seen.mean(0)
        along = off @ axes.T  # within the span of the images; outside of it the variance is what is added
        outside = off.square().sum() - along.square().sum()
        variance = spread[:, None] ** 2 + added  # (axes, choices)
        squares = (along.square().sum(0)[:, None] / variance).sum(0) + outside / added
        log_det = variance.log().sum(0) + (size - len(spread)) * added.log()
        nats += 0.5 * (squares + len(rows) * (log_det + size * math.log(2 * math.pi)))
    return float(nats.min()) / len(test) / size / math.log(2)
