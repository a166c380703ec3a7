"""Test cases that an op's samples cannot express, each for one deliberate fault: a contiguous tensor of more than 2^32
elements, and targets that the reference refuses.

A case is called with a backend and returns pairs of tensors that must be equal to the bit, NaN with NaN. faults.py
tries the case of a fault before the samples; the tests run every case without a fault, too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from finetune import ops
from finetune.ops._samples import sparse

Case = Callable[[str], list[tuple[Tensor, Tensor]]]


def random(*size: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*size, generator=torch.Generator().manual_seed(sum(size))) * scale).half()


def far_rows(backend: str) -> list[tuple[Tensor, Tensor]]:
    """The first and the last row count, which are 2^32 elements apart."""
    dim = 1 << 14
    count = (1 << 32) // dim + 1
    rows, weight = random(2, dim), random(3, dim, scale=dim**-0.5)
    x = sparse(count * dim, rows.dtype).view(count, dim)
    x[0], x[-1] = rows
    targets = torch.full((count,), -100)
    targets[0], targets[-1] = 1, 2
    want = ops.linear_cross_entropy(rows, weight, torch.tensor([1, 2]), reduction="sum", backend=backend)
    return [(ops.linear_cross_entropy(x, weight, targets, reduction="sum", backend=backend), want)]


def targets_outside_of_the_vocabulary(backend: str) -> list[tuple[Tensor, Tensor]]:
    x, weight, targets = random(5, 8), random(11, 8), torch.arange(5)
    bad = (targets.index_fill(0, torch.tensor(2), word) for word in (11, -1, 1 << 40))
    return [(ops.linear_cross_entropy(x, weight, t, backend=backend), torch.tensor(torch.nan)) for t in bad]


CASES: dict[str, Case] = {
    "linear_cross_entropy.offsets_of_32_bits": far_rows,
    "linear_cross_entropy.no_nan": targets_outside_of_the_vocabulary,
}
