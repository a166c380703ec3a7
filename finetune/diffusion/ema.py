"""The exponential moving average of a model's weights, which is what diffusion models are sampled with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Ema:
    """Average of a model's parameters: θ̄ ← d θ̄ + (1 − d) θ after each step, in fp32.

    The decay warms up, d = min(decay, (1 + n) / (10 + n)) in update n = 1, 2, …, so that the first, random weights are
    forgotten soon. Buffers are not averaged.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"Ema: decay={decay} is not in [0, 1)")
        self.model, self.decay, self.updates = model, decay, 0
        self.average = {name: p.detach().float().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """Takes the model's present weights into the average."""
        self.updates += 1
        rate = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, p in self.model.named_parameters():
            self.average[name].lerp_(p.float(), rate)

    @contextmanager
    def swapped(self) -> Iterator[nn.Module]:
        """Context in which the model has the averaged weights; afterwards its own, to the bit."""
        own = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self._load(self.average)
        try:
            yield self.model
        finally:
            self._load(own)

    @torch.no_grad()
    def _load(self, weights: dict[str, Tensor]) -> None:
        for name, p in self.model.named_parameters():
            p.copy_(weights[name])

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores every bit. KeyError, RuntimeError for the weights of another model."""
        self.updates = state["updates"]
        for name, kept in self.average.items():
            kept.copy_(state["average"][name])
