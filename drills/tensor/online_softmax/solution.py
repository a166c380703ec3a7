"""Softmax and weighted sum in one pass over blocks, as in FlashAttention and split-KV decoding.

The state of r rows is a tuple (m, l, acc): the largest score so far (r,), the sum so far of exp(score − m) (r,), and
the sum so far of exp(score − m)·value (r, d).

start(r, d)                    the state before any block, fp32: m is −inf, the rest 0
update(state, scores, values)  the state after one more block: scores (r, n), values (n, d), n ≥ 1
merge(a, b)                    the state of two parts that were processed apart
finish(state)                  (r, d): softmax(all scores) @ all values

Scores may be as large as ±1e4, or −inf (hidden), even all of a row in one block or in every block; a row that never
sees a finite score ends as zeros. States given as arguments are not changed.

    >>> state = update(start(1, 1), torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0], [3.0]]))
    >>> state
    (tensor([0.]), tensor([2.]), tensor([[4.]]))
    >>> finish(update(state, torch.tensor([[100.0]]), torch.tensor([[7.0]])))
    tensor([[7.]])
"""

import torch
from torch import Tensor

State = tuple[Tensor, Tensor, Tensor]


def start(r: int, d: int) -> State:
    return torch.full((r,), -torch.inf), torch.zeros(r), torch.zeros(r, d)


def update(state: State, scores: Tensor, values: Tensor) -> State:
    m = scores.amax(-1)
    weights = (scores - finite(m)[:, None]).exp()
    return merge(state, (m, weights.sum(-1), weights @ values))


def merge(a: State, b: State) -> State:
    m = torch.maximum(a[0], b[0])
    old, new = (a[0] - finite(m)).exp(), (b[0] - finite(m)).exp()
    return m, a[1] * old + b[1] * new, a[2] * old[:, None] + b[2] * new[:, None]


def finish(state: State) -> Tensor:
    _, total, acc = state
    return acc / torch.where(total == 0, torch.ones_like(total), total)[:, None]


def finite(m: Tensor) -> Tensor:
    """0 where no finite score has been seen: −inf − (−inf) is NaN."""
    return m.masked_fill(m == -torch.inf, 0.0)
