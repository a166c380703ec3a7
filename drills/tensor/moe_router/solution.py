"""A top-k router with capacity, and its balance loss.

logits (n, e), 1 ≤ k ≤ e, capacity ≥ 1 → (experts (n, k) int64, weights (n, k), slots (n, k) int64, balance scalar).

experts: the k experts with the largest logits of each token, best first; of equal logits the expert with the smaller
number comes first. weights: the softmax over these k logits.

slots: which place of its expert a choice takes, counted from 0. Places are given to all first choices in the order of
the tokens, then to all second choices, and so on; once an expert has given `capacity` places, choices of it are
dropped: slot −1 and weight 0. The other weights of the token stay as they are.

balance: e · Σ f_i·P_i over the experts, with f_i the share of the n·k choices that fall on expert i, dropped ones too,
and P_i the mean over the tokens of the softmax over all e logits. Gradients are not asked for.

    >>> experts, weights, slots, balance = route(torch.tensor([[2.0, 0.0], [2.0, 0.0]]), k=1, capacity=1)
    >>> experts.flatten(), weights.flatten(), slots.flatten(), balance
    (tensor([0, 0]), tensor([1., 0.]), tensor([ 0, -1]), tensor(1.7616))
"""

import torch
from torch import Tensor


def route(logits: Tensor, k: int, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, e = logits.shape
    best = logits.sort(dim=1, descending=True, stable=True)
    experts = best.indices[:, :k]
    weights = best.values[:, :k].softmax(-1)
    chosen = torch.nn.functional.one_hot(experts.T.reshape(-1), e)  # first choices of all tokens, then second ones
    place = ((chosen.cumsum(0) - 1) * chosen).sum(1)
    slots = place.view(k, n).T
    share = chosen.to(logits.dtype).mean(0)
    balance = e * (share * logits.softmax(-1).mean(0)).sum()
    dropped = slots >= capacity
    return experts, weights.masked_fill(dropped, 0.0), slots.masked_fill(dropped, -1), balance
