"""The forward pass of FlashAttention, tile by tile.

q (tq, d), k and v (tk, d), tiles of block_q queries and block_k keys (the last of each may be smaller) → (out (tq, d),
lse (tq,)): out = softmax(q kᵀ / √d) v, and lse, the natural logarithm of the sum of exp(q·k / √d) over the keys that
the query sees. With causal=True query i sees the keys j ≤ i + tk − tq. A query that sees no key (tq > tk) gives zeros
and an lse of −inf. Scores as large as ±1e4 must work.

No tensor may have more elements than the largest of q, k and one tile of scores: the scores are never whole in memory.

    >>> v = torch.tensor([[1.0], [3.0], [8.0]])
    >>> flash_attention(torch.zeros(2, 1), torch.zeros(3, 1), v, block_q=1, block_k=2, causal=True)
    (tensor([[2.],
            [4.]]), tensor([0.6931, 1.0986]))
"""

import torch
from torch import Tensor


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, block_q: int, block_k: int, causal: bool = False
) -> tuple[Tensor, Tensor]:
    tq, tk, scale = len(q), len(k), q.shape[1] ** -0.5
    out, lse = torch.empty_like(q), q.new_empty(tq)
    for i in range(0, tq, block_q):
        rows = q[i : i + block_q]
        position = torch.arange(i, i + len(rows), device=q.device) + tk - tq
        m, total, acc = rows.new_full((len(rows),), -torch.inf), rows.new_zeros(len(rows)), torch.zeros_like(rows)
        for j in range(0, tk, block_k):
            if causal and j > position[-1]:
                break
            scores = rows @ k[j : j + block_k].T * scale
            if causal:
                keys = torch.arange(j, j + scores.shape[1], device=q.device)
                scores = scores.masked_fill(keys > position[:, None], -torch.inf)
            largest = torch.maximum(m, scores.amax(1))
            base = largest.masked_fill(largest == -torch.inf, 0.0)
            weights = (scores - base[:, None]).exp()
            keep = (m - base).exp()
            total = total * keep + weights.sum(1)
            acc = acc * keep[:, None] + weights @ v[j : j + block_k]
            m = largest
        out[i : i + block_q] = acc / total.masked_fill(total == 0, 1.0)[:, None]
        lse[i : i + block_q] = m + total.log()
    return out, lse
