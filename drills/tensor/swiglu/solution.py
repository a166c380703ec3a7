"""The SwiGLU feed-forward layer, and its width.

swiglu: x (…, d), gate and up (h, d), down (d, h), weights stored (outputs, inputs) as in nn.Linear → (…, d): down
applied to silu(gate x) ⊙ (up x), with silu(z) = z·sigmoid(z). Gradients must be right and finite too (autograd may make
them), also where gate x is −1000.

hidden_size: the width h that Llama uses for a model of width d: 8d/3 rounded down to an integer, then rounded up to a
multiple of `multiple`.

    >>> swiglu(torch.tensor([2.0]), torch.tensor([[1.0]]), torch.tensor([[3.0]]), torch.tensor([[1.0]]))
    tensor([10.5696])
    >>> hidden_size(4096, 256)
    11008
"""

import torch
from torch import Tensor


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    z = x @ gate.T
    return (z * torch.sigmoid(z) * (x @ up.T)) @ down.T


def hidden_size(d: int, multiple: int = 256) -> int:
    return -(-(8 * d // 3) // multiple) * multiple
