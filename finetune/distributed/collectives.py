"""Collectives that are counted, leave a trail, and name themselves when they fail.

A `Group` is some ranks that talk to each other. Every call adds to `Counts` (calls, and the bytes that a rank sends),
and is written to the rank's `Trail` before it starts, so that the one who waits for a dead rank can say where it was.
With `Trail.check` the ranks first compare what they are about to call: a call that differs is an error on all of them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

MAX, SUM = dist.ReduceOp.MAX, dist.ReduceOp.SUM


class CollectiveError(RuntimeError):
    """A collective that failed: the message names rank, call, shape and group."""


class Counts:
    """Calls and bytes by (kind, group). Bytes are those that one rank sends with ring algorithms, `wire`."""

    def __init__(self) -> None:
        self.calls: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()

    def add(self, kind: str, group: str, size: int, message: int) -> None:
        self.calls[kind, group] += 1
        self.bytes[kind, group] += wire(kind, size, message)

    def clear(self) -> None:
        self.calls.clear()
        self.bytes.clear()


def wire(kind: str, size: int, message: int) -> int:
    """Bytes that each of `size` ranks sends: with a ring (size − 1)/size of the whole tensor of `message` bytes, twice
    that for an all-reduce, which is a reduce-scatter and an all-gather (Thakur et al. 2005, §4)."""
    share = message * (size - 1) // size
    return {"all_reduce": 2 * share, "all_gather": share, "reduce_scatter": share, "all_to_all": share}.get(
        kind, message
    )


class Trail:
    """Where a rank is: its latest collective, as text in memory that whoever started it can read.

    check: before each collective the ranks of the group compare call, shape and dtype.
    """

    def __init__(self, memory: Any = None, check: bool = False) -> None:
        self.memory, self.check, self.calls = memory, check, 0

    def write(self, text: str) -> None:
        self.calls += 1
        if self.memory is not None:
            line = f"{text} (its call {self.calls})".encode()[: len(self.memory) - 1]
            self.memory[: len(line) + 1] = line + b"\0"


class Pending:
    """A collective that was started: `wait` returns when its tensor is complete."""

    def __init__(self, wait: Callable[[], Any], what: Callable[[], Any]) -> None:
        self._wait, self._what = wait, what

    def wait(self) -> None:
        with self._what():
            self._wait()


class Group:
    """Ranks that talk to each other; `rank` is this one's place among `ranks`. Alone, every call returns its input."""

    def __init__(
        self, name: str, ranks: list[int], group: dist.ProcessGroup | None, counts: Counts, trail: Trail
    ) -> None:
        self.name, self.ranks, self.group, self.counts, self.trail = name, list(ranks), group, counts, trail
        self.size, self.rank = len(ranks), ranks.index(dist.get_rank()) if dist.is_initialized() else 0
        self.seconds = 0.0  # spent in calls that wait

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def last(self) -> bool:
        return self.rank == self.size - 1

    # --- over all ranks of the group

    def all_reduce(self, x: Tensor, op: Any = SUM) -> Tensor:
        """x summed (or the maximum) over the ranks, in place."""
        if self.size > 1:
            with self._call("all_reduce", x, x.nbytes):
                dist.all_reduce(x, op, group=self.group)
        return x

    def start_all_reduce(self, x: Tensor) -> Pending | None:
        """`all_reduce` in the background; x may be used after `wait`."""
        if self.size == 1:
            return None
        with self._call("all_reduce", x, x.nbytes):
            return self._pending(dist.all_reduce(x, group=self.group, async_op=True), "all_reduce", x)

    def all_gather(self, x: Tensor, dim: int = 0) -> Tensor:
        """The ranks' x (of one shape) joined along `dim`."""
        if self.size == 1:
            return x
        parts = x.new_empty(self.size, *x.shape)
        with self._call("all_gather", x, parts.nbytes):
            dist.all_gather_single(parts.view(-1), x.contiguous().view(-1), group=self.group)
        return torch.cat(parts.unbind(0), dim) if dim else parts.flatten(0, 1)

    def reduce_scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        """This rank's part, of equal parts along `dim`, of x summed over the ranks."""
        if self.size == 1:
            return x
        parts = torch.stack(x.chunk(self.size, dim))
        if len(parts) != self.size or x.shape[dim] % self.size:
            raise CollectiveError(f"reduce_scatter: {list(x.shape)} is not {self.size} equal parts along {dim}")
        out = torch.empty_like(parts[0])
        with self._call("reduce_scatter", x, x.nbytes):
            dist.reduce_scatter_single(out.view(-1), parts.view(-1), group=self.group)
        return out

    def start_reduce_scatter(self, out: Tensor, x: Tensor) -> Pending | None:
        """`reduce_scatter` of flat x into `out`, in the background."""
        if self.size == 1:
            out.copy_(x)
            return None
        with self._call("reduce_scatter", x, x.nbytes):
            work = dist.reduce_scatter_single(out, x, group=self.group, async_op=True)
            return self._pending(work, "reduce_scatter", x)

    def all_to_all(self, x: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """Rows of x (N, …), send[r] of them for rank r → the rows that the ranks sent here, receive[r] from rank r."""
        if self.size == 1:
            return x
        out = x.new_empty(sum(receive), *x.shape[1:])
        row = x.nbytes // max(len(x), 1)
        with self._call("all_to_all", x, row * len(x), same_shape=False):
            dist.all_to_all_single(out, x.contiguous(), receive, send, group=self.group)
        return out

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        """x of the rank at place `source`, in place."""
        if self.size > 1:
            with self._call("broadcast", x, x.nbytes):
                dist.broadcast(x, self.ranks[source], group=self.group)
        return x

    def barrier(self) -> None:
        """Returns when all ranks have called it."""
        self.all_reduce(torch.zeros(1))

    # --- between two

    def send(self, x: Tensor, to: int, tag: int = 0) -> Pending:
        """Starts sending x to the rank at place `to`; x must stay as it is until `wait`."""
        with self._call("send", x, x.nbytes, compare=False):
            work = dist.isend(x, self.ranks[to], group=self.group, tag=tag)
            assert work is not None
            return self._pending(work, "send", x)

    def receive(self, x: Tensor, source: int, tag: int = 0) -> Tensor:
        """Fills x with what the rank at place `source` sends."""
        self.start_receive(x, source, tag).wait()
        return x

    def start_receive(self, x: Tensor, source: int, tag: int = 0) -> Pending:
        with self._call("receive", x, 0, compare=False):
            work = dist.irecv(x, self.ranks[source], group=self.group, tag=tag)
            assert work is not None
            return self._pending(work, "receive", x)

    # --- what every call does

    def _pending(self, work: dist.Work, kind: str, x: Tensor) -> Pending:
        return Pending(work.wait, lambda: self._named(kind, x))

    @contextmanager
    def _call(
        self, kind: str, x: Tensor, message: int, *, compare: bool = True, same_shape: bool = True
    ) -> Iterator[None]:
        """Counts the call, writes it to the trail, compares it with the other ranks', names it if it fails."""
        self.trail.write(self._text(kind, x))
        if message or kind != "receive":
            self.counts.add(kind, self.name, self.size, message)
        with self._named(kind, x):
            if compare and self.trail.check:
                self._compare(kind, x, same_shape)
            began = time.perf_counter()
            yield
            self.seconds += time.perf_counter() - began

    def _text(self, kind: str, x: Tensor) -> str:
        return f"{kind} of {list(x.shape)} {str(x.dtype).removeprefix('torch.')} over {self.name} (ranks {self.ranks})"

    @contextmanager
    def _named(self, kind: str, x: Tensor) -> Iterator[None]:
        try:
            yield
        except CollectiveError:
            raise
        except (RuntimeError, ValueError) as e:
            reason = str(e).splitlines()[0]
            raise CollectiveError(f"rank {dist.get_rank()}: {self._text(kind, x)} failed: {reason}") from None

    def _compare(self, kind: str, x: Tensor, same_shape: bool) -> None:
        """CollectiveError on every rank of the group if one of them is about to make another call."""
        text = f"{kind} of {list(x.shape) if same_shape else ['any', *x.shape[1:]]} {x.dtype}"
        encoded = text.encode()[:LONGEST]
        mine = torch.zeros(LONGEST, dtype=torch.uint8)
        mine[: len(encoded)] = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
        all_of_them = torch.empty(self.size, LONGEST, dtype=torch.uint8)
        dist.all_gather_single(all_of_them.view(-1), mine, group=self.group)
        if bool((all_of_them != mine).any()):
            calls = [bytes(row.tolist()).rstrip(b"\0").decode() for row in all_of_them]
            said = "; ".join(f"rank {rank} calls {call}" for rank, call in zip(self.ranks, calls, strict=True))
            raise CollectiveError(f"the ranks of {self.name} make different calls: {said}")


LONGEST = 96  # bytes of a call's text when ranks compare them
