"""PPO's losses (Schulman et al. 2017, arXiv:1707.06347) and its diagnostics: KL, clip fraction, explained variance.

`log_ratios` are log π(a|s) − log π_old(a|s) of the actions that π_old took. Losses are per element and to be minimized:
the caller takes the mean over what counts (all steps, or the tokens of the answers).
"""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_surrogate(log_ratios: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """−min(r A, clamp(r, 1 − clip, 1 + clip) A), eq. 7: no gain from moving a probability further than `clip`.

    The minimum is pessimistic: a ratio that moved the wrong way is not clipped, so its gradient can bring it back.
    Where both sides are equal the one without a gradient is taken, so that a clip of 0 changes nothing.
    """
    gain = log_ratios.exp() * advantages
    most = (1 + clip * advantages.sign()) * advantages  # min(r A, clamp(r) A) = min(r A, most)
    return -torch.where(gain < most, gain, most)


def value_loss(values: Tensor, targets: Tensor, old_values: Tensor | None = None, clip: float = 0.2) -> Tensor:
    """(V − target)²; with old_values the larger of that and of V kept within `clip` of its old value."""
    plain = (values - targets).square()
    if old_values is None:
        return plain
    near = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum(plain, (near - targets).square())


# --- The same with their slopes written out: what backpropagation begins with, without autograd's graph of it


@torch.no_grad()
def clipped_with_slope(log_ratios: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """(`clipped_surrogate`, its derivative in the log ratios: −r A where there is something to gain, else 0)."""
    gain = log_ratios.exp() * advantages
    most = advantages + clip * advantages.abs()
    learned = gain < most
    return -torch.where(learned, gain, most), -torch.where(learned, gain, 0.0)


@torch.no_grad()
def value_with_slope(
    values: Tensor, targets: Tensor, old_values: Tensor | None = None, clip: float = 0.2
) -> tuple[Tensor, Tensor]:
    """(`value_loss`, its derivative in the values: 0 where the value kept near the old one is the worse)."""
    error = values - targets
    if old_values is None:
        return error.square(), 2 * error
    moved = values - old_values
    near = moved.clamp(-clip, clip)
    kept = old_values + near - targets
    worse = (kept.abs() > error.abs()) & (near != moved)
    return torch.where(worse, kept, error).square(), torch.where(worse, 0.0, 2 * error)


# --- Diagnostics


@torch.no_grad()
def approximate_kl(log_ratios: Tensor) -> Tensor:
    """(r − 1) − log r, element by element: its mean over actions of π_old is KL(π_old ‖ π), and it is never negative
    (Schulman 2020, http://joschu.net/blog/kl-approx.html)."""
    return log_ratios.expm1() - log_ratios


@torch.no_grad()
def clip_fraction(log_ratios: Tensor, clip: float) -> Tensor:
    """The share of ratios outside 1 ± clip."""
    return (log_ratios.expm1().abs() > clip).float().mean()


@torch.no_grad()
def explained_variance(values: Tensor, targets: Tensor) -> Tensor:
    """1 − Var(target − V) / Var(target): 1 for a perfect critic, 0 for a constant one; NaN if all targets are equal."""
    spread = targets.var()
    return torch.where(spread > 0, 1 - (targets - values).var() / spread, torch.nan)
