"""Softmax over the last dimension, without overflow.

x (…, n), floating point → the same shape and type: exp(x) / sum of exp(x). Numbers as large as 1e4 must work. A row
whose numbers are all −inf (an attention row that may see nothing) gives zeros.

    >>> softmax(torch.tensor([0.0, 1.0, 1.0]))
    tensor([0.1554, 0.4223, 0.4223])
"""

import torch
from torch import Tensor


def softmax(x: Tensor) -> Tensor:
    largest = x.amax(-1, keepdim=True)
    largest = torch.where(largest.isinf(), torch.zeros_like(largest), largest)
    weights = (x - largest).exp()
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total == 0, torch.ones_like(total), total)
