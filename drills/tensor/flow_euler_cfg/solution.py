"""Euler's method for a flow model with classifier-free guidance.

sample(velocity, noise, labels, null, scale, steps, shift): velocity(x, t, labels) is the model, x (b, d) floating
point, t (b,) of x's type, labels (b,) int64 → (b, d), the derivative of x by t. At time t, x is (1 − t) · data + t ·
noise. noise (b, d) is x at t = 1; the result is x at t = 0.
The times are steps + 1 numbers at equal distances from 1 to 0, each of them then moved to
shift · t / (1 + (shift − 1) · t). In every step the velocity is taken at the time where the step begins.
The guided velocity is u + scale · (v − u), where v has the labels and u has the int null for every label.

    >>> def velocity(x, t, labels):
    ...     return x + t[:, None] + labels[:, None]
    >>> one = torch.ones(1, 1)
    >>> sample(velocity, one, torch.tensor([1]), null=0, scale=2.0, steps=1, shift=1.0)
    tensor([[-3.]])
    >>> sample(velocity, one, torch.tensor([1]), null=0, scale=1.0, steps=2, shift=3.0)
    tensor([[-1.2500]])
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor


def sample(
    velocity: Callable[[Tensor, Tensor, Tensor], Tensor],
    noise: Tensor,
    labels: Tensor,
    null: int,
    scale: float,
    steps: int,
    shift: float,
) -> Tensor:
    times = torch.linspace(1, 0, steps + 1, dtype=noise.dtype)
    times = shift * times / (1 + (shift - 1) * times)
    x, nothing = noise, torch.full_like(labels, null)
    for now, then in pairwise(times):
        t = now.expand(len(x))
        v, u = velocity(x, t, labels), velocity(x, t, nothing)
        x = x + (then - now) * (u + scale * (v - u))
    return x
