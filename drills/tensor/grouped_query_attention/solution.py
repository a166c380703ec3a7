"""Causal attention in which several query heads share a key head, without copies of the keys.

q (b, hq, tq, d), k and v (b, hk, tk, d), where hk divides hq and tq ≤ tk → (b, hq, tq, d): softmax(q kᵀ / √d) v. Query
head i uses key head i // (hq / hk). Query j stands at position j + tk − tq and sees the keys at its own position and
before. Gradients must be right too (autograd may make them).

Keys and values may not be repeated for the query heads, nor by a matmul that broadcasts them, which copies: with one
query and 64 keys no tensor with more elements than k may be made.

    >>> q = torch.tensor([[[[0.0]], [[9.0]]]])
    >>> grouped_query_attention(q, torch.tensor([[[[0.0], [9.0]]]]), torch.tensor([[[[1.0], [3.0]]]])).flatten()
    tensor([2., 3.])
"""

import torch
from torch import Tensor


def grouped_query_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, hq, tq, d = q.shape
    hk, tk = k.shape[1:3]
    group = hq // hk
    scores = q.reshape(b, hk, group * tq, d) @ k.mT / d**0.5
    hidden = torch.ones(tq, tk, dtype=torch.bool, device=q.device).triu(tk - tq + 1)
    scores = scores.view(b, hk, group, tq, tk).masked_fill(hidden, -torch.inf)
    weights = scores.softmax(-1).view(b, hk, group * tq, tk)
    return (weights @ v).view(b, hq, tq, d)
