"""All-reduce over a ring, with all ranks simulated in one process.

ring_all_reduce(tensors, exchange): tensors is a list, tensors[r] the vector (m,) of rank r, of n ranks. → a list of
n tensors (m,), each the sum of all, in new memory; the same numbers on all ranks.
Ranks may exchange numbers only by exchange(messages), messages[r] the tensor that rank r sends to rank r + 1 (the last
one to rank 0); it returns a list, in which item r is what rank r has received, from rank r − 1. Apart from that, a sum
for rank r uses only what rank r has.
Cut the vector into the n chunks of tensor_split(n), some of which may be empty. There are exactly 2 (n − 1) exchanges,
in each of which every rank sends one chunk: first n − 1 that leave each rank with the sum of one chunk
(reduce-scatter), then n − 1 that bring every sum to every rank (all-gather).

    >>> def exchange(messages):
    ...     return messages[-1:] + messages[:-1]
    >>> ring_all_reduce([torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 20.0, 30.0])], exchange)
    [tensor([11., 22., 33.]), tensor([11., 22., 33.])]
"""

from collections.abc import Callable

import torch
from torch import Tensor


def ring_all_reduce(tensors: list[Tensor], exchange: Callable[[list[Tensor]], list[Tensor]]) -> list[Tensor]:
    n = len(tensors)
    chunks = [[chunk.clone() for chunk in each.tensor_split(n)] for each in tensors]
    for step in range(n - 1):
        received = exchange([chunks[r][(r - step) % n] for r in range(n)])
        for r in range(n):
            at = (r - step - 1) % n
            chunks[r][at] = chunks[r][at] + received[r]
    for step in range(n - 1):
        received = exchange([chunks[r][(r - step + 1) % n] for r in range(n)])
        for r in range(n):
            chunks[r][(r - step) % n] = received[r]
    return [torch.cat(each) for each in chunks]
