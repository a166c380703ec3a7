"""RMSNorm over the last dimension, forward and backward by hand.

x and dy (…, n), weight (n,). rms_norm gives y like x: x / √(mean of x² + eps) · weight. rms_norm_backward gives
(dx like x, dweight (n,)), the gradients of Σ dy·y. A row of zeros gives zeros and has a gradient. Do not call autograd
or torch's rms_norm.

    >>> rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0]))
    tensor([[0.8485, 2.2627]])
    >>> rms_norm_backward(torch.tensor([[3.0, 4.0]]), torch.ones(2), torch.tensor([[1.0, 0.0]]))
    (tensor([[ 0.1810, -0.1358]]), tensor([0.8485, 0.0000]))
"""

from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def rms_norm_backward(x: Tensor, weight: Tensor, dy: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    scale = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    normed = x * scale
    g = dy * weight
    dx = scale * (g - normed * (g * normed).mean(-1, keepdim=True))
    return dx, (dy * normed).flatten(0, -2).sum(0) if x.dim() > 1 else dy * normed
