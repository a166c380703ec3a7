"""Causal attention with a learned sink per head, as in gpt-oss.

q (h, tq, d), k and v (h, tk, d), tq ≤ tk, sink (h,) → (h, tq, d). Query i sees the keys j ≤ i + tk − tq, with scores
q·k / √d. The sink of the head is one more score in the softmax of every row: it takes its share of the weight, is not
divided by √d and has no value: a row's weights for the keys sum to less than 1. Numbers as large as ±1e4 must work.
Gradients, the sink's too, must be right and finite (autograd may make them).

    >>> v = torch.tensor([[[1.0], [3.0]]])
    >>> attention_sinks(torch.zeros(1, 2, 1), torch.zeros(1, 2, 1), v, torch.tensor([0.0])).flatten()
    tensor([0.5000, 1.3333])
"""

import torch
from torch import Tensor


def attention_sinks(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    h, tq, d = q.shape
    tk = k.shape[1]
    hidden = torch.ones(tq, tk, dtype=torch.bool, device=q.device).triu(tk - tq + 1)
    scores = (q @ k.mT / d**0.5).masked_fill(hidden, -torch.inf)
    scores = torch.cat([scores, sink.view(h, 1, 1).expand(h, tq, 1)], -1)
    return scores.softmax(-1)[..., :tk] @ v
