"""Causal attention of one head over a sliding window, with ALiBi.

q (tq, d), k and v (tk, d), tq ≤ tk, window ≥ 1, slope ≥ 0 → (tq, d). Query i stands at position p = i + tk − tq and
sees the `window` keys that end with its own: p − window < j ≤ p. Its score for key j is q·k / √d − slope·(p − j), then
softmax over the keys it sees. Gradients must be right too (autograd may make them).

    >>> v = torch.tensor([[1.0], [3.0], [9.0]])
    >>> sliding_window(torch.zeros(2, 1), torch.zeros(3, 1), v, window=2)
    tensor([[2.],
            [6.]])
    >>> sliding_window(torch.zeros(1, 1), torch.zeros(3, 1), v, window=2, slope=1.0)
    tensor([[7.3864]])
"""

import torch
from torch import Tensor


def sliding_window(q: Tensor, k: Tensor, v: Tensor, window: int, slope: float = 0.0) -> Tensor:
    tq, tk = len(q), len(k)
    position = torch.arange(tk - tq, tk, device=q.device)[:, None]
    distance = position - torch.arange(tk, device=q.device)
    seen = (distance >= 0) & (distance < window)
    scores = q @ k.T / q.shape[-1] ** 0.5 - slope * distance
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
