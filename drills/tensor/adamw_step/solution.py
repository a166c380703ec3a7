"""One step of AdamW.

p, g, m, v of one shape (weights, gradient, first and second moment), step counted from 1 → new (p, m, v):
m = β1·m + (1 − β1)·g and v = β2·v + (1 − β2)·g²; both are divided by 1 − β^step to undo their start at 0, giving m̂ and
v̂; p is multiplied by 1 − lr·weight_decay (decoupled decay: it is not in the moments), and lr·m̂ / (√v̂ + eps) is
subtracted. The m and v that are returned are not corrected. Do not call torch.optim.

    >>> p, m, v = adamw_step(torch.tensor([1.0]), torch.tensor([3.0]), torch.zeros(1), torch.zeros(1), step=1, lr=0.1)
    >>> p, m, v
    (tensor([0.8990]), tensor([0.3000]), tensor([0.0090]))
"""

from torch import Tensor


def adamw_step(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, lr: float = 1e-3, beta1: float = 0.9,
    beta2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.01,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    m_hat = m / (1 - beta1**step)
    v_hat = v / (1 - beta2**step)
    return p * (1 - lr * weight_decay) - lr * m_hat / (v_hat.sqrt() + eps), m, v
