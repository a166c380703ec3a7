"""Policies and values as small networks. A policy's distribution is a tensor of parameters, on which functions work:
log π of the classes (…, A) of a Categorical, (mean, log deviation) side by side (…, 2 A) of a Gaussian."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn


def mlp(sizes: list[int], last_scale: float = 1.0) -> nn.Sequential:
    """Linear layers with tanh between; orthogonal weights, those of the last layer scaled, biases 0."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(sizes)):
        layer = nn.Linear(a, b)
        last = i == len(sizes) - 2
        nn.init.orthogonal_(layer.weight, last_scale if last else math.sqrt(2))
        nn.init.zeros_(layer.bias)
        layers += [layer] if last else [layer, nn.Tanh()]
    return nn.Sequential(*layers)


class Ensemble(nn.Module):
    """`count` independent networks with ReLU between their layers, computed together: one batched product a layer."""

    def __init__(self, count: int, widths: list[int]) -> None:
        super().__init__()
        self.count = count
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for a, b in pairwise(widths):
            bound = 1 / math.sqrt(a)  # torch's own for nn.Linear
            self.weights.append(nn.Parameter(torch.empty(count, a, b).uniform_(-bound, bound)))
            self.biases.append(nn.Parameter(torch.empty(count, 1, b).uniform_(-bound, bound)))

    def forward(self, x: Tensor) -> Tensor:
        """(count, N, first width) → (count, N, last width)."""
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x.relu() if i else x, weight)
        return x


class Categorical(nn.Module):
    def __init__(self, observations: int, actions: int, hidden: list[int]) -> None:
        super().__init__()
        self.net = mlp([observations, *hidden, actions], last_scale=0.01)

    def forward(self, observations: Tensor) -> Tensor:
        return self.net(observations).log_softmax(-1)

    @staticmethod
    def draw(params: Tensor, generator: torch.Generator) -> Tensor:
        """One action for each distribution: the inverse of the cumulative probability."""
        uniform = torch.rand(params.shape[:-1], generator=generator)
        below = params.exp().cumsum(-1)[..., :-1] <= uniform[..., None]
        return below.sum(-1)

    @staticmethod
    def best(params: Tensor) -> Tensor:
        return params.argmax(-1)

    @staticmethod
    def log_prob(params: Tensor, actions: Tensor) -> Tensor:
        return params.gather(-1, actions[..., None])[..., 0]

    @staticmethod
    def entropy(params: Tensor) -> Tensor:
        return -(params.exp() * params).sum(-1)

    @staticmethod
    def kl(old: Tensor, new: Tensor) -> Tensor:
        """KL(old ‖ new)"""
        return (old.exp() * (old - new)).sum(-1)


class Gaussian(nn.Module):
    """Independent normal actions; the deviations do not depend on the observation."""

    def __init__(self, observations: int, actions: int, hidden: list[int]) -> None:
        super().__init__()
        self.net = mlp([observations, *hidden, actions], last_scale=0.01)
        self.log_deviation = nn.Parameter(torch.zeros(actions))

    def forward(self, observations: Tensor) -> Tensor:
        mean = self.net(observations)
        return torch.cat([mean, self.log_deviation.expand_as(mean)], -1)

    @staticmethod
    def draw(params: Tensor, generator: torch.Generator) -> Tensor:
        mean, log_deviation = params.chunk(2, -1)
        return mean + log_deviation.exp() * torch.randn(mean.shape, generator=generator)

    @staticmethod
    def best(params: Tensor) -> Tensor:
        return params.chunk(2, -1)[0]

    @staticmethod
    def log_prob(params: Tensor, actions: Tensor) -> Tensor:
        mean, log_deviation = params.chunk(2, -1)
        z = (actions - mean) * torch.exp(-log_deviation)
        return (-0.5 * z.square() - log_deviation - 0.5 * math.log(2 * math.pi)).sum(-1)

    @staticmethod
    def entropy(params: Tensor) -> Tensor:
        return (params.chunk(2, -1)[1] + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)

    @staticmethod
    def kl(old: Tensor, new: Tensor) -> Tensor:
        """KL(old ‖ new)"""
        (m0, s0), (m1, s1) = old.chunk(2, -1), new.chunk(2, -1)
        return (s1 - s0 + ((2 * s0).exp() + (m0 - m1).square()) / (2 * (2 * s1).exp()) - 0.5).sum(-1)


class Value(nn.Module):
    def __init__(self, observations: int, hidden: list[int]) -> None:
        super().__init__()
        self.net = mlp([observations, *hidden, 1])

    def forward(self, observations: Tensor) -> Tensor:
        return self.net(observations)[..., 0]
