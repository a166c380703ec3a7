"""What several kernel files need: shapes of tiles, tensors seen as rows, a sum over parts."""

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


def tile(rows: int, columns: int, elements: int = 2048, widest: int = 2048) -> dict[str, int]:
    """ROWS × BLOCK ≈ `elements` of a (rows, columns) matrix: whole rows of up to `widest` columns, several if short."""
    block = min(triton.next_power_of_2(columns), widest)
    at_once = min(max(elements // block, 1), triton.next_power_of_2(rows))
    return {"ROWS": at_once, "BLOCK": block, "num_warps": warps(at_once * block)}


def as_rows(t: Tensor) -> tuple[Tensor, int]:
    """A tensor (..., C) as (rows, C) with adjacent elements in a row, and the stride between rows: halves of a fused
    projection and the like are read in place, anything else is copied."""
    columns = t.shape[-1]
    if columns <= 1 or t.stride(-1) == 1:
        try:
            seen = t.view(-1, columns) if columns else t.view(t.shape.numel(), 0)
        except RuntimeError:  # the rows are not at one stride
            pass
        else:
            return seen, seen.stride(0)
    return t.contiguous(), columns


@triton.jit
def sum_parts_kernel(parts, out, count, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for first in range(0, count, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < count)[:, None] & (at < columns)[None, :]
        sums += tl.sum(tl.load(parts + row.to(tl.int64)[:, None] * columns + at[None, :], mask=inside, other=0.0), 0)
    tl.store(out + at, sums, mask=at < columns)


def sum_parts(parts: Tensor, out: Tensor) -> Tensor:
    """out (C,) = the sum of parts (P, C) fp32 in a fixed order, rounded once."""
    count, columns = parts.shape
    if columns:
        block = min(triton.next_power_of_2(columns), 64)
        sum_parts_kernel[(triton.cdiv(columns, block),)](parts, out, count, columns, ROWS=32, BLOCK=block, num_warps=4)
    return out


def empty_f32(like: Tensor, *size: int) -> Tensor:
    return torch.empty(size, dtype=torch.float32, device=like.device)
