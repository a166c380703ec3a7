"""The variational bound of DDPM in bits a dimension (Ho et al. 2020, equation 5), and a Gaussian's likelihood.

    − log p(x₀) ≤ KL(q(x_T|x₀) ‖ N(0, I)) + Σ_t KL(q(x_{t−1}|x_t, x₀) ‖ p(x_{t−1}|x_t)) − log p(x₀|x_1)

All terms are KLs of Gaussians but the last: there a pixel has the probability of its cell, one of `levels`.
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


def step_bits(process: Process, x0: Tensor, found: Tensor, log_var: Tensor, t: Tensor, levels: int) -> Tensor:
    """The bound's term at t (N,) in bits a dimension, (N,), where the network predicts `found` for x₀ (N, C, H, W)."""
    bar = process.bar[t]
    before = torch.where(t > 0, process.bar[(t - 1).clamp(min=0)], 1.0)
    pull = targets.over(before.sqrt() * (1 - bar / before) / (1 - bar), x0)  # of x₀ in the posterior's mean
    true = targets.over(process.log_variances()[0][t], x0)  # log β̃
    kl = 0.5 * (log_var - true - 1 + (true - log_var).exp() + (pull * (x0 - found)) ** 2 * (-log_var).exp())
    last = -cell_log_probability(x0, found, log_var, levels)  # at t = 0
    nats = torch.where(targets.over(t == 0, x0) > 0, last, kl)
    return nats.flatten(1).mean(1) / math.log(2)


def cell_log_probability(x0: Tensor, mean: Tensor, log_var: Tensor, levels: int) -> Tensor:
    """log of a Gaussian's probability of the cell of each pixel; the first and the last cell reach to infinity."""
    scale, half = (-0.5 * log_var).exp(), 1 / (levels - 1)
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
    predict: Any, process: Process, images: Images, variance: str, generator: torch.Generator, rows: int = 8
) -> tuple[float, Tensor]:
    """(bits a dimension, its terms (T,)) over all t, each with `rows` random images. predict(labels) → Predict."""
    terms = torch.zeros(process.T, dtype=torch.float64)
    width = max(1, 256 // rows)  # timesteps at once
    for first in range(0, process.T, width):
        t = torch.arange(first, min(first + width, process.T)).repeat_interleave(rows)
        chosen = torch.randint(len(images), (len(t),), generator=generator)
        x0, labels = to_unit(images.x[chosen]), images.labels[chosen]
        x = process.add_noise(x0, torch.randn(x0.shape, generator=generator), t)
        found, log_var = denoised(predict(labels), process, x, t, variance)
        bits = step_bits(process, x0, found, log_var, t, images.levels)
        terms.index_add_(0, t, bits.double() / rows)
    return float(terms.sum() + prior_bits(process, to_unit(images.x)).mean()), terms


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
    step = (train.levels - 1) / 255
    best = math.inf
    for added in (1 / 12, 0.15, 0.3, 0.6, 1.2, 2.5, 5.0):
        nats = 0.0
        for label in test.labels.unique().tolist():
            rows, seen = (i.x[i.labels == label].flatten(1).double() * step for i in (test, train))
            size = rows.shape[1]
            covariance = torch.cov(seen.T) if len(seen) > 1 else torch.zeros(size, size).double()
            root = torch.linalg.cholesky(covariance + added * torch.eye(size, dtype=torch.float64))
            whitened = torch.linalg.solve_triangular(root, (rows - seen.mean(0)).T, upper=False)
            log_det = root.diagonal().log().sum()
            nats += float((0.5 * whitened**2).sum() + len(rows) * (log_det + size / 2 * math.log(2 * math.pi)))
        best = min(best, nats / len(test) / size / math.log(2))
    return best
