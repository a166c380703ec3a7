"""The backward pass of attention by tiles of keys, as in FlashAttention.

q, out, dout (tq, d), k and v (tk, d), lse (tq,), tiles of `block` keys (the last may be smaller) → (dq, dk, dv): the
gradients of Σ dout·out, where out = softmax(q kᵀ / √d) v and lse = log of the sum of exp(q·k / √d), both as the forward
pass left them. With causal=True query i sees the keys j ≤ i + tk − tq; for a query that sees no key out is 0 and lse
−inf, and it has gradient 0. Do not call autograd.

The scores are never whole in memory: with 64 queries, 64 keys, d = 8 and block = 16 no tensor may have 64·64 elements.

    >>> q, k, v = torch.zeros(1, 1), torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0], [4.0]])
    >>> attention_backward(q, k, v, torch.tensor([[3.0]]), torch.tensor([0.6931]), torch.ones(1, 1), block=1)
    (tensor([[1.0000]]), tensor([[0.],
            [0.]]), tensor([[0.5000],
            [0.5000]]))
"""

import torch
from torch import Tensor


def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, block: int, causal: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    tq, tk, scale = len(q), len(k), q.shape[1] ** -0.5
    delta = (dout * out).sum(1, keepdim=True)
    position = torch.arange(tk - tq, tk, device=q.device)[:, None]
    empty = lse[:, None] == -torch.inf
    dq, dk, dv = torch.zeros_like(q), torch.empty_like(k), torch.empty_like(v)
    for j in range(0, tk, block):
        keys, values = k[j : j + block], v[j : j + block]
        weights = (q @ keys.T * scale - lse[:, None]).exp()
        hidden = empty
        if causal:
            hidden = empty | (torch.arange(j, j + len(keys), device=q.device) > position)
        weights = weights.masked_fill(hidden, 0.0)
        dv[j : j + block] = weights.T @ dout
        ds = weights * (dout @ values.T - delta) * scale
        dq += ds @ keys
        dk[j : j + block] = ds.T @ q
    return dq, dk, dv
