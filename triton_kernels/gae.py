"""Generalized advantage estimation (Schulman et al. 2016, arXiv:1506.02438) as a segmented scan backwards in time.

A step is an affine map of the step after it, and affine maps compose:

    A_t = b_t + k_t · A_{t+1},   b = r + γ · V(next) − V (without V(next) where terminated),   k = γ λ, 0 at ends
    (k, b) after (k', b') is (k k', b + k b')

so tl.associative_scan runs over time (Blelloch 1990, "Prefix sums and their applications"). No product with a zero k is
made: nothing crosses the end of a segment, not even a NaN.
Layout: contiguous (T, N); a program takes up to 32 neighboring columns, so that a warp reads whole lines, and goes
over time in tiles from the end; a tile's first A enters the tile before it.
Bytes: in fp32 14 in and 8 out an element, each once. FLOPs: 7 for the maps, 3 for each of the scan's log2(TIME) levels.
Intensity: 1 to 2 FLOP/byte; the roof is memory bandwidth where there are columns enough to fill the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import check, empty_f32, warps


@triton.jit
def apply(k, b, x):
    return tl.where(k == 0, b, b + k * x)


@triton.jit
def compose(later_k, later_b, k, b):
    return k * later_k, apply(k, b, later_b)


@triton.jit
def gae_kernel(
    rewards, values, next_values, terminated, truncated, advantages, returns, steps, columns, gamma, decay,
    TIME: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    time = tl.arange(0, TIME)
    carry = tl.zeros([COLUMNS], tl.float32)  # the advantage after this tile
    tiles = tl.cdiv(steps, TIME)
    for back in range(tiles):
        t = (tiles - 1 - back) * TIME + time
        inside = (t < steps)[:, None] & (column < columns)[None, :]
        at = t.to(tl.int64)[:, None] * columns + column[None, :]
        r = tl.load(rewards + at, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(values + at, mask=inside, other=0.0).to(tl.float32)
        next_v = tl.load(next_values + at, mask=inside, other=0.0).to(tl.float32)
        dead = tl.load(terminated + at, mask=inside, other=0) != 0
        cut = tl.load(truncated + at, mask=inside, other=0) != 0
        b = r + tl.where(dead, 0.0, gamma * next_v) - v
        k = tl.where(dead | cut, 0.0, tl.where(inside, decay, 1.0))  # the identity beyond the last step
        k, b = tl.associative_scan((k, b), 0, compose, reverse=True)
        advantage = apply(k, b, carry[None, :])
        tl.store(advantages + at, advantage, mask=inside)
        tl.store(returns + at, advantage + v, mask=inside)
        carry = tl.sum(tl.where(time[:, None] == 0, advantage, 0.0), 0)


def gae(
    rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, truncated: Tensor, gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    given = [t.contiguous() for t in (rewards, values, next_values)]
    ends = [t.contiguous().view(torch.uint8) for t in (terminated, truncated)]
    alike = rewards.dim() == 2 and all(t.shape == rewards.shape for t in (*given, *ends))
    check(alike and len({t.dtype for t in given}) == 1, "gae", "all must have one shape (T, N), the numbers one dtype")
    steps, columns = rewards.shape
    advantages, returns = empty_f32(rewards, steps, columns), empty_f32(rewards, steps, columns)
    if rewards.numel():
        wide = min(triton.next_power_of_2(columns), 32)
        time = min(triton.next_power_of_2(steps), 2048 // wide)
        gae_kernel[(triton.cdiv(columns, wide),)](
            *given, *ends, advantages, returns, steps, columns, gamma, gamma * lam,
            TIME=time, COLUMNS=wide, num_warps=warps(2 * time * wide),  # eight steps a thread: each has five numbers
        )  # fmt: skip
    return advantages, returns


OPERATORS = {"gae": gae}


def typical(dtype: torch.dtype):
    for columns in (256, 1):
        numbers, ends = torch.empty(1024, columns, dtype=dtype), torch.zeros(1024, columns, dtype=torch.bool)
        yield "gae", (numbers, numbers, numbers, ends, ends, 0.99, 0.95)
