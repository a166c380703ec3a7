"""Multi-head attention over a padded batch.

x (b, t, d); wq, wk, wv, wo (d, d), stored (outputs, inputs) as in nn.Linear, without bias; heads divides d; lengths
(b,) int64, from 1 to t → (b, t, d). Head i owns the outputs from i·d/heads up to (i + 1)·d/heads of the three
projections; scores are divided by √(d/heads); keys at positions lengths[b] and later are hidden from all queries of the
row. There is no causal mask; queries in the padding are computed like the others. The heads' results, side by side, go
through wo. Gradients must be right too (autograd may make them).

    >>> one = torch.eye(2)
    >>> multi_head_attention(torch.tensor([[[0.0, 4.0], [0.0, 0.0]]]), one, one, one, one, 2, torch.tensor([2]))
    tensor([[[0.0000, 4.0000],
             [0.0000, 2.0000]]])
"""

import torch
from torch import Tensor


def multi_head_attention(
    x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, wo: Tensor, heads: int, lengths: Tensor
) -> Tensor:
    b, t, d = x.shape
    q, k, v = ((x @ w.T).view(b, t, heads, d // heads).transpose(1, 2) for w in (wq, wk, wv))
    scores = q @ k.mT / (d // heads) ** 0.5
    hidden = torch.arange(t, device=x.device) >= lengths[:, None]
    weights = scores.masked_fill(hidden[:, None, None, :], -torch.inf).softmax(-1)
    return (weights @ v).transpose(1, 2).reshape(b, t, d) @ wo.T
