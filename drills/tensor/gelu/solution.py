"""GELU and its derivative, exact and with tanh.

x of any shape, floating point → (y, dy/dx), like x, element by element. Exact: y = x·Φ(x), where Φ is the distribution
function of the normal distribution. With tanh=True: y = x/2·(1 + tanh(√(2/π)·(x + 0.044715·x³))), and the derivative of
exactly this. Numbers as large as ±1e4 must work. torch.erf may be called; autograd and torch's gelu may not.

    >>> gelu(torch.tensor([1.0]))
    (tensor([0.8413]), tensor([1.0833]))
    >>> gelu(torch.tensor([1.0]), tanh=True)
    (tensor([0.8412]), tensor([1.0830]))
"""

import math

import torch
from torch import Tensor


def gelu(x: Tensor, tanh: bool = False) -> tuple[Tensor, Tensor]:
    if tanh:
        c = math.sqrt(2 / math.pi)
        t = torch.tanh(c * (x + 0.044715 * x**3))
        slope = c * (1 + 3 * 0.044715 * x**2)
        return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * slope
    phi = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return x * phi, phi + x * density
