"""The reference that follows the policy: TR-DPO (Gorbatovski et al. 2024, arXiv:2404.09656)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from finetune.alignment import logprobs
from finetune.lm.llama import Llama


class MovingReference:
    """The policy as it was when it was last taken over, whole or mixed in. Only the trained tensors are held twice;
    they change places with the policy's for a forward pass."""

    def __init__(self, model: Llama, trained: dict[str, torch.nn.Parameter]) -> None:
        self.model, self.trained = model, trained
        self.values = {name: p.detach().clone() for name, p in trained.items()}

    @torch.no_grad()
    def update(self, mix: float) -> None:
        """values ← mix · policy + (1 − mix) · values."""
        for name, p in self.trained.items():
            self.values[name].lerp_(p, mix)

    @contextmanager
    def standing(self) -> Iterator[Llama]:
        """Context in which the model it yields is the reference, without dropout."""
        own = {name: p.data for name, p in self.trained.items()}
        for name, p in self.trained.items():
            p.data = self.values[name]
        try:
            with logprobs.evaluated(self.model):
                yield self.model
        finally:
            for name, p in self.trained.items():
                p.data = own[name]
