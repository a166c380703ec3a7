"""C = A B in Triton: A (m, k), B (k, n), fp32 or bf16, any sizes and strides → (m, n) of A's type.

A program computes a tile of 32 × 32 of C in fp32, in steps of 16 along k, with tl.dot. A and B may be transposed views:
use both strides.

    >>> matmul(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]]))
    tensor([[11.]])
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def matmul_kernel(a, b, c, m, n, k, am, ak, bk, bn, TILE: tl.constexpr, STEP: tl.constexpr):
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    j = tl.program_id(1) * TILE + tl.arange(0, TILE)
    sums = tl.zeros([TILE, TILE], tl.float32)
    for start in range(0, k, STEP):
        l = start + tl.arange(0, STEP)
        left = tl.load(a + i[:, None] * am + l[None, :] * ak, mask=(i[:, None] < m) & (l[None, :] < k), other=0.0)
        right = tl.load(b + l[:, None] * bk + j[None, :] * bn, mask=(l[:, None] < k) & (j[None, :] < n), other=0.0)
        sums += tl.dot(left, right, input_precision="ieee")
    tl.store(c + i[:, None] * n + j[None, :], sums, mask=(i[:, None] < m) & (j[None, :] < n))


def matmul(a: Tensor, b: Tensor) -> Tensor:
    (m, k), n = a.shape, b.shape[1]
    c = torch.empty(m, n, dtype=a.dtype, device=a.device)
    grid = (triton.cdiv(m, 32), triton.cdiv(n, 32))
    matmul_kernel[grid](a, b, c, m, n, k, *a.stride(), *b.stride(), 32, 16)
    return c
