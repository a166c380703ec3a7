"""A step of dynamic loss scaling (Micikevicius et al. 2018, arXiv:1710.03740, section 3.2) on tensors, in place: the
host never asks whether gradients overflowed.

policy="torch": as torch.amp.GradScaler. With `hysteresis` > 1 as apex's update_scale_hysteresis: only that many
overflows in a row lower the scale, and every one after them.

    overflow:   growth ← 0;  patience ← patience − 1;  if patience <= 0: scale ← scale · backoff_factor
    otherwise:  patience ← hysteresis;  growth ← growth + 1;
                if growth = growth_interval: scale ← scale · growth_factor, growth ← 0

policy="deepspeed": as DeepSpeed's DynamicLossScaler (scale_window = growth_interval, delayed_shift = hysteresis). The
patience is lost by overflows that need not follow each other, and comes back when the scale grows, or at every step
without overflow with `consecutive_hysteresis`. The scale grows one step later than torch's: after an interval without
overflow, at the next step without one.

    overflow:   if patience = 1: scale ← max(scale · backoff_factor, min_scale), else patience ← patience − 1;
                growth ← 0
    otherwise:  if growth > 0 and growth_interval divides growth: scale ← scale · growth_factor, patience ← hysteresis;
                growth ← growth + 1

A scale that would become infinite stays. DeepSpeed's raises at min_scale; this one stays there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from finetune.ops._backends import wrong_device
from finetune.ops._op import op
from finetune.ops._samples import Sample


@op
@torch.no_grad()
def loss_scale_update_(
    scale: Tensor,
    growth_tracker: Tensor,
    hysteresis_tracker: Tensor,
    found_inf: Tensor,
    *,
    policy: str = "torch",
    growth_factor: float = 2.0,
    backoff_factor: float = 0.5,
    growth_interval: int = 2000,
    hysteresis: int = 1,
    min_scale: float = 0.0,
    consecutive_hysteresis: bool = False,
    backend: str | None = None,
) -> None:
    """One step, in place. scale, found_inf: 0-d float32; growth_tracker, hysteresis_tracker: 0-d int32, which start at
    0 and at `hysteresis`. found_inf > 0: the gradients overflowed (ops.unscale_check_finite_)."""
    overflow = found_inf > 0
    lower = (scale.double() * backoff_factor).to(scale.dtype).clamp(min=min_scale)
    higher = (scale.double() * growth_factor).to(scale.dtype)
    higher = torch.where(higher.isfinite(), higher, scale)
    if policy == "torch":
        patience = torch.where(overflow, hysteresis_tracker - 1, hysteresis)
        growth = torch.where(overflow, 0, growth_tracker + 1)
        backs_off, grows = overflow & (patience <= 0), growth == growth_interval
        growth = torch.where(grows, 0, growth)
    else:
        backs_off = overflow & ((hysteresis_tracker == 1) | (hysteresis == 1))
        grows = ~overflow & (growth_tracker > 0) & (growth_tracker % growth_interval == 0)
        refills = grows | (~overflow & consecutive_hysteresis)
        patience = torch.where(overflow & ~backs_off, hysteresis_tracker - 1, hysteresis_tracker)
        patience = torch.where(refills, hysteresis, patience)
        growth = torch.where(overflow, 0, growth_tracker + 1)
    scale.copy_(torch.where(backs_off, lower, torch.where(grows, higher, scale)))
    growth_tracker.copy_(growth)
    hysteresis_tracker.copy_(patience)


@loss_scale_update_.check
def _(policy: str, **_) -> None:
    if policy not in ("torch", "deepspeed"):
        raise ValueError(f"loss_scale_update_: policy={policy!r} is neither 'torch' nor 'deepspeed'")


@loss_scale_update_.operands
def _(policy: str, **_) -> dict[str, bool]:
    return {"deepspeed": policy == "deepspeed"}


@loss_scale_update_.supports
def _(backend: str, scale, growth_tracker, hysteresis_tracker, found_inf, **_) -> str | None:
    if any(t.dtype != torch.float32 for t in (scale, found_inf)):
        return "it takes a float32 scale and found_inf"
    if any(t.dtype != torch.int32 for t in (growth_tracker, hysteresis_tracker)):
        return "it takes int32 trackers"
    return wrong_device(backend, scale, growth_tracker, hysteresis_tracker, found_inf)


@loss_scale_update_.sampled
def samples() -> Iterator[Sample]:
    def make(name: str, scale, growth, patience, overflow, bench: bool = False, **kwargs: Any) -> Sample:
        counters = [torch.tensor(n, dtype=torch.int32) for n in (growth, patience)]
        args = (torch.tensor(scale), *counters, torch.tensor(overflow))
        settings = {"growth_interval": 4} | kwargs
        return Sample(name, args, settings, mutates=(0, 1, 2), bench=bench, flops=10.0, bytes=28.0)

    for policy in ("torch", "deepspeed"):
        yield make(f"{policy}, step", 65536.0, 1, 1, 0.0, policy=policy)
        yield make(f"{policy}, grows", 65536.0, 3 if policy == "torch" else 4, 1, 0.0, policy=policy)
        yield make(f"{policy}, backs off", 65536.0, 3, 1, 1.0, policy=policy)
        yield make(f"{policy}, patient", 65536.0, 2, 2, 1.0, policy=policy, hysteresis=3)
        yield make(f"{policy}, at its least", 1.0, 2, 1, 1.0, policy=policy, min_scale=1.0)
        yield make(f"{policy}, at its most", 2.0**127, 3 if policy == "torch" else 4, 1, 0.0, policy=policy)
    yield make("deepspeed, refills", 65536.0, 2, 1, 0.0, policy="deepspeed", hysteresis=3, consecutive_hysteresis=True)
    yield from make("numbers", 65536.0, 3, 1, 1.0).at_odd_addresses()
    yield make("bench", 65536.0, 2, 2, 1.0, bench=True, policy="deepspeed", hysteresis=2)
