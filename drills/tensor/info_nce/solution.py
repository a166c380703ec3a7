"""The contrastive losses of CLIP and SigLIP.

images, texts (n, d) floating point, where row i of one belongs to row i of the other, no row zero; log_scale and bias
scalars (tensors). Similarities are s[i, j] = exp(log_scale) · cos(images[i], texts[j]).
info_nce(images, texts, log_scale) → a scalar: half the sum of two cross entropies, each a mean over n: of every image
among all texts, and of every text among all images.
siglip(images, texts, log_scale, bias) → a scalar: the sum over all n² pairs of −log σ(z (s[i, j] + bias)), where z is 1
for i = j and −1 otherwise, divided by n. It is finite for s of ±1e3.

    >>> x, zero = torch.eye(2) * 3, torch.tensor(0.0)
    >>> info_nce(x, x, zero), siglip(x, x, zero, zero)
    (tensor(0.3133), tensor(1.0064))
"""

import torch
from torch import Tensor
from torch.nn import functional


def info_nce(images: Tensor, texts: Tensor, log_scale: Tensor) -> Tensor:
    s = similarities(images, texts, log_scale)
    own = torch.arange(len(s), device=s.device)
    return (functional.cross_entropy(s, own) + functional.cross_entropy(s.T, own)) / 2


def siglip(images: Tensor, texts: Tensor, log_scale: Tensor, bias: Tensor) -> Tensor:
    s = similarities(images, texts, log_scale) + bias
    z = 2 * torch.eye(len(s), dtype=s.dtype, device=s.device) - 1
    return -functional.logsigmoid(z * s).sum() / len(s)


def similarities(images: Tensor, texts: Tensor, log_scale: Tensor) -> Tensor:
    return log_scale.exp() * functional.normalize(images, dim=1) @ functional.normalize(texts, dim=1).T
