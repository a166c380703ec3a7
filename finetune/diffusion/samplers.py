"""Samplers as plain functions, one step each.

DDPM and DDIM step from ᾱ_t to ᾱ_next given the predicted x₀; Euler, Heun and DPM-Solver++ 2M step from σ to σ_next in
z = x₀ + σ ε given a function that denoises; flow matching steps along a velocity. The last step has ᾱ_next = 1 or
σ_next = 0 and reaches the predicted x₀.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from torch import Tensor

from finetune.errors import UserError

VARIANCES = ("small", "large")
Denoise = Callable[[Tensor, float], Tensor]  # x, σ → x₀


def ddpm_step(
    x: Tensor, x0: Tensor, bar: float, next_bar: float, noise: Tensor, variance: str | Tensor = "small"
) -> Tensor:
    """One ancestral step from x_t and the predicted x₀ (Ho et al. 2020, equations 6 and 7). `noise` is unit normal and
    not used in the last step.

    variance: "small" is β̃, "large" is β, the two ends of what is optimal; a tensor of x's shape in [−1, 1] is what a
    network has learned, log β̃ at −1 and log β at 1 (Nichol and Dhariwal 2021, equation 15)."""
    beta = 1 - bar / next_bar
    mean = (math.sqrt(next_bar) * beta * x0 + math.sqrt(bar / next_bar) * (1 - next_bar) * x) / (1 - bar)
    if next_bar == 1:
        return x0
    small = beta * (1 - next_bar) / (1 - bar)
    if isinstance(variance, Tensor):
        share = (variance + 1) / 2
        return mean + (0.5 * (share * math.log(beta) + (1 - share) * math.log(small))).exp() * noise
    if variance not in VARIANCES:
        raise UserError(f"unknown variance {variance!r}: choose small or large, or give the learned one")
    return mean + math.sqrt(beta if variance == "large" else small) * noise


def ddim_step(x: Tensor, x0: Tensor, bar: float, next_bar: float, eta: float = 0, noise: Tensor | None = None):
    """One DDIM step from x_t and the predicted x₀ (Song et al. 2021, equation 12). η = 0 draws no noise, η = 1 is
    DDPM's small variance; `noise` is needed where η > 0."""
    eps = (x - math.sqrt(bar) * x0) / math.sqrt(1 - bar)
    sigma = eta * math.sqrt((1 - next_bar) / (1 - bar) * (1 - bar / next_bar))
    if next_bar == 1:
        return x0
    out = math.sqrt(next_bar) * x0 + math.sqrt(max(1 - next_bar - sigma**2, 0)) * eps
    if eta > 0:
        if noise is None:
            raise UserError("DDIM with eta > 0 draws noise: pass it")
        out = out + sigma * noise
    return out


def flow_step(x: Tensor, velocity: Tensor, t: float, next_t: float) -> Tensor:
    """One Euler step of rectified flow, x_t = (1 − t) x₀ + t ε, velocity ε − x₀ (Liu et al. 2022)."""
    return x + (next_t - t) * velocity


def sample_flow(velocity: Denoise, x: Tensor, times: Sequence[float]) -> Tensor:
    """x at the last of the falling t by Euler's method; velocity(x, t)."""
    for t, following in itertools.pairwise(times):
        x = flow_step(x, velocity(x, t), t, following)
    return x


def euler_step(denoise: Denoise, z: Tensor, sigma: float, next_sigma: float) -> Tensor:
    """One Euler step of dz/dσ = (z − x₀)/σ (EDM, equation 4). Into σ = 0 it reaches x₀, here without rounding."""
    x0 = denoise(z, sigma)
    return z + (next_sigma - sigma) * (z - x0) / sigma if next_sigma else x0


def heun_step(denoise: Denoise, z: Tensor, sigma: float, next_sigma: float) -> Tensor:
    """One step of EDM's algorithm 1 without churn: Euler, then the mean of both slopes except into σ = 0."""
    x0 = denoise(z, sigma)
    if next_sigma == 0:
        return x0
    slope = (z - x0) / sigma
    ahead = z + (next_sigma - sigma) * slope
    return z + (next_sigma - sigma) * (slope + (ahead - denoise(ahead, next_sigma)) / next_sigma) / 2


def sample_euler(denoise: Denoise, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """x at the last of the falling σ by Euler's method."""
    for sigma, following in itertools.pairwise(sigmas):
        x = euler_step(denoise, x, sigma, following)
    return x


def sample_heun(denoise: Denoise, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """x at the last of the falling σ by Heun's method: two evaluations a step."""
    for sigma, following in itertools.pairwise(sigmas):
        x = heun_step(denoise, x, sigma, following)
    return x


def sample_dpm_solver_2m(denoise: Denoise, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """x at the last of the falling σ by DPM-Solver++ 2M (Lu et al. 2022, algorithm 2), in x₀ and λ = −log σ; the first
    step, and that into σ = 0, are of first order."""
    before: tuple[Tensor, float] | None = None  # x₀ and the width in λ of the step before
    for sigma, following in itertools.pairwise(sigmas):
        x0 = denoise(x, sigma)
        if following == 0:
            return x0
        width = math.log(sigma / following)
        slope = x0 if before is None else x0 + (x0 - before[0]) * width / before[1] / 2
        x = following / sigma * x + (1 - following / sigma) * slope
        before = x0, width
    return x


def guided(unconditional: Tensor, conditional: Tensor, w: float) -> Tensor:
    """Classifier-free guidance: unconditional + w (conditional − unconditional); w = 0 and w = 1 are exact."""
    if w in (0, 1):
        return conditional if w else unconditional
    return unconditional + w * (conditional - unconditional)
