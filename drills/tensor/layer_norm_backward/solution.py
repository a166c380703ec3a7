"""The backward pass of a layer norm, by hand.

x and dy (…, n), weight (n,) → (dx like x, dweight (n,), dbias (n,)): the gradients of Σ dy·y, where y = x̂·weight + bias
and x̂ = (x − mean) / √(variance + eps) over the last dimension; the variance divides by n. Do not call autograd.

    >>> layer_norm_backward(torch.tensor([[0.0, 1.0, 2.0]]), torch.ones(3), torch.tensor([[1.0, 0.0, 0.0]]), eps=0.0)
    (tensor([[ 0.2041, -0.4082,  0.2041]]), tensor([-1.2247,  0.0000,  0.0000]), tensor([1., 0., 0.]))
"""

from torch import Tensor


def layer_norm_backward(x: Tensor, weight: Tensor, dy: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor, Tensor]:
    centered = x - x.mean(-1, keepdim=True)
    rstd = (centered.square().mean(-1, keepdim=True) + eps).rsqrt()
    normed = centered * rstd
    g = dy * weight
    dx = rstd * (g - g.mean(-1, keepdim=True) - normed * (g * normed).mean(-1, keepdim=True))
    n = x.shape[-1]
    return dx, (dy * normed).reshape(-1, n).sum(0), dy.reshape(-1, n).sum(0)
