"""Many tensors in one launch: a table of addresses in device memory instead of a pointer argument each.

The table has a row a tensor: the number of its first block, its elements, those in whole blocks (0 where an address is
not a multiple of 16 bytes), its address in each list of tensors (0 where a list is empty). `owner` names each block's
row. The table comes from pageable memory: torch refuses to capture its copy in a CUDA graph, so none of these ops may
be captured. A kernel does its work in a function with a constant WHOLE, called in the two branches of a condition that
is the same for all of a block's threads: whole blocks move 16 bytes a thread, a tensor's last one goes under a mask.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import check

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
BLOCK = 4096  # elements of a program


@triton.jit
def block_of(table, owner, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """This program's row of the table, the number of its first element, how many elements the tensor has, and whether
    the block is whole: all of it exists, and every address in the row is a multiple of 16 bytes."""
    row = table + tl.load(owner + tl.program_id(0)).to(tl.int64) * WIDTH
    first = (tl.program_id(0) - tl.load(row)) * BLOCK
    return row, first, tl.load(row + 1), first < tl.load(row + 2)


@triton.jit
def pointer(row, column: tl.constexpr, DTYPE: tl.constexpr, WHOLE: tl.constexpr):
    """The tensor's address in list `column`."""
    address = tl.load(row + 3 + column).to(tl.pointer_type(DTYPE))
    if WHOLE:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def load(x, at, size, WHOLE: tl.constexpr):
    """x's elements `at`, 0 past its end. WHOLE: none is; without a mask that the compiler knows nothing of they move
    16 bytes a thread."""
    if WHOLE:
        value = tl.load(x + at)
    else:
        value = tl.load(x + at, mask=at < size, other=0)
    return value


@triton.jit
def store(x, value, at, size, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(x + at, value)
    else:
        tl.store(x + at, value, mask=at < size)


def by_dtype(*lists: list[Tensor]) -> list[list[list[Tensor]]]:
    """The tensors (lists of equal length, or empty) without the empty ones, grouped by the dtypes of the first two
    lists: a kernel has one type for each of its pointers."""
    groups = defaultdict(list)
    for i, first in enumerate(lists[0]):
        if first.numel():
            key = tuple(tensors[i].dtype for tensors in lists[:2] if tensors)
            groups[key].append([tensors[i] if tensors else None for tensors in lists])
    return [[[t for t in column if t is not None] for column in zip(*rows, strict=True)] for rows in groups.values()]


def pointers(
    *lists: list[Tensor], others: Sequence[list[Tensor]] = (), block: int = BLOCK
) -> tuple[Tensor, Tensor, dict[str, int]]:
    """table (n, 3 + lists), owner (blocks,), and the constants WIDTH and BLOCK. `others`: more lists, of tensors
    of other sizes."""
    sizes, device = [t.numel() for t in lists[0]], lists[0][0].device
    check(all(not ts or [t.numel() for t in ts] == sizes for ts in lists), "lists of tensors", "their sizes must match")
    lists = (*lists, *others)
    alike = all(t.is_contiguous() and t.device == device for tensors in lists for t in tensors)
    check(alike, "lists of tensors", "they must be contiguous and on one device")
    rows, first = [], 0
    for i, size in enumerate(sizes):
        addresses = [tensors[i].data_ptr() if tensors else 0 for tensors in lists]
        aligned = all(address % 16 == 0 for address in addresses)
        rows.append([first, size, size // block * block if aligned else 0, *addresses])
        first += triton.cdiv(size, block)
    table = torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)
    ends = torch.tensor([row[0] for row in rows[1:]] + [first], dtype=torch.int64).to(device, non_blocking=True)
    owner = torch.searchsorted(ends, torch.arange(first, device=device), right=True, out_int32=True)
    return table, owner, {"WIDTH": 3 + len(lists), "BLOCK": block}
