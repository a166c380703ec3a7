"""A transformer block, with the norms before or after.

x (t, d). weights: a dict with wq, wk, wv, wo (d, d), up (h, d), down (d, h), stored (outputs, inputs) and applied as in
nn.Linear without bias, and norm1, norm2 (d,) → (t, d).

attend(z): one causal head, softmax((wq z)(wk z)ᵀ / √d)(wv z), through wo. feed(z): down applied to relu(up z).
norm(z, weight) = z / √(mean of z² + 1e-6)·weight.

With pre=True (GPT-2, Llama): x + attend(norm(x, norm1)), and of the result y: y + feed(norm(y, norm2)).
With pre=False (the first Transformer): norm(x + attend(x), norm1), and of the result y: norm(y + feed(y), norm2).
Gradients must be right too (autograd may make them).

    >>> one = torch.ones(1, 1)
    >>> weights = dict.fromkeys(("wq", "wk", "wv", "wo", "up", "down"), one) | {"norm1": one[0], "norm2": one[0]}
    >>> block(torch.tensor([[3.0]]), weights, pre=True), block(torch.tensor([[3.0]]), weights, pre=False)
    (tensor([[5.]]), tensor([[1.0000]]))
"""

import torch
from torch import Tensor


def block(x: Tensor, weights: dict[str, Tensor], pre: bool) -> Tensor:
    if pre:
        x = x + attend(norm(x, weights["norm1"]), weights)
        return x + feed(norm(x, weights["norm2"]), weights)
    x = norm(x + attend(x, weights), weights["norm1"])
    return norm(x + feed(x, weights), weights["norm2"])


def norm(z: Tensor, weight: Tensor) -> Tensor:
    return z * (z.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


def attend(z: Tensor, weights: dict[str, Tensor]) -> Tensor:
    q, k, v = (z @ weights[name].T for name in ("wq", "wk", "wv"))
    hidden = torch.ones(len(z), len(z), dtype=torch.bool, device=z.device).triu(1)
    scores = (q @ k.T / z.shape[1] ** 0.5).masked_fill(hidden, -torch.inf)
    return scores.softmax(-1) @ v @ weights["wo"].T


def feed(z: Tensor, weights: dict[str, Tensor]) -> Tensor:
    return torch.relu(z @ weights["up"].T) @ weights["down"].T
