"""What a DiT is trained on: the squared error of its prediction and, where it learns the variance of a DDPM step, the
variational bound of that variance (Nichol & Dhariwal 2021, arXiv:2102.09672, sections 3.1 and 3.2).

    x_t = α_t x₀ + σ_t ε        loss = ‖net(x_t, t, label) − target‖² + bound(stopped prediction, variance)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from finetune.diffusion import targets
from finetune.diffusion.process import Process

BIN = 1 / 255  # half of the distance between two gray values in [−1, 1]


def denoising_loss(
    net: nn.Module, process: Process, x0: Tensor, labels: Tensor, t: Tensor, eps: Tensor, min_snr: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The mean squared error of the prediction and the mean bound of the variance (0 if none is learned), two scalars.

    x0, eps (N, C, H, W), labels and t (N,). min_snr: γ of the weights of Hang et al. 2023; 0 weights all t alike."""
    x = process.add_noise(x0, eps, t)
    output = net(x, t, labels)
    learned = output.shape[1] == 2 * x0.shape[1]
    prediction, spread = output.chunk(2, 1) if learned else (output, output)
    error = (prediction - targets.target(process.kind, x0, eps, process.bar[t])).square().flatten(1).mean(1)  # (N,)
    if min_snr:
        error = error * targets.min_snr_weight(process.kind, process.bar[t], min_snr).to(error.dtype)
    if not learned:
        return error.mean(), torch.zeros(())
    return error.mean(), variance_bound(process, x0, x, t, prediction.detach(), spread).mean()


def variance_bound(process: Process, x0: Tensor, x: Tensor, t: Tensor, prediction: Tensor, spread: Tensor) -> Tensor:
    """(N,) bits a dimension: KL(q(x_{t−1} | x_t, x₀) ‖ p), where p's variance is log β̃ at spread −1 and log β at 1; at
    t = 0 the cost of the pixels, whose values are 256 bins."""
    bar = process.bar[t]
    before = torch.where(t > 0, process.bar[t - 1], 1.0)
    low, high = (targets.over(each[t], x0) for each in process.log_variances())
    share = (spread + 1) / 2
    log_variance = share * high + (1 - share) * low
    guess = targets.to_x0(process.kind, x, prediction, bar)
    distance = targets.over(before.sqrt() * (1 - bar / before) / (1 - bar), x0) * (x0 - guess)  # of the two means
    kl = 0.5 * (log_variance - low - 1 + (low - log_variance).exp() + distance.square() * (-log_variance).exp())
    first = targets.over(t == 0, x0) > 0
    nats = torch.where(first, -log_likelihood(x0, guess, 0.5 * log_variance), kl)
    return nats.flatten(1).mean(1) / math.log(2)


def log_likelihood(x0: Tensor, mean: Tensor, log_deviation: Tensor) -> Tensor:
    """log of the probability that a Gaussian gives to each pixel's bin; the outermost bins are open (Ho et al. 2020,
    equation 13)."""
    centered, scale = x0 - mean, (-log_deviation).exp()
    above = torch.special.ndtr((centered + BIN) * scale)
    below = torch.special.ndtr((centered - BIN) * scale)
    inside = torch.where(x0 < -0.999, above, torch.where(x0 > 0.999, 1 - below, above - below))
    return inside.clamp(min=1e-12).log()
