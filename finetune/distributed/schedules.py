"""Pipeline schedules as data: for each stage the order of its forward and backward passes.

    gpipe         all forward passes, then all backward passes                       Huang et al. 2019, arXiv:1811.06965
    1f1b          after p − s forward passes stage s alternates: a backward pass frees what the next forward pass needs,
                  so that a stage holds at most p micro-batches                  Narayanan et al. 2021, arXiv:2006.09503
    interleaved   1f1b with v chunks of layers on every stage, which shrinks the idle start and end by v and sends v
                  times as often                                                 Narayanan et al. 2021, arXiv:2104.04473

`simulate` plays a schedule with given times; `str(step)` is F3 or B3, with several chunks F3.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from finetune.errors import UserError

NAMES = ("gpipe", "1f1b", "interleaved")
Schedule = Literal["gpipe", "1f1b", "interleaved"]


class Step(NamedTuple):
    """A forward (F) or backward (B) pass of one micro-batch through one chunk of a stage."""

    kind: Literal["F", "B"]
    micro: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.kind}{self.micro}" + (f".{self.chunk}" if self.chunk else "")


class Event(NamedTuple):
    """A step that stage `stage` ran from `began` to `ended` (seconds)."""

    stage: int
    step: Step
    began: float
    ended: float


def steps(name: Schedule, stages: int, micro: int, stage: int, chunks: int = 1) -> list[Step]:
    """The passes of one stage, in order. UserError if the schedule does not exist for these numbers."""
    if micro < 1:
        raise UserError(f"a step needs at least one micro-batch, not {micro}")
    if name == "interleaved":
        return interleaved(stages, micro, stage, chunks)
    if chunks != 1:
        raise UserError(f"{name} has one chunk a stage, not {chunks}; only interleaved has several")
    forward, backward = ([Step(kind, m) for m in range(micro)] for kind in "FB")  # type: ignore[arg-type]
    if name == "gpipe":
        return forward + backward
    if name == "1f1b":
        return alternate(forward, backward, min(stages - stage - 1, micro))
    raise UserError(f"schedule '{name}' is not one of {', '.join(NAMES)}")


def interleaved(stages: int, micro: int, stage: int, chunks: int) -> list[Step]:
    """Groups of p micro-batches go through chunk 0, then the same ones through chunk 1, and so on."""
    if chunks < 2 or stages < 2:
        raise UserError(f"interleaved needs 2 stages and 2 chunks at least, not {stages} and {chunks}; use 1f1b")
    if micro % stages:
        raise UserError(
            f"interleaved: {stages} stages do not divide {micro} micro-batches; choose a multiple of {stages}, or 1f1b"
        )
    order = [(m, c) for group in range(0, micro, stages) for c in range(chunks) for m in range(group, group + stages)]
    forward = [Step("F", m, c) for m, c in order]
    backward = [Step("B", m, chunks - 1 - c) for m, c in order]
    ahead = 2 * (stages - stage - 1) + (chunks - 1) * stages
    return alternate(forward, backward, len(forward) if micro == stages else min(ahead, len(forward)))


def alternate(forward: list[Step], backward: list[Step], ahead: int) -> list[Step]:
    """`ahead` forward passes, then one forward and one backward in turn, then the backward passes that are left."""
    pairs = zip(forward[ahead:], backward, strict=False)
    return [*forward[:ahead], *(step for pair in pairs for step in pair), *backward[len(forward) - ahead :]]


def live(schedule: Sequence[Step]) -> int:
    """The most micro-batches whose activations a stage holds at once."""
    held = most = 0
    for step in schedule:
        held += 1 if step.kind == "F" else -1
        most = max(most, held)
    return most


def needs(step: Step, stage: int, stages: int, chunks: int) -> tuple[int, Step] | None:
    """The (stage, step) whose output this one needs from another stage or chunk; None at the ends of the model."""
    if step.kind == "F":
        if stage > 0:
            return stage - 1, step
        return (stages - 1, step._replace(chunk=step.chunk - 1)) if step.chunk > 0 else None
    if stage < stages - 1:
        return stage + 1, step
    if step.chunk < chunks - 1:
        return 0, step._replace(chunk=step.chunk + 1)
    return stage, Step("F", step.micro, step.chunk)


def simulate(schedules: Sequence[Sequence[Step]], forward: float = 1.0, backward: float = 2.0) -> list[Event]:
    """When each step would run if a chunk's passes took these times and sending none. ValueError on a deadlock."""
    stages = len(schedules)
    chunks = 1 + max(step.chunk for schedule in schedules for step in schedule)
    ended: dict[tuple[int, Step], float] = {}
    free, at, events = [0.0] * stages, [0] * stages, []
    while any(at[s] < len(schedules[s]) for s in range(stages)):
        moved = False
        for s in range(stages):
            while at[s] < len(schedules[s]):
                step = schedules[s][at[s]]
                wanted = needs(step, s, stages, chunks)
                if wanted is not None and wanted not in ended:
                    break
                began = max(free[s], ended[wanted] if wanted else 0.0)
                free[s] = ended[s, step] = began + (forward if step.kind == "F" else backward)
                events.append(Event(s, step, began, free[s]))
                at[s] += 1
                moved = True
        if not moved:
            raise ValueError(f"the schedule waits for ever: {[str(schedules[s][at[s]]) for s in range(stages)]}")
    return events


def bubble(events: Sequence[Event], stages: int) -> float:
    """Idle time over busy time, of all stages from the first step's start to the last one's end."""
    busy = sum(e.ended - e.began for e in events)
    span = max(e.ended for e in events) - min(e.began for e in events)
    return (span * stages - busy) / busy


def ideal_bubble(stages: int, micro: int, chunks: int = 1) -> float:
    """(p − 1)/m, with v chunks (p − 1)/(v m) (arXiv:2104.04473, §2.2)."""
    return (stages - 1) / (chunks * micro)
