"""y = a + b in Triton, for vectors of any length.

Write the kernel (one program for 128 numbers, masked at the end) and `add`, which allocates the result and launches as
many programs as are needed. a and b (n), fp32, contiguous → (n).

    >>> add(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.5]))
    tensor([1.5000, 2.5000])
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128


@triton.jit
def add_kernel(a, b, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    tl.store(y + at, tl.load(a + at, mask=inside) + tl.load(b + at, mask=inside), mask=inside)


def add(a: Tensor, b: Tensor) -> Tensor:
    y = torch.empty_like(a)
    add_kernel[(triton.cdiv(len(a), BLOCK),)](a, b, y, len(a), BLOCK)
    return y
