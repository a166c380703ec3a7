"""What a denoiser predicts, and how one prediction is turned into another: ε, x₀, v, velocity u and score.

A noisy sample is x = α x₀ + σ ε. The kinds of prediction, and where each lives:

    eps    ε                      √ᾱ x₀ + √(1 − ᾱ) ε   (Ho et al. 2020)
    x0     x₀                     the same
    v      α ε − σ x₀             the same             (Salimans and Ho 2022)
    flow   u = ε − x₀             (1 − t) x₀ + t ε     (rectified flow, Liu et al. 2022)
    score  ∇ log p(x) = − ε / σ   any α and σ          (Song et al. 2021)

`bar` is ᾱ_t for the first three and 1 − t for flow: 1 is data, 0 is noise, and t grows with the noise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from finetune.errors import UserError

KINDS = ("eps", "x0", "v", "flow")


def coefficients(kind: str, bar: Any) -> tuple[Tensor, Tensor]:
    """α and σ of x = α x₀ + σ ε, of the shape of `bar`, in float64."""
    bar = torch.as_tensor(bar, dtype=torch.float64)
    if kind not in KINDS:
        raise UserError(f"unknown prediction {kind!r}: choose one of {', '.join(KINDS)}")
    return (bar, 1 - bar) if kind == "flow" else (bar.sqrt(), (1 - bar).sqrt())


def over(value: Tensor, x: Tensor) -> Tensor:
    """`value`, a scalar or (N,), in x's dtype and on its device, shaped to multiply x (N, …)."""
    return value.to(x.device, x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def target(kind: str, x0: Tensor, eps: Tensor, bar: Any) -> Tensor:
    """What the network is trained to predict, of x₀'s shape (N, …); bar a number or (N,)."""
    alpha, sigma = (over(c, x0) for c in coefficients(kind, bar))
    return {"eps": lambda: eps, "x0": lambda: x0, "v": lambda: alpha * eps - sigma * x0, "flow": lambda: eps - x0}[
        kind
    ]()


def pair(kind: str, x: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(x₀, ε) of x = α x₀ + σ ε and an `output` of a kind; `kind` may also be "score".

    UserError where the kind does not determine them: ε at α = 0, x₀ and score at σ = 0."""
    if kind in ("eps", "score") and bool((alpha == 0).any()):
        raise UserError("ε-prediction is undefined at ᾱ = 0 (zero terminal SNR): predict v or x0")
    if kind in ("x0", "score") and bool((sigma == 0).any()):
        raise UserError(f"{kind}-prediction says nothing of ε at σ = 0, where there is no noise")
    alpha, sigma = over(alpha, x), over(sigma, x)
    if kind == "x0":
        return output, (x - alpha * output) / sigma
    if kind == "v":
        norm = alpha**2 + sigma**2
        return (alpha * x - sigma * output) / norm, (sigma * x + alpha * output) / norm
    if kind == "flow":
        return (x - sigma * output) / (alpha + sigma), (x + alpha * output) / (alpha + sigma)
    if kind not in ("eps", "score"):
        raise UserError(f"unknown prediction {kind!r}: choose one of {', '.join((*KINDS, 'score'))}")
    eps = output if kind == "eps" else -sigma * output
    return (x - sigma * eps) / alpha, eps


def convert(kind: str, to: str, x: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """A prediction of one kind as another, at the same x = α x₀ + σ ε; both may be "score"."""
    x0, eps = pair(kind, x, output, alpha, sigma)
    alpha, sigma = over(alpha, x), over(sigma, x)
    made = {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0, "flow": eps - x0}
    return -eps / sigma if to == "score" else made[to]


def to_x0(kind: str, x: Tensor, output: Tensor, bar: Any) -> Tensor:
    """x₀ of a prediction."""
    alpha, sigma = coefficients(kind, bar)
    return output if kind == "x0" else pair(kind, x, output, alpha, sigma)[0]


def snr(kind: str, bar: Any) -> Tensor:
    """Signal to noise, α² / σ², of bar's shape."""
    alpha, sigma = coefficients(kind, bar)
    return (alpha / sigma) ** 2


def min_snr_weight(kind: str, bar: Any, gamma: float = 5.0) -> Tensor:
    """The weight of the squared error of `kind` that is min(SNR, γ) in x₀ (Hang et al. 2023, section 3.4), float64."""
    ratio = snr(kind, bar)
    if kind == "x0":
        return ratio.clamp(max=gamma)
    if kind == "eps":
        return (gamma / ratio).clamp(max=1)  # min(SNR, γ) / SNR, also at SNR = 0
    if kind == "v":
        return ratio.clamp(max=gamma) / (ratio + 1)
    return ratio.clamp(max=gamma) * coefficients(kind, bar)[1] ** 2
