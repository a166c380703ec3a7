"""o = softmax(q kᵀ / √d) v in Triton, one head, causal: q, k, v (t, d), fp32, d a power of two from 16 to 64 → (t, d).

Query i sees the keys j ≤ i. A program has 16 queries and walks over keys in blocks of 16, with online softmax; blocks
that no query of the program sees are not read.

    >>> attention(torch.zeros(2, 16), torch.zeros(2, 16), torch.tensor([[1.0], [3.0]]).expand(2, 16).contiguous())[:, 0]
    tensor([1., 2.])
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def attention_kernel(q, k, v, o, t, scale, D: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = tl.arange(0, D)
    own = tl.load(q + i[:, None] * D + c[None, :], mask=i[:, None] < t, other=0.0)
    largest = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    out = tl.zeros([BLOCK, D], tl.float32)
    for start in range(0, (tl.program_id(0) + 1) * BLOCK, BLOCK):
        j = start + tl.arange(0, BLOCK)
        keys = tl.load(k + j[:, None] * D + c[None, :], mask=j[:, None] < t, other=0.0)
        values = tl.load(v + j[:, None] * D + c[None, :], mask=j[:, None] < t, other=0.0)
        scores = tl.dot(own, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where(j[None, :] <= i[:, None], scores, -float("inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        shrink = tl.exp(largest - larger)
        weights = tl.exp(scores - larger[:, None])
        total = total * shrink + tl.sum(weights, 1)
        out = out * shrink[:, None] + tl.dot(weights, values, input_precision="ieee")
        largest = larger
    tl.store(o + i[:, None] * D + c[None, :], out / total[:, None], mask=i[:, None] < t)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t, d = q.shape
    o = torch.empty_like(q)
    attention_kernel[(triton.cdiv(t, 16),)](q, k, v, o, t, d**-0.5, d, 16)
    return o
