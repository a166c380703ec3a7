"""The orthogonalization of Muon: five steps of a Newton-Schulz iteration.

g (n, m), fp32 → like g, with singular values near 1. X starts as g divided by its Frobenius norm plus 1e-7; each step
is X ← a·X + (b·A + c·A²)·X with A = X Xᵀ and (a, b, c) = (3.4445, −4.7750, 2.0315). A matrix with more rows than
columns is iterated transposed and transposed back, so that A is never larger than min(n, m)². A matrix of zeros gives
zeros.

No tensor may have more elements than g.

    >>> newton_schulz(torch.diag(torch.tensor([3.0, 4.0])), steps=1)
    tensor([[1.1933, 0.0000],
            [0.0000, 0.9765]])
"""

from torch import Tensor


def newton_schulz(g: Tensor, steps: int = 5) -> Tensor:
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[0] > g.shape[1]
    x = g.T if tall else g
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x
