"""Gradient accumulation that weighs every token alike, over micro-batches and ranks.

A linear model predicts x·w for each token; its loss is the mean of (x·w − y)² over all tokens that count, of all
micro-batches of all ranks together. rank_gradient is what one rank hands to the all-reduce, which takes the mean over
the ranks: that mean must be the gradient of the loss by w.

w (d,); batches: the micro-batches of this rank, a list, which may be empty, of (x (n, d), y (n,), counts (n,) bool); n
differs, and so does how many tokens count; tokens: how many count on all ranks together (other ranks' data is not known
here); ranks: how many there are → gradient (d,). Without any token that counts it is 0. Do not call autograd.

    >>> one = [(torch.tensor([[1.0], [1.0]]), torch.tensor([0.0, 9.0]), torch.tensor([True, False]))]
    >>> rank_gradient(torch.tensor([1.0]), one, tokens=4, ranks=2)
    tensor([1.])
"""

import torch
from torch import Tensor


def rank_gradient(w: Tensor, batches: list[tuple[Tensor, Tensor, Tensor]], tokens: int, ranks: int) -> Tensor:
    total = torch.zeros_like(w)
    for x, y, counts in batches:
        error = (x @ w - y).masked_fill(~counts, 0.0)
        total += 2 * x.T @ error
    return total * ranks / max(tokens, 1)
