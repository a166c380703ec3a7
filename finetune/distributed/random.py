"""Random streams by rank: which ranks must draw the same numbers, and which different ones (Megatron-LM's tracker).

    stream   drawn from (seed, …)        for
    whole    pp, dp, cp                  dropout of what every rank of tp has whole: all must drop the same elements
    split    pp, dp, cp, tp              dropout of what the ranks of tp share out: each drops its own

A stream is a generator with its own state: what one draws changes nothing for another, nor for torch's global one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from finetune.distributed.mesh import Layout
from finetune.runs.run import stable_hash

STREAMS = {"whole": ("pp", "dp", "cp"), "split": ("pp", "dp", "cp", "tp")}


def seeds(layout: Layout, rank: int, seed: int) -> dict[str, int]:
    """The seed of every stream of a rank."""
    place = layout.place(rank)
    return {name: stable_hash(seed, name, *(place[dim] for dim in dims)) for name, dims in STREAMS.items()}


class Streams:
    """The generators of a rank. `restart` puts them at the beginning of a step."""

    def __init__(self, layout: Layout, rank: int, seed: int) -> None:
        self.seeds = seeds(layout, rank, seed)
        self.generators = {name: torch.Generator() for name in STREAMS}
        self.restart(0)

    def restart(self, step: int) -> None:
        """A function of (seed, step), so that a resumed run draws the same numbers."""
        for name, generator in self.generators.items():
            generator.manual_seed(stable_hash(self.seeds[name], step))

    def dropout(self, x: Tensor, p: float, stream: str) -> Tensor:
        """x with elements set to 0 with probability p, the others divided by 1 − p."""
        kept = torch.empty_like(x).bernoulli_(1 - p, generator=self.generators[stream])
        return x * kept / (1 - p)

    @contextmanager
    def again(self, states: dict[str, Tensor]) -> Iterator[None]:
        """Context in which the streams draw once more what they drew from `states` on; they go on where they were."""
        now = self.states()
        self.set(states)
        try:
            yield
        finally:
            self.set(now)

    def states(self) -> dict[str, Tensor]:
        return {name: generator.get_state() for name, generator in self.generators.items()}

    def set(self, states: dict[str, Any]) -> None:
        for name, state in states.items():
            self.generators[name].set_state(state)
