"""Scaled dot-product attention with a mask and a bias.

q (b, h, tq, d), k and v (b, h, tk, d), mask (b, tq, tk) bool, True where a query sees a key (the same for all heads),
bias (h, tq, tk) or None (the same for all rows of the batch) → (b, h, tq, d), of the type of q, which may be float16:
softmax(q kᵀ / √d + bias) v over the keys that the query sees. A query that sees no key gives zeros, and no gradient
comes from it. Gradients must be right too (autograd may make them). Do not call torch's scaled_dot_product_attention.

    >>> v = torch.tensor([[[[1.0], [3.0], [8.0]]]])
    >>> mask = torch.tensor([[[True, True, False], [False, False, False]]])
    >>> attention(torch.zeros(1, 1, 2, 1), torch.zeros(1, 1, 3, 1), v, mask).flatten()
    tensor([2., 0.])
"""

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor | None = None) -> Tensor:
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if bias is not None:
        scores = scores + bias
    hidden = ~mask[:, None]
    scores = scores.masked_fill(hidden, -torch.inf)
    weights = scores.masked_fill(hidden.all(-1, keepdim=True), 0.0).softmax(-1).masked_fill(hidden, 0.0)
    return weights @ v
