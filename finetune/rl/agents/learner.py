"""The interface of a deep RL algorithm: what a loop needs to train, evaluate and checkpoint it.

A learner with exploration also has `greedy(observations)`, the policy's actions without it. One of logged data is an
`OfflineLearner` (offline.py), which adds its own estimates of values.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

Batch = TypeVar("Batch", contravariant=True)  # Transitions of a replay or of logged data, or a Rollout


@runtime_checkable
class Learner(Protocol[Batch]):
    def act(self, observations: Tensor, rng: torch.Generator) -> Tensor:
        """Actions (N,) or (N, A) of the policy that is learned, for observations (N, D)."""

    def update(self, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        """One update of all networks; the figures to log, each a tensor of one number."""

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint saves: name → network, optimizer, or a dict of tensors and numbers (`run.steps`)."""


def mean_metrics(metrics: list[dict[str, Tensor]]) -> dict[str, float]:
    """Means over several updates. A figure that not every update has is averaged over those that have it."""
    names = dict.fromkeys(name for each in metrics for name in each)
    return {name: float(torch.stack([each[name] for each in metrics if name in each]).mean()) for name in names}
