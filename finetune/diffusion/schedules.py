"""Noise schedules as arrays: β, ᾱ = Π(1 − β), and σ = √((1 − ᾱ)/ᾱ); the timesteps that a sampler visits.

A noisy sample is x_t = √ᾱ_t x₀ + √(1 − ᾱ_t) ε; t grows with the noise, from 0 to T − 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from finetune.errors import UserError

BETAS = ("linear", "scaled_linear", "cosine")
SPACINGS = ("leading", "trailing", "linspace")


def betas(kind: str, T: int, first: float = 1e-4, last: float = 0.02) -> Tensor:
    """β_0 … β_{T−1} in float64, (T,): linear (DDPM), scaled_linear (latent diffusion: linear in √β), cosine (Nichol and
    Dhariwal 2021, equation 17, at most .999). UserError for another name or T < 1."""
    if T < 1:
        raise UserError(f"a schedule needs at least one timestep, not {T}")
    if kind == "linear":
        return torch.linspace(first, last, T, dtype=torch.float64)
    if kind == "scaled_linear":
        return torch.linspace(first**0.5, last**0.5, T, dtype=torch.float64) ** 2
    if kind == "cosine":
        f = [math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(T + 1)]
        return torch.tensor([min(1 - f[t + 1] / f[t], 0.999) for t in range(T)], dtype=torch.float64)
    raise UserError(f"unknown schedule {kind!r}: choose one of {', '.join(BETAS)}")


def alphas_bar(betas: Tensor) -> Tensor:
    """ᾱ, (T,), of β, (T,)."""
    return (1 - betas).cumprod(0)


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """β, (T,), shifted and scaled so that ᾱ_T = 0 and ᾱ_1 stays (Lin et al. 2023, algorithm 1)."""
    root = alphas_bar(betas).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    bar = root**2
    return 1 - torch.cat([bar[:1], bar[1:] / bar[:-1]])


def sigmas(bar: Tensor) -> Tensor:
    """σ = √((1 − ᾱ)/ᾱ): the noise of x_t / √ᾱ_t."""
    return ((1 - bar) / bar).sqrt()


def karras_sigmas(steps: int, low: float = 0.002, high: float = 80.0, rho: float = 7.0) -> Tensor:
    """σ from `high` to `low` and a final 0, (steps + 1,) (EDM, Karras et al. 2022, equation 5)."""
    if steps < 1:
        raise UserError(f"a sampler needs at least one step, not {steps}")
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    values = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return torch.cat([values, values.new_zeros(1)])


def timesteps(T: int, steps: int, spacing: str = "trailing") -> list[int]:
    """The `steps` timesteps that a sampler visits, falling. leading: multiples of T // steps (DDIM; begins below
    T − 1); trailing: from T − 1; linspace: both ends. UserError unless 1 ≤ steps ≤ T."""
    if not 1 <= steps <= T:
        raise UserError(f"the number of steps must be 1 to {T}, the length of the schedule, not {steps}")
    if spacing == "leading":
        return [i * (T // steps) for i in reversed(range(steps))]
    if spacing == "trailing":
        return [round(T - i * T / steps) - 1 for i in range(steps)]
    if spacing == "linspace":
        return [T - 1] if steps == 1 else [round((T - 1) * i / (steps - 1)) for i in reversed(range(steps))]
    raise UserError(f"unknown spacing {spacing!r}: choose one of {', '.join(SPACINGS)}")
