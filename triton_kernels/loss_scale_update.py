"""A step of dynamic loss scaling on three numbers in device memory: the host never asks whether gradients overflowed.

The rules are those of finetune/ops/loss_scale_update.py: torch.amp.GradScaler's with apex's hysteresis, or DeepSpeed's
DynamicLossScaler. Factors multiply in fp64, as their Python does. One thread's work: 28 bytes, the time of a launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import check


@triton.jit
def loss_scale_update_kernel(
    scale, growth_tracker, hysteresis_tracker, found_inf, growth_factor: tl.float64, backoff_factor: tl.float64,
    growth_interval, hysteresis, min_scale, DEEPSPEED: tl.constexpr, CONSECUTIVE: tl.constexpr,
):  # fmt: skip
    old, overflow = tl.load(scale), tl.load(found_inf) > 0
    growth, patience = tl.load(growth_tracker), tl.load(hysteresis_tracker)
    lower = tl.maximum((old.to(tl.float64) * backoff_factor).to(tl.float32), min_scale)
    higher = (old.to(tl.float64) * growth_factor).to(tl.float32)
    higher = tl.where(higher < float("inf"), higher, old)
    if DEEPSPEED:
        backs_off = overflow & ((patience == 1) | (hysteresis == 1))
        grows = (overflow == 0) & (growth > 0) & (growth % growth_interval == 0)
        if CONSECUTIVE:
            refills = overflow == 0
        else:
            refills = grows
        patience = tl.where(overflow & (backs_off == 0), patience - 1, patience)
        patience = tl.where(refills, hysteresis, patience)
        growth = tl.where(overflow, 0, growth + 1)
    else:
        patience = tl.where(overflow, patience - 1, hysteresis)
        growth = tl.where(overflow, 0, growth + 1)
        backs_off = overflow & (patience <= 0)
        grows = growth == growth_interval
        growth = tl.where(grows, 0, growth)
    tl.store(scale, tl.where(backs_off, lower, tl.where(grows, higher, old)))
    tl.store(growth_tracker, growth)
    tl.store(hysteresis_tracker, patience)


def loss_scale_update_(
    scale: Tensor, growth_tracker: Tensor, hysteresis_tracker: Tensor, found_inf: Tensor, deepspeed: bool,
    growth_factor: float, backoff_factor: float, growth_interval: int, hysteresis: int, min_scale: float,
    consecutive_hysteresis: bool,
) -> None:  # fmt: skip
    numbers = (scale, growth_tracker, hysteresis_tracker, found_inf)
    check(all(t.numel() == 1 and t.device == scale.device for t in numbers), "loss_scale_update_", "four numbers")
    check(growth_interval >= 1 and 1 <= hysteresis < 2**30, "loss_scale_update_", "intervals count from 1")
    loss_scale_update_kernel[(1,)](
        *numbers, growth_factor, backoff_factor, growth_interval, hysteresis, min_scale,
        DEEPSPEED=deepspeed, CONSECUTIVE=consecutive_hysteresis, num_warps=1,
    )  # fmt: skip


OPERATORS = {"loss_scale_update_": loss_scale_update_}


def typical(dtype: torch.dtype):
    trackers = [torch.zeros((), dtype=torch.int32) for _ in range(2)]
    for deepspeed in (False, True):
        scales = (torch.ones(()), *trackers, torch.zeros(()))
        yield "loss_scale_update_", (*scales, deepspeed, 2.0, 0.5, 2000, 2, 1.0, deepspeed)
