import copy

import torch
from torch import nn


class LoRALinear(nn.Module):
    def __init__(self, weight, bias, rank, alpha):
        super().__init__()
        self.base = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
        self.base.weight.data = weight.detach().clone()
        if bias is not None:
            self.base.bias.data = bias.detach().clone()
        self.base.requires_grad_(False)
        self.a = nn.Parameter(torch.empty(rank, weight.shape[1], dtype=weight.dtype))
        self.b = nn.Parameter(torch.zeros(weight.shape[0], rank, dtype=weight.dtype))
        nn.init.kaiming_uniform_(self.a, a=5**0.5)
        self.factor, self.kept = alpha / rank, None

    def forward(self, x):
        y = self.base(x)
        if self.kept is None:
            y = y + nn.functional.linear(nn.functional.linear(x, self.a) * self.factor, self.b)
        return y

    @torch.no_grad()
    def merge(self):
        if self.kept is None:
            self.kept = copy.deepcopy(self.base.weight.data)
            self.base.weight.add_(self.b @ self.a, alpha=self.factor)

    def unmerge(self):
        if self.kept is not None:
            self.base.weight.data, self.kept = self.kept, None
