"""The analytic oracle: a mixture of isotropic Gaussians, whose denoiser is known in closed form at every σ."""

from __future__ import annotations

from torch import Tensor


def denoise(x: Tensor, sigma: float, weights: Tensor, means: Tensor, scale: float) -> Tensor:
    """E[x₀ | x₀ + σ ε = x], (N, D), for x₀ from Σ_k weights_k N(means_k, scale² I); weights (K,), means (K, D)."""
    total = scale**2 + sigma**2
    distance = ((x[:, None] - means) ** 2).sum(-1)  # (N, K)
    posterior = (weights.log() - distance / (2 * total)).softmax(-1)
    return (scale**2 * x + sigma**2 * (posterior @ means)) / total
