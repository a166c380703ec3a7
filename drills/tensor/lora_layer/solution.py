"""A linear layer with a low-rank adapter that can be merged.

LoRALinear(weight, bias, rank, alpha): weight (out, in), bias (out,) or None. The layer keeps copies, which are not
trained. Its only trained parameters are `a` (rank, in) and `b` (out, rank), of the type of weight; at the start the
layer computes what the linear layer alone does, and `b` gets a gradient.

forward(x), x (…, in) → (…, out): x weightᵀ + bias + alpha / rank · x aᵀ bᵀ
merge() adds the adapter to the layer's weight, unmerge() takes it off again; what forward gives stays the same. A
second call of the same does nothing.

    >>> layer = LoRALinear(torch.ones(1, 2), None, rank=2, alpha=4)
    >>> layer.a.data, layer.b.data = torch.eye(2), torch.tensor([[1.0, 10.0]])
    >>> layer(torch.tensor([1.0, 1.0])).detach()
    tensor([24.])
"""

import torch
from torch import Tensor


class LoRALinear(torch.nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor | None, rank: int, alpha: float) -> None:
        super().__init__()
        self.register_buffer("weight", weight.clone())
        self.register_buffer("bias", None if bias is None else bias.clone())
        self.a = torch.nn.Parameter(torch.randn(rank, weight.shape[1], dtype=weight.dtype) / rank)
        self.b = torch.nn.Parameter(torch.zeros(weight.shape[0], rank, dtype=weight.dtype))
        self.scale = alpha / rank
        self.merged = False

    def forward(self, x: Tensor) -> Tensor:
        y = torch.nn.functional.linear(x, self.weight, self.bias)
        return y if self.merged else y + self.scale * (x @ self.a.T @ self.b.T)

    def merge(self) -> None:
        if not self.merged:
            self.weight += self.scale * (self.b @ self.a).detach()
        self.merged = True

    def unmerge(self) -> None:
        if self.merged:
            self.weight -= self.scale * (self.b @ self.a).detach()
        self.merged = False
