"""Estimates of KL(π ‖ π_ref) from samples of π, and the coefficient that keeps it near a target.

With the log ratio  d = log π(y) − log π_ref(y)  of a token or a sequence y ~ π (Schulman 2020, "Approximating KL
divergence"):

    k1 = d                     unbiased, of high variance, negative for some samples
    k2 = d² / 2                biased, of low variance
    k3 = e^(−d) − 1 + d        unbiased, never negative

That holds for their values. As a term of the loss they are differentiated, and the gradient of an unbiased estimate
need not be one of the gradient, since the samples depend on π too. Under y ~ π

    E[∇k1] = 0                 nothing is learned from it
    E[∇k2] = ∇KL(π ‖ π_ref)    right, though its value is biased
    E[∇k3] = ∇KL(π_ref ‖ π)    of the other direction

and each estimate times the ratio π / π_old (1 in value at the first step) has the right gradient in expectation for k1
and k3. In the reward an estimate is a number and not differentiated: there k1 is right and k3 is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]
LARGEST = 20.0  # of the exponent in k3: e^20 for a token that π has all but given up


def estimate(kind: Estimator, logprobs: Tensor, reference: Tensor, ratio: Tensor | None = None) -> Tensor:
    """The estimate of each element, of the shape of `logprobs`. `ratio`: π / π_old with its gradient, which makes the
    gradient of k1 and k3 in the loss right for samples of π_old."""
    d = logprobs - reference
    if kind == "k1":
        found = d
    elif kind == "k2":
        found = d.square() / 2
    elif kind == "k3":
        found = (-d).clamp(max=LARGEST).exp() - 1 + d
    else:
        raise ValueError(f"the estimators are k1, k2 and k3, not {kind!r}")
    return found if ratio is None else ratio * found


def ratio_of(logprobs: Tensor, old: Tensor) -> Tensor:
    """π / π_old, with the gradient of π."""
    return (logprobs - old.detach()).exp()


@dataclass
class FixedCoefficient:
    """A coefficient that stays."""

    value: float

    def update(self, kl: float, count: int) -> None:
        """Nothing."""


@dataclass
class AdaptiveCoefficient:
    """A proportional controller in log space (Ziegler et al. 2019, arXiv:1909.08593, §2.2).

        e = clip(KL / target − 1, ±0.2),    value ← value · (1 + e · count / horizon)

    target: nats a sequence; horizon: sequences after which a constant error of e has multiplied the value by about
    exp(e)."""

    value: float
    target: float
    horizon: float

    def update(self, kl: float, count: int) -> None:
        """After `count` sequences whose mean KL was `kl`."""
        error = max(-0.2, min(0.2, kl / self.target - 1))
        self.value *= 1 + error * count / self.horizon
