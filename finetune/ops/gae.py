"""Generalized advantage estimation (Schulman et al. 2016, arXiv:1506.02438), for all environments or sequences at once.

    δ_t = r_t + γ · (1 − terminated_t) · V(next state of t) − V_t
    A_t = δ_t + γ λ · (1 − terminated_t) · (1 − truncated_t) · A_{t+1},   A_T = 0
    returns_t = A_t + V_t                       the TD(λ) targets of V

A step that terminates has no future; one that is truncated (a time limit, a reset) ends its segment too, but is worth
what V says of the state that was reached: `next_values` holds it, V of the true next state and not of the state after
the reset. Nothing crosses the end of a segment, not even a NaN. Arithmetic in fp32, or in float64 of float64; no
gradients.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from finetune.ops._backends import native_float, wrong_device
from finetune.ops._op import op
from finetune.ops._samples import Sample


@op
@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    *,
    gamma: float = 0.99,
    lam: float = 0.95,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """rewards, values, next_values (T, N) of one dtype, terminated, truncated (T, N) bool → advantages and returns
    (T, N), float32, or float64 of float64 (CPU). Not differentiable.

    Sequences padded to one length: end each with `terminated` at its last token; the padding behind it has no influence
    on it, and the results there mean nothing.
    """
    shapes = {tuple(t.shape) for t in (rewards, values, next_values, terminated, truncated)}
    if len(shapes) > 1 or rewards.dim() != 2:
        raise RuntimeError(f"gae: all must have one shape (T, N), got {sorted(shapes)}")
    if terminated.dtype != torch.bool or truncated.dtype != torch.bool:
        raise RuntimeError("gae: terminated and truncated must be bool")
    wide = torch.promote_types(rewards.dtype, torch.float32)
    r, v, next_v = rewards.to(wide), values.to(wide), next_values.to(wide)
    deltas = r + (gamma * next_v).masked_fill(terminated, 0.0) - v  # (T, N)
    ends = terminated | truncated
    advantages = torch.empty_like(deltas)
    advantage = torch.zeros_like(deltas[:1].sum(0))  # (N,), also of no steps
    for t in reversed(range(len(deltas))):
        advantage = deltas[t] + (gamma * lam * advantage).masked_fill(ends[t], 0.0)
        advantages[t] = advantage
    return advantages, advantages + v


@gae.check
def _(gamma: float, lam: float, **_) -> None:
    for name, value in (("gamma", gamma), ("lam", lam)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be between 0 and 1, got {value}")


@gae.supports
def _(backend: str, rewards, values, next_values, terminated, truncated, **_) -> str | None:
    floats = (rewards, values, next_values)
    if backend == "cpp" and all(t.dtype == torch.float64 for t in floats):
        return wrong_device(backend, *floats, terminated, truncated)
    return native_float(backend, *floats) or wrong_device(backend, terminated, truncated)


@gae.results
def _(output: tuple[Tensor, Tensor], **_) -> tuple[Tensor, Tensor]:
    return output


@gae.fake()
def _(rewards: Tensor, **_) -> tuple[Tensor, ...]:
    wide = torch.promote_types(rewards.dtype, torch.float32)
    return tuple(rewards.new_empty(rewards.shape, dtype=wide) for _ in range(2))


@gae.sampled
def samples() -> Iterator[Sample]:
    g = torch.Generator().manual_seed(0)

    def numbers(t: int, n: int) -> list[Tensor]:
        return [torch.randn(t, n, generator=g, dtype=torch.float64) for _ in range(3)]

    def masks(t: int, n: int, ends: float) -> list[Tensor]:
        return [torch.rand(t, n, generator=g) < ends for _ in range(2)]

    def make(name: str, t: int, n: int, ends: float = 0.1, scale: float = 1.0, bench=False, **kwargs: float) -> Sample:
        def args():
            return *(x * scale for x in numbers(t, n)), *masks(t, n, ends)

        return Sample(name, args if bench else args(), kwargs, bench=bench, flops=7.0 * t * n, bytes=22.0 * t * n)

    yield make("small", 5, 3)
    yield make("odd", 37, 7)
    yield make("one", 1, 1, ends=0.0)
    yield make("no steps", 0, 3)
    yield make("no rows", 4, 0)
    yield make("one step", 1, 70, ends=0.5)
    yield make("one row", 1031, 1, ends=0.003)
    yield make("no ends", 67, 5, ends=0.0, gamma=1.0, lam=1.0)
    yield make("all ends", 9, 4, ends=2.0)
    yield make("delta", 40, 33, lam=0.0)
    yield make("sum", 61, 32, lam=1.0)
    yield make("prime", 67, 37)
    yield make("large", 33, 5, scale=1e4)
    yield make("long", 1103, 3, ends=0.005)
    across = [x.t() for x in numbers(6, 19)]
    yield Sample("transposed", (*across, *(m.t() for m in masks(6, 19, 0.2))))
    part = [x[:, 1:6] for x in numbers(19, 11)]
    yield Sample("strided", (*part, *(m[:, 1:6] for m in masks(19, 11, 0.2))))
    yield from make("aligned", 5, 32).at_odd_addresses()
    yield make("bench", 1024, 256, ends=0.01, bench=True)
    yield make("bench one row", 4096, 1, ends=0.01, bench=True)
