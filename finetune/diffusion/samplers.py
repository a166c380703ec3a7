"""Samplers as plain functions, one step each.

DDPM and DDIM step from ᾱ_t to ᾱ_next given ε; Euler, Heun and DPM-Solver++ 2M step from σ to σ_next given the denoised
x₀ (x = x₀ + σ ε); flow matching steps along a velocity. The last step has ᾱ_next = 1 or σ_next = 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from torch import Tensor

from finetune.errors import UserError

Denoise = Callable[[Tensor, float], Tensor]  # x, σ → x₀


def predict_x0(x: Tensor, eps: Tensor, bar: float) -> Tensor:
    """x₀ of x_t and ε. UserError at ᾱ = 0, where x_t says nothing of x₀ through ε."""
    if bar == 0:
        raise UserError("ε-prediction is undefined at ᾱ = 0 (zero terminal SNR): predict v or x0")
    return (x - math.sqrt(1 - bar) * eps) / math.sqrt(bar)


def ddpm_step(x: Tensor, eps: Tensor, bar: float, next_bar: float, noise: Tensor, variance: str = "small") -> Tensor:
    """One ancestral step (Ho et al. 2020, equations 6 and 7) with the variance β̃ (small) or β (large); `noise` is unit
    normal and not used in the last step."""
    if variance not in ("small", "large"):
        raise UserError(f"unknown variance {variance!r}: choose small or large")
    alpha = bar / next_bar
    beta = 1 - alpha
    x0 = predict_x0(x, eps, bar)
    mean = (math.sqrt(next_bar) * beta * x0 + math.sqrt(alpha) * (1 - next_bar) * x) / (1 - bar)
    if next_bar == 1:
        return mean
    scale = beta if variance == "large" else beta * (1 - next_bar) / (1 - bar)
    return mean + math.sqrt(scale) * noise


def ddim_step(x: Tensor, eps: Tensor, bar: float, next_bar: float, eta: float = 0, noise: Tensor | None = None):
    """One DDIM step (Song et al. 2021, equation 12); `noise` is needed where η > 0."""
    sigma = eta * math.sqrt((1 - next_bar) / (1 - bar) * (1 - bar / next_bar))
    x0 = predict_x0(x, eps, bar)
    out = math.sqrt(next_bar) * x0 + math.sqrt(max(1 - next_bar - sigma**2, 0)) * eps
    if eta > 0:
        if noise is None:
            raise UserError("DDIM with eta > 0 draws noise: pass it")
        out = out + sigma * noise
    return out


def flow_step(x: Tensor, velocity: Tensor, t: float, next_t: float) -> Tensor:
    """One Euler step of rectified flow, x_t = (1 − t) x₀ + t ε, velocity ε − x₀ (Liu et al. 2022)."""
    return x + (next_t - t) * velocity


def euler_step(denoise: Denoise, x: Tensor, sigma: float, next_sigma: float) -> Tensor:
    """One Euler step of dx/dσ = (x − x₀)/σ (EDM, equation 4)."""
    return x + (next_sigma - sigma) * (x - denoise(x, sigma)) / sigma


def heun_step(denoise: Denoise, x: Tensor, sigma: float, next_sigma: float) -> Tensor:
    """One step of EDM's algorithm 1 without churn: Euler, then the mean of both slopes except into σ = 0."""
    slope = (x - denoise(x, sigma)) / sigma
    out = x + (next_sigma - sigma) * slope
    if next_sigma == 0:
        return out
    return x + (next_sigma - sigma) * (slope + (out - denoise(out, next_sigma)) / next_sigma) / 2


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
