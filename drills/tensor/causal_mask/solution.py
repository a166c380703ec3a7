"""Attention of one head with a causal mask.

q (tq, d), k and v (tk, d) → (tq, d): softmax(q kᵀ / √d) v, where query i sees the keys j ≤ i + tk − tq: the last query
sees all keys, as in decoding with a cache. A query that sees no key (tq > tk) gives zeros.

    >>> attention(torch.zeros(2, 1), torch.zeros(2, 1), torch.tensor([[1.0], [3.0]]))
    tensor([[1.],
            [2.]])
"""

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    tq, tk = len(q), len(k)
    hidden = torch.ones(tq, tk, dtype=torch.bool, device=q.device).triu(tk - tq + 1)
    scores = (q @ k.T / q.shape[-1] ** 0.5).masked_fill(hidden, -torch.inf)
    weights = scores.masked_fill(hidden.all(1, keepdim=True), 0.0).softmax(-1).masked_fill(hidden, 0.0)
    return weights @ v
