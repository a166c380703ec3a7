"""A key-value cache for a batch whose rows have different lengths.

KVCache(batch, heads, capacity, d): empty, fp32, room for `capacity` tokens a row.

positions(t) → (batch, t) int64: where the next t tokens of each row will stand.

append(k, v, counts): k and v (batch, heads, t, d), counts (batch,) int64, from 0 to t. Of row b the first counts[b] new
tokens are stored after those it has; the rest are padding. ValueError if a row would hold more than `capacity` tokens;
then no row is changed.

attend(q) → (batch, heads, 1, d): q (batch, heads, 1, d), one query a row, which sees all tokens of its row:
softmax(q kᵀ / √d) v. A row without tokens gives zeros.

    >>> cache = KVCache(batch=2, heads=1, capacity=4, d=1)
    >>> new = torch.tensor([1.0, 3.0, 5.0, 0.0]).view(2, 1, 2, 1)
    >>> cache.append(new, new, counts=torch.tensor([2, 1]))
    >>> cache.positions(2)
    tensor([[2, 3],
            [1, 2]])
    >>> cache.attend(torch.zeros(2, 1, 1, 1)).flatten()
    tensor([2., 5.])
"""

import torch
from torch import Tensor


class KVCache:
    def __init__(self, batch: int, heads: int, capacity: int, d: int) -> None:
        self.k, self.v = (torch.zeros(batch, heads, capacity, d) for _ in range(2))
        self.lengths = torch.zeros(batch, dtype=torch.int64)

    def positions(self, t: int) -> Tensor:
        return self.lengths[:, None] + torch.arange(t)

    def append(self, k: Tensor, v: Tensor, counts: Tensor) -> None:
        if int((self.lengths + counts).max()) > self.k.shape[2]:
            raise ValueError("a row has no room for its tokens")
        for b, count in enumerate(counts.tolist()):
            start = int(self.lengths[b])
            self.k[b, :, start : start + count] = k[b, :, :count]
            self.v[b, :, start : start + count] = v[b, :, :count]
        self.lengths = self.lengths + counts

    def attend(self, q: Tensor) -> Tensor:
        hidden = torch.arange(self.k.shape[2]) >= self.lengths[:, None, None, None]
        scores = (q @ self.k.mT / q.shape[-1] ** 0.5).masked_fill(hidden, -1e30)
        return (scores.softmax(-1) * ~hidden) @ self.v
