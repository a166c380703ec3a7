"""Drawing samples: any network, any prediction, any sampler; guidance, known pixels, a seed for each sample.

predict(x, t) → output of the process's kind;  x is pure noise first, then each step makes it less noisy
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from finetune.diffusion import samplers, schedules, targets
from finetune.diffusion.process import Process
from finetune.errors import UserError

SAMPLERS = ("ddpm", "ddim", "euler", "heun", "dpm_solver_2m")
SPACINGS = (*schedules.SPACINGS, "karras")
Predict = Callable[[Tensor, float], Tensor]  # x (N, C, H, W), t → (N, C, H, W), or (N, 2 C, H, W) with the variance


class Noise:
    """Unit normal noise, (N, *shape): sample k draws from its own seed, whatever the other samples are."""

    def __init__(self, seeds: Iterable[int], shape: tuple[int, ...]) -> None:
        self.generators, self.shape = [torch.Generator().manual_seed(seed) for seed in seeds], shape

    def __call__(self) -> Tensor:
        return torch.stack([torch.randn(self.shape, generator=generator) for generator in self.generators])


def classifier_free(net: Any, labels: Tensor, w: float, channels: int | None = None) -> Predict:
    """predict(x, t) of a network net(x, t (N,), labels (N,)) with guidance w: 0 is unconditional, 1 conditional, both
    to the bit and with one evaluation. The null class is net.classes.

    channels: guide only this many of the first and take the others from the conditional output (DiT guides 3 of 8).
    """

    @torch.no_grad()
    def predict(x: Tensor, t: float) -> Tensor:
        times, null = torch.full((len(x),), float(t)), torch.full_like(labels, net.classes)
        if w in (0, 1):
            return net(x, times, labels if w else null)
        both = net(torch.cat([x, x]), torch.cat([times, times]), torch.cat([null, labels]))
        unconditional, conditional = both.chunk(2)
        out = samplers.guided(unconditional, conditional, w)
        return out if channels is None else torch.cat([out[:, :channels], conditional[:, channels:]], 1)

    return predict


def check(process: Process, sampler: str, steps: int, spacing: str, eta: float = 0) -> None:
    """UserError names what does not go together, before anything is computed."""
    if sampler not in SAMPLERS:
        raise UserError(f"unknown sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}")
    if spacing not in SPACINGS:
        raise UserError(f"unknown spacing {spacing!r}: choose one of {', '.join(SPACINGS)}")
    if not 1 <= steps <= process.T:
        raise UserError(f"the number of steps must be 1 to {process.T}, the length of the schedule, not {steps}")
    if process.kind == "flow" and sampler not in ("euler", "heun"):
        raise UserError(f"sampler {sampler}: a flow is sampled with euler or heun")
    if spacing == "karras" and (sampler not in ("euler", "heun", "dpm_solver_2m") or process.kind == "flow"):
        raise UserError("spacing karras: only for euler, heun and dpm_solver_2m, and not for a flow")
    if process.zero_snr and sampler in ("euler", "heun", "dpm_solver_2m"):
        raise UserError(f"sampler {sampler} steps in σ, which is infinite at zero terminal SNR: use ddpm or ddim")
    if eta and sampler != "ddim":
        raise UserError(f"eta {eta}: only DDIM has it, not {sampler}")


def suiting(process: Process) -> str:
    """The sampler that needs the fewest steps of those that suit a process."""
    return "euler" if process.kind == "flow" else "ddim" if process.zero_snr else "dpm_solver_2m"


def draw(
    predict: Predict,
    process: Process,
    noise: Callable[[], Tensor],
    *,
    sampler: str = "ddim",
    steps: int = 50,
    spacing: str = "trailing",
    eta: float = 0.0,
    variance: str = "small",
    clip: bool = True,
    known: tuple[Tensor, Tensor] | None = None,
    start: tuple[Tensor, float] | None = None,
    trace: list[Tensor] | None = None,
) -> Tensor:
    """Samples (N, C, H, W) of a process.

    noise() gives unit normal noise of that shape, first for x_T and then wherever a sampler draws.
    variance: of DDPM; a network with 2 C outputs has learned its own. clip: the predicted x₀ stays in [−1, 1].
    known = (image, mask): where the mask is True every predicted x₀ is the image's, so that the samples hold those
    pixels exactly and the rest fits to them (inpainting). start = (image, strength): the image is noised up to that
    share of the steps instead of beginning from noise (SDEdit, Meng et al. 2022). trace: collects each step's x₀.
    UserError names what does not go together.
    """
    check(process, sampler, steps, spacing, eta)
    times, bars = visited(process, steps, spacing)
    x = noise()
    if start is not None:
        image, strength = start
        if not 0 < strength <= 1:
            raise UserError(f"strength {strength}: it must be above 0 and at most 1")
        skipped = steps - max(1, round(strength * steps))
        times, bars = times[skipped:], bars[skipped:]
        alpha, sigma = (float(c) for c in targets.coefficients(process.kind, bars[0]))
        x = alpha * image + sigma * x
    channels = x.shape[1]
    spread: Any = variance

    def x0_at(x: Tensor, t: float, bar: float) -> Tensor:
        nonlocal spread
        output = predict(x, t)
        if output.shape[1] == 2 * channels:
            output, spread = output.chunk(2, 1)
        x0 = targets.to_x0(process.kind, x, output, bar)
        x0 = x0.clamp(-1, 1) if clip else x0
        if known is not None:
            x0 = torch.where(known[1], known[0], x0)
        if trace is not None:
            trace.append(x0)
        return x0

    following = itertools.pairwise([*bars, 1.0])
    if process.kind == "flow":
        return flow_loop(x0_at, x, times, bars, sampler)
    if sampler in ("ddpm", "ddim"):
        for t, (bar, next_bar) in zip(times, following, strict=True):
            x0 = x0_at(x, t, bar)
            if sampler == "ddpm":
                x = samplers.ddpm_step(x, x0, bar, next_bar, noise() if next_bar < 1 else x, spread)
            else:
                x = samplers.ddim_step(x, x0, bar, next_bar, eta, noise() if eta and next_bar < 1 else x)
        return x
    sigmas = [math.sqrt((1 - bar) / bar) for bar in bars]
    place = {sigma: (t, bar) for sigma, t, bar in zip(sigmas, times, bars, strict=True)}

    def denoise(z: Tensor, sigma: float) -> Tensor:
        t, bar = place[sigma]
        return x0_at(z * math.sqrt(bar), t, bar)

    return getattr(samplers, f"sample_{sampler}")(denoise, x / math.sqrt(bars[0]), [*sigmas, 0.0])


def visited(process: Process, steps: int, spacing: str) -> tuple[list[float], list[float]]:
    """The timesteps that are visited, falling, and their ᾱ (of flow 1 − t). karras: EDM's σ between the process's own
    ends, at timesteps between two of the network's."""
    if spacing != "karras":
        times = schedules.timesteps(process.T, steps, spacing)
        return [float(t) for t in times], process.bar[times].tolist()
    ends = schedules.sigmas(process.bar)
    sigmas = schedules.karras_sigmas(steps, float(ends[0]), min(float(ends[-1]), 80.0))[:-1].tolist()
    return [process.sigma_to_t(sigma) for sigma in sigmas], [1 / (1 + sigma**2) for sigma in sigmas]


def flow_loop(x0_at: Callable[..., Tensor], x: Tensor, times: list[float], bars: list[float], sampler: str) -> Tensor:
    """Rectified flow from noise to data. The velocity (x − x₀)/t follows from x₀; Heun averages the slopes at both ends
    of a step, except into t = 0, where the step reaches x₀."""
    for i, (t, bar) in enumerate(zip(times, bars, strict=True)):
        x0, here = x0_at(x, t, bar), 1 - bar
        if i + 1 == len(times):
            return x0
        there, slope = 1 - bars[i + 1], (x - x0) / here
        ahead = samplers.flow_step(x, slope, here, there)
        if sampler == "heun":
            second = (ahead - x0_at(ahead, times[i + 1], bars[i + 1])) / there
            ahead = samplers.flow_step(x, (slope + second) / 2, here, there)
        x = ahead
    raise AssertionError("a flow has at least one step")


def batches(count: int, size: int) -> Iterator[range]:
    """0 … count − 1 in ranges of at most `size`."""
    return (range(first, min(first + size, count)) for first in range(0, count, size))
