"""Layer normalization over the last dimension.

x (…, n), weight and bias (n,), all of one type → like x: (x − mean) / √(variance + eps) · weight + bias, with the
variance that divides by n. A mean of 1e4 with a deviation of 1 must work; in bfloat16 the sums are taken in fp32. A row
of equal numbers gives the bias. Gradients must be right too (autograd may make them). Do not call torch's layer_norm.

    >>> layer_norm(torch.tensor([[1.0, 3.0]]), torch.tensor([1.0, 2.0]), torch.tensor([0.0, 10.0]))
    tensor([[-1.0000, 12.0000]])
"""

import torch
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centered = wide - wide.mean(-1, keepdim=True)
    variance = centered.square().mean(-1, keepdim=True)
    normed = centered * (variance + eps).rsqrt()
    return (normed * weight + bias).to(x.dtype)
