"""The interface of a deep RL algorithm: what a loop needs to train, evaluate and checkpoint it."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

Batch = TypeVar("Batch", contravariant=True)  # Transitions of a replay or of logged data, or a Rollout


class Learner(Protocol[Batch]):
    def act(self, observations: Tensor, rng: torch.Generator) -> Tensor:
        """Actions sampled from the policy that is learned."""

    def greedy(self, observations: Tensor) -> Tensor:
        """The policy's actions without its noise."""

    def update(self, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        """One update of all networks; the figures to log, each a tensor of one number."""

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint saves: name → network, optimizer, or a dict of tensors and numbers (`run.steps`)."""
