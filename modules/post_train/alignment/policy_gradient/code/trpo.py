"""The natural gradient F⁻¹ g by conjugate gradients, and TRPO's step: as far as the KL allows and the surrogate rises.

F, the Fisher matrix of the policy, is the Hessian of KL(π_θ ‖ π_θ') at θ' = θ: F v comes from two backward passes and F
is never built. `distribution` maps a flat parameter vector to the policy's parameters on a batch of observations.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Distribution = Callable[[Tensor], Tensor]
Divergence = Callable[[Tensor, Tensor], Tensor]


def fisher_product(distribution: Distribution, kl: Divergence, theta: Tensor, damping: float = 0.0):
    """v ↦ (F + damping) v at theta."""
    at = theta.detach().clone().requires_grad_()
    here = distribution(at)
    (slope,) = torch.autograd.grad(kl(here.detach(), here).mean(), at, create_graph=True)

    def product(v: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(slope @ v, at, retain_graph=True)
        return found + damping * v

    return product


def conjugate_gradient(
    product: Callable[[Tensor], Tensor], b: Tensor, iterations: int, tolerance: float = 1e-10
) -> Tensor:
    """x with product(x) = b, for a symmetric positive product (Hestenes & Stiefel 1952)."""
    x, r = torch.zeros_like(b), b.clone()
    p, rr = r.clone(), r @ r
    for _ in range(iterations):
        if rr <= tolerance**2 * (b @ b):
            break
        Ap = product(p)
        alpha = rr / (p @ Ap)
        x = x + alpha * p
        r = r - alpha * Ap
        rr, before = r @ r, rr
        p = r + rr / before * p
    return x


def natural_direction(
    distribution: Distribution, kl: Divergence, theta: Tensor, gradient: Tensor, damping: float, iterations: int
) -> tuple[Tensor, Tensor]:
    """x ≈ (F + damping)⁻¹ g and xᵀ (F + damping) x: half of it is the KL of the whole step x, to second order."""
    product = fisher_product(distribution, kl, theta, damping)
    x = conjugate_gradient(product, gradient, iterations)
    return x, x @ product(x)


def line_search(
    surrogate: Callable[[Tensor], Tensor], divergence: Callable[[Tensor], Tensor], theta: Tensor, step: Tensor,
    delta: float, shrink: float = 0.8, most: int = 15,
) -> tuple[Tensor, float]:  # fmt: skip
    """The longest of step · shrink^k that raises the surrogate with a KL of at most delta; theta itself if none does.
    Returns the new parameters and the part of the step that was taken."""
    before = surrogate(theta)
    for k in range(most):
        tried = theta + shrink**k * step
        if divergence(tried) <= delta and surrogate(tried) > before:
            return tried, shrink**k
    return theta, 0.0


def flat(parameters) -> Tensor:
    return nn.utils.parameters_to_vector(parameters).detach()


def functional(module: nn.Module, observations: Tensor) -> Distribution:
    """The module as a function of its flat parameters."""
    names, shapes = zip(*((n, p.shape) for n, p in module.named_parameters()), strict=True)
    counts = [shape.numel() for shape in shapes]

    def distribution(theta: Tensor) -> Tensor:
        parts = [part.view(shape) for part, shape in zip(theta.split(counts), shapes, strict=True)]
        return torch.func.functional_call(module, dict(zip(names, parts, strict=True)), (observations,))

    return distribution
