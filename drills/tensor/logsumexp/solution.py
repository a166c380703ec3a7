"""The logarithm of a sum of exponentials, over the last dimension.

x (…, n), floating point, n ≥ 1 → (…), of the same type: log of the sum of exp(x). Numbers as large as ±1e4 must work. A
row whose numbers are all −inf gives −inf, a row with +inf in it gives +inf. Gradients must be right where all numbers
are finite. Do not call torch.logsumexp or torch.logaddexp.

    >>> logsumexp(torch.tensor([[0.0, 0.0], [3.0, -torch.inf]]))
    tensor([0.6931, 3.0000])
"""

import torch
from torch import Tensor


def logsumexp(x: Tensor) -> Tensor:
    largest = x.amax(-1, keepdim=True)
    largest = torch.where(largest.isinf(), torch.zeros_like(largest), largest)
    return (x - largest).exp().sum(-1).log() + largest.squeeze(-1)
