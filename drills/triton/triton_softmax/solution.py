"""Softmax of x (rows, columns) over columns in Triton, fp32 or bf16, at most 1,024 columns.

One program a row; the block is the next power of two of the number of columns. Arithmetic in fp32, the result in x's
type; numbers as large as 1e4 work. x may be a view whose rows lie x.stride(0) apart; its columns are neighbors.

    >>> softmax(torch.tensor([[0.0, 1.0, 1.0]]))
    tensor([[0.1554, 0.4223, 0.4223]])
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def softmax_kernel(x, y, columns, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    numbers = tl.load(x + row * stride + at, mask=inside, other=-float("inf")).to(tl.float32)
    weights = tl.exp(numbers - tl.max(numbers, 0))
    tl.store(y + row * columns + at, weights / tl.sum(weights, 0), mask=inside)


def softmax(x: Tensor) -> Tensor:
    rows, columns = x.shape
    y = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    softmax_kernel[(rows,)](x, y, columns, x.stride(0), triton.next_power_of_2(columns))
    return y
