"""y[r] = scale[r] · Σ_i w[r, i] · x[i] in Triton: w (rows, columns) int8, scale (rows), x (columns) fp32 → (rows) fp32.

A program has 8 rows and walks over the columns in blocks of 64. Any sizes; the sum is in fp32.

    >>> gemv(torch.tensor([[1, -2]], dtype=torch.int8), torch.tensor([0.5]), torch.tensor([3.0, 1.0]))
    tensor([0.5000])
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def gemv_kernel(w, scale, x, y, rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sums = tl.zeros([ROWS], tl.float32)
    for start in range(0, columns, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = (r[:, None] < rows) & (i[None, :] < columns)
        weights = tl.load(w + r[:, None] * columns + i[None, :], mask=inside, other=0).to(tl.float32)
        sums += tl.sum(weights * tl.load(x + i, mask=i < columns, other=0.0)[None, :], 1)
    tl.store(y + r, sums * tl.load(scale + r, mask=r < rows, other=0.0), mask=r < rows)


def gemv(w: Tensor, scale: Tensor, x: Tensor) -> Tensor:
    rows, columns = w.shape
    y = torch.empty(rows, device=w.device)
    gemv_kernel[(triton.cdiv(rows, 8),)](w, scale, x, y, rows, columns, 8, 64)
    return y
