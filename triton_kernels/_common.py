"""Shared by kernel files: shapes of tiles, tensors viewed as rows, a row's mean and variance, a sum over parts."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor


def check(holds: bool, op: str, what: str) -> None:
    if not holds:
        raise RuntimeError(f"{op}: {what}")


def capability() -> int:
    """The compute capability that kernels are compiled for, 90 for 9.0; 0 in the interpreter and for AMD's GPUs."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return 0
    target = triton.runtime.driver.active.get_current_target()
    return target.arch if target.backend == "cuda" else 0


def warps(elements: int) -> int:
    """Warps for a tile: about 16 elements a thread, 1 to 16 warps."""
    return min(max(triton.next_power_of_2(elements) // 512, 1), 16)


def tile(n_rows: int, n_cols: int, elements: int = 2048, widest: int = 2048) -> dict[str, int]:
    """BLOCK_ROWS × BLOCK_SIZE ≈ `elements` of (n_rows, n_cols): whole rows up to `widest` columns, several if short."""
    block = min(triton.next_power_of_2(n_cols), widest)
    at_once = min(max(elements // block, 1), triton.next_power_of_2(n_rows))
    return {"BLOCK_ROWS": at_once, "BLOCK_SIZE": block, "num_warps": warps(at_once * block)}


def as_rows(t: Tensor) -> tuple[Tensor, int]:
    """A tensor (..., C) as (rows, C) with adjacent elements in a row, and the stride between rows: halves of a fused
    projection and the like are read in place, anything else is copied."""
    n_cols = t.shape[-1]
    if n_cols <= 1 or t.stride(-1) == 1:
        try:
            seen = t.view(-1, n_cols) if n_cols else t.view(t.shape.numel(), 0)
        except RuntimeError:  # the rows are not at one stride
            pass
        else:
            return seen, seen.stride(0)
    return t.contiguous(), n_cols


@triton.jit
def sum_parts_kernel(parts, out, count, n_cols, BLOCK_ROWS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    sums = tl.zeros([BLOCK_SIZE], tl.float32)
    for first in range(0, count, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        inside = (row < count)[:, None] & (at < n_cols)[None, :]
        sums += tl.sum(tl.load(parts + row.to(tl.int64)[:, None] * n_cols + at[None, :], mask=inside, other=0.0), 0)
    tl.store(out + at, sums, mask=at < n_cols)


def sum_parts(parts: Tensor, out: Tensor) -> Tensor:
    """out (C,) = the sum of parts (P, C) fp32 in a fixed order, rounded once."""
    count, n_cols = parts.shape
    if n_cols:
        block = min(triton.next_power_of_2(n_cols), 64)
        grid = (triton.cdiv(n_cols, block),)
        sum_parts_kernel[grid](parts, out, count, n_cols, BLOCK_ROWS=32, BLOCK_SIZE=block, num_warps=4)
    return out


@triton.jit
def row_statistics(x, here, n_cols, eps, BLOCK_ROWS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Mean and 1 / sqrt(variance + eps) of BLOCK_ROWS rows, which begin at x (BLOCK_ROWS, 1) and exist where `here` is.
    Two sweeps: a row is centered before it is squared."""
    column = tl.arange(0, BLOCK_SIZE)
    sums = tl.zeros([BLOCK_ROWS], tl.float32)
    for first in range(0, n_cols, BLOCK_SIZE):
        inside = here & (first + column < n_cols)[None, :]
        sums += tl.sum(tl.load(x + first + column[None, :], mask=inside, other=0.0).to(tl.float32), 1)
    mean = sums / n_cols
    squares = tl.zeros([BLOCK_ROWS], tl.float32)
    for first in range(0, n_cols, BLOCK_SIZE):
        inside = here & (first + column < n_cols)[None, :]
        block = tl.load(x + first + column[None, :], mask=inside, other=0.0).to(tl.float32)
        centered = tl.where(inside, block - mean[:, None], 0.0)
        squares += tl.sum(centered * centered, 1)
    return mean, 1 / tl.sqrt_rn(squares / n_cols + eps)


def empty_f32(like: Tensor, *size: int) -> Tensor:
    return torch.empty(size, dtype=torch.float32, device=like.device)
