"""The pipeline: runs a schedule on this stage, sends activations to the next stage and gradients to the one before."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from finetune.distributed.collectives import Group, Pending
from finetune.distributed.schedules import Event, Step


class Work(NamedTuple):
    """What a stage computes.

    forward(chunk, micro, x): x is None on the first chunk of the model; the last one returns its loss, a scalar.
    shape(chunk, micro): of the x that a chunk is sent.
    """

    forward: Callable[[int, int, Tensor | None], Tensor]
    shape: Callable[[int, int], Sequence[int]]
    dtype: torch.dtype = torch.float32


class Played(NamedTuple):
    """What a schedule left: the losses of the last chunk by micro-batch, the trace, the most micro-batches held."""

    losses: dict[int, Tensor]
    trace: list[Event]
    live: int


def play(schedule: Sequence[Step], group: Group, work: Work, chunks: int = 1) -> Played:
    """Runs the steps of this stage (this rank's place in `group`). Gradients of parameters are left in `.grad`.

    Sends never wait for their receiver, and messages are told apart by tags, so that no order of steps deadlocks that
    `schedules.simulate` gets through.
    """
    stage, stages = group.rank, group.size
    held: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}
    losses: dict[int, Tensor] = {}
    trace: list[Event] = []
    sent: list[tuple[Pending, Tensor]] = []  # a tensor must live until it has gone
    most = 0

    def tag(step: Step, chunk: int, at: int) -> int:
        """A number of (kind, micro-batch, the chunk and stage that it goes to)."""
        return ((step.micro * chunks + chunk) * stages + at) * 2 + (step.kind == "B")

    def send(x: Tensor, step: Step, to: int, chunk: int) -> None:
        x = x.detach().contiguous()
        sent.append((group.send(x, to, tag(step, chunk, to)), x))

    for step in schedule:
        _, micro, chunk = step
        first, last = stage == 0 and chunk == 0, stage == stages - 1 and chunk == chunks - 1
        if step.kind == "F":
            x = None
            if not first:
                x = torch.empty(*work.shape(chunk, micro), dtype=work.dtype)
                group.receive(x, (stage - 1) % stages, tag(step, chunk, stage))
                x.requires_grad_()
            began = time.perf_counter()
            y = work.forward(chunk, micro, x)
            trace.append(Event(stage, step, began, time.perf_counter()))
            held[micro, chunk] = x, y
            most = max(most, len(held))
            if last:
                losses[micro] = y.detach()
            else:
                send(y, step, (stage + 1) % stages, chunk + (stage == stages - 1))
        else:
            x, y = held.pop((micro, chunk))
            dy: Any = None
            if not last:
                dy = torch.empty_like(y)
                group.receive(dy, (stage + 1) % stages, tag(step, chunk, stage))
            began = time.perf_counter()
            torch.autograd.backward(y, dy)
            trace.append(Event(stage, step, began, time.perf_counter()))
            if x is not None:
                assert x.grad is not None, "a stage's input got no gradient"
                send(x.grad, step, (stage - 1) % stages, chunk - (stage == 0))
    for pending, _ in sent:
        pending.wait()
    return Played(losses, trace, most)
