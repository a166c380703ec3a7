"""Cross entropy with ignored targets, and its gradient by hand.

logits (n, vocabulary), targets (n,) int64, where −100 marks rows that do not count → (loss, gradient): the mean over
the rows that count of −log softmax(logits)[target], and its derivative by the logits, (n, vocabulary). Do not call
autograd. If no row counts, both are zero.

    >>> cross_entropy(torch.tensor([[5.0, 5.0], [0.0, 0.0]]), torch.tensor([-100, 1]))
    (tensor(0.6931), tensor([[ 0.0000,  0.0000],
            [ 0.5000, -0.5000]]))
"""

import torch
from torch import Tensor


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    counts = targets != -100
    rows = max(int(counts.sum()), 1)
    index = targets.clamp(min=0)[:, None]
    logs = logits - logits.logsumexp(-1, keepdim=True)
    losses = -logs.gather(1, index)[:, 0]
    gradient = logs.exp().scatter_add(1, index, -torch.ones_like(logs[:, :1]))
    return (losses * counts).sum() / rows, gradient.masked_fill(~counts[:, None], 0.0) / rows
