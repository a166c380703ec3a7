"""The noising process that a network was trained on: what it predicts, and ᾱ by timestep; all that sampling needs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from finetune.diffusion import schedules, targets
from finetune.errors import UserError

SCHEDULES = (*schedules.BETAS, "flow")
NOISE_LEFT = 0.1  # √ᾱ_T above which sampling from pure noise begins visibly off the training distribution


class Process:
    """x_t = α_t x₀ + σ_t ε for t = 0 … T − 1, t growing with the noise.

    kind: "eps", "x0", "v" or "flow". schedule: "linear", "scaled_linear", "cosine"; "flow" is (1 − t) x₀ + t ε on a
    grid of T times and belongs to the kind of this name. zero_snr: rescaled so that ᾱ_T = 0, which ε cannot predict.
    `bar` (T,) float64 is ᾱ, or 1 − t of flow.
    """

    def __init__(self, kind: str = "eps", schedule: str = "linear", T: int = 1000, zero_snr: bool = False) -> None:
        if kind not in targets.KINDS:
            raise UserError(f"unknown prediction {kind!r}: choose one of {', '.join(targets.KINDS)}")
        if (kind == "flow") != (schedule == "flow"):
            raise UserError(f"prediction {kind!r} and schedule {schedule!r}: flow needs flow, the others need another")
        if zero_snr and kind == "eps":
            raise UserError("ε-prediction is undefined at zero terminal SNR: predict v or x0, or omit zero-snr")
        if T < 2:
            raise UserError(f"a process needs at least two timesteps, not {T}")
        self.kind, self.schedule, self.T, self.zero_snr = kind, schedule, T, zero_snr
        if kind == "flow":
            self.bar = 1 - torch.arange(1, T + 1, dtype=torch.float64) / T
            return
        betas = schedules.betas(schedule, T)
        self.bar = schedules.alphas_bar(schedules.zero_terminal_snr(betas) if zero_snr else betas)

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t, (N, …), of x₀ and ε (N, …), t (N,) int."""
        alpha, sigma = targets.coefficients(self.kind, self.bar[t])
        return targets.over(alpha, x0) * x0 + targets.over(sigma, x0) * eps

    def notes(self) -> list[str]:
        """Lines to show before training: √ᾱ_T, and a warning if the last step still holds visible signal."""
        left = float(targets.coefficients(self.kind, self.bar[-1])[0])
        found = [f"{self.T} timesteps, {self.schedule}; √ᾱ_T = {left:.3g} (what is left of the image at the end)"]
        if left > NOISE_LEFT:
            found.append(
                f"warning: with T = {self.T} the last step still holds {left:.0%} of the image, but sampling starts "
                "from pure noise: use more timesteps, the cosine schedule, or zero-snr with v or x0"
            )
        return found

    def log_variances(self) -> tuple[Tensor, Tensor]:
        """log β̃ and log β by timestep, (T,) each: between them lies a learned variance. β̃_0 = 0 is given β̃_1's value
        (Nichol and Dhariwal 2021)."""
        before = torch.cat([self.bar.new_ones(1), self.bar[:-1]])
        beta = 1 - self.bar / before
        small = beta * (1 - before) / (1 - self.bar)
        return torch.cat([small[1:2], small[1:]]).log(), beta.log()

    def sigma_to_t(self, sigma: float) -> float:
        """The timestep, not rounded, whose √((1 − ᾱ)/ᾱ) is σ: linear in log σ between the two nearest."""
        logs = schedules.sigmas(self.bar).log()
        value = math.log(sigma)
        high = int((logs < value).sum().clamp(1, self.T - 1))
        low, up = float(logs[high - 1]), float(logs[high])
        return high - 1 + min(max((value - low) / (up - low), 0.0), 1.0)
