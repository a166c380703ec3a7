import torch
import triton
import triton.language as tl


@triton.jit
def sums(a, b, y, n, programs, SIZE: tl.constexpr):
    start = tl.program_id(0) * SIZE
    while start < n:
        i = start + tl.arange(0, SIZE)
        tl.store(y + i, tl.load(a + i, i < n, 0.0) + tl.load(b + i, i < n, 0.0), i < n)
        start += programs * SIZE


def add_kernel():
    """Not needed: the kernel above has another name."""


def add(a, b):
    y = torch.empty_like(a)
    sums[(2,)](a, b, y, a.numel(), 2, SIZE=64)
    return y
