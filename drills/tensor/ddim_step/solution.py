"""One step of DDIM between any two times.

step(x, epsilon, signal, t, s, eta, noise, clip): x, epsilon, noise of one shape, floating point: the noisy image at
time t, the model's prediction of its noise, and fresh noise. signal (T,) holds ᾱ, the share of the signal's variance,
at the times 0 … T − 1. t and s are ints, t > s ≥ −1, as far apart as one likes; at s = −1, after the last step, ᾱ is
1. eta is a float from 0 (DDIM) to 1 (DDPM); clip a float or None. → x at time s:

x₀ = (x − √(1 − ᾱ_t) ε) / √ᾱ_t. If clip is given, x₀ is limited to [−clip, clip], and ε is then the noise that leads
from this x₀ to x.
σ = eta √((1 − ᾱ_s) / (1 − ᾱ_t)) √(1 − ᾱ_t / ᾱ_s)
x_s = √ᾱ_s x₀ + √(1 − ᾱ_s − σ²) ε + σ noise

    >>> signal, one = torch.tensor([0.9, 0.64, 0.36]), torch.tensor([1.0])
    >>> step(one, one, signal, t=2, s=0, eta=0.0, noise=one, clip=None)
    tensor([0.6325])
    >>> step(one, one, signal, t=2, s=-1, eta=1.0, noise=one, clip=0.25)
    tensor([0.2500])
"""

import torch
from torch import Tensor


def step(
    x: Tensor, epsilon: Tensor, signal: Tensor, t: int, s: int, eta: float, noise: Tensor, clip: float | None
) -> Tensor:
    now = signal[t]
    then = signal[s] if s >= 0 else torch.ones_like(now)
    x0 = (x - (1 - now).sqrt() * epsilon) / now.sqrt()
    if clip is not None:
        x0 = x0.clamp(-clip, clip)
        epsilon = (x - now.sqrt() * x0) / (1 - now).sqrt()
    sigma = eta * ((1 - then) / (1 - now)).sqrt() * (1 - now / then).sqrt()
    return then.sqrt() * x0 + (1 - then - sigma**2).sqrt() * epsilon + sigma * noise
