"""Cross entropy with label smoothing.

logits (n, vocabulary), targets (n,) int64, where −100 marks rows that do not count, epsilon in [0, 1] → scalar. A row's
loss is the cross entropy against the distribution (1 − ε)·onehot(target) + ε / vocabulary; the result is its mean over
the rows that count, 0 if none does. Gradients must be right too (autograd may make them), also those of that 0, on
which backward must not fail. Logits as large as ±1e4 must work. Do not call torch's cross_entropy or nll_loss.

    >>> label_smoothing(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([0, -100]), 0.1)
    tensor(0.2269)
"""

import torch
from torch import Tensor


def label_smoothing(logits: Tensor, targets: Tensor, epsilon: float) -> Tensor:
    counts = targets != -100
    rows = max(int(counts.sum()), 1)
    losses = -(logits - logits.logsumexp(-1, keepdim=True))
    right = losses.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    mixed = (1 - epsilon) * right + epsilon * losses.mean(-1)
    return torch.where(counts, mixed, torch.zeros_like(mixed)).sum() / rows
