"""Ranks: processes of one process group, started here, called like functions, and ended together.

    with Ranks(4) as ranks:
        losses = ranks.call(step, 7)        # step(rank, 7) on every rank at once; the results, rank by rank

The store through which the ranks find each other lives in this process, on a port that the system chose: two launches
never meet, and none has to guess a free port. A rank that raises or dies ends all of them, and the error names it, with
the collective that it was in. If this process dies, however it does, the ranks notice and end.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from finetune.distributed.mesh import Layout, Mesh
from finetune.errors import UserError

# What every rank needs, imported once by the server that they are forked from (an optimizer imports torch's compiler).
PRELOADED = ["finetune.distributed.work", "torch.distributed.device_mesh", "torch.utils.checkpoint", "torch._dynamo"]
LINE = 256  # bytes of a rank's trail
GRACE = 3.0  # seconds that the other ranks have to report once one has failed


class RankFailed(UserError):
    """A rank raised or died; the message names it and where it was."""


class Rank:
    """What a function sees of the process that it runs in: its number, the meshes, and objects kept between calls."""

    def __init__(self, number: int, world: int, trail: Any) -> None:
        self.number, self.world, self.trail = number, world, trail
        self.kept: dict[str, Any] = {}
        self._meshes: dict[Layout, Mesh] = {}

    def mesh(self, layout: Layout) -> Mesh:
        """The mesh of a layout, made at the first call; all ranks must ask for it at the same point."""
        if layout not in self._meshes:
            self._meshes[layout] = Mesh(layout, self.trail)
        mesh = self._meshes[layout]
        mesh.counts.clear()
        return mesh


class Ranks:
    """`world` processes with a gloo group. timeout: seconds until a collective that the others do not join fails.

    on_line(rank, text) gets every line that a rank prints; none: the lines appear as they are, with `[rank r]`.
    check: the ranks compare every collective before it starts. folder: for rank_0.log and so on.
    """

    def __init__(
        self,
        world: int,
        *,
        timeout: float = 60.0,
        check: bool = False,
        on_line: Callable[[int, str], None] | None = None,
        folder: Path | None = None,
    ) -> None:
        import torch.distributed as dist

        if world < 1:
            raise UserError(f"at least one rank is needed, not {world}")
        self.world, self.closed = world, False
        self.on_line = on_line or (lambda rank, text: print(f"[rank {rank}] {text}", flush=True))
        self.logs = [open(folder / f"rank_{r}.log", "a") for r in range(world)] if folder else []  # noqa: SIM115
        self.store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=timeout), wait_for_workers=False)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.trails = [context.RawArray("c", LINE) for _ in range(world)]
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        self.readers: list[threading.Thread] = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            out, into = context.Pipe(duplex=False)
            given = (theirs, into, rank, world, self.store.port, timeout, check, self.trails[rank])
            process = context.Process(target=serve, args=given, daemon=True, name=f"rank {rank}")
            process.start()
            theirs.close()
            into.close()
            self.pipes.append(ours)
            self.processes.append(process)
            self.readers.append(threading.Thread(target=self._read, args=(rank, out), daemon=True))
            self.readers[-1].start()

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """function(rank, *args, **kwargs) on every rank; the results in order of ranks.

        UserError with the text of rank 0 if all ranks raised it: they live on. RankFailed, and the end of all ranks, if
        any of them raised something else or died.
        """
        if self.closed:
            raise UserError("these ranks have ended")
        for pipe in self.pipes:
            try:
                pipe.send((function, args, kwargs))
            except (BrokenPipeError, ConnectionResetError):
                break  # that rank is dead: found below
        answers: dict[int, tuple[str, Any]] = {}
        deaths: dict[int, str] = {}
        until: float | None = None  # a failure was seen: the others are not waited for any longer than this
        while len(answers) + len(deaths) < self.world and (until is None or time.monotonic() < until):
            missing = [r for r in range(self.world) if r not in answers and r not in deaths]
            ready = wait([self.pipes[r] for r in missing] + [self.processes[r].sentinel for r in missing], 0.5)
            for rank in missing:
                if self.pipes[rank] in ready:
                    try:
                        answers[rank] = self.pipes[rank].recv()
                    except (EOFError, ConnectionResetError):
                        deaths[rank] = self._death(rank)
                elif self.processes[rank].sentinel in ready:
                    deaths[rank] = self._death(rank)
            failed = deaths or any(kind == "failed" for kind, _ in answers.values())
            refused = [r for r, (kind, _) in answers.items() if kind == "refused"]
            if until is None and (failed or refused):
                until = time.monotonic() + GRACE
        if len(answers) == self.world and all(kind == "refused" for kind, _ in answers.values()):
            raise UserError(answers[0][1])
        if len(answers) < self.world or any(kind != "ok" for kind, _ in answers.values()):
            raise RankFailed(self._reason(answers, deaths))
        return [answers[rank][1] for rank in range(self.world)]

    def _death(self, rank: int) -> str:
        self.processes[rank].join(5)
        code = self.processes[rank].exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended with code {code}"
        trail = bytes(self.trails[rank].raw).split(b"\0")[0].decode(errors="replace")
        return f"rank {rank} {how}, after its {trail}" if trail else f"rank {rank} {how} before its first collective"

    def _reason(self, answers: dict[int, tuple[str, Any]], deaths: dict[int, str]) -> str:
        """Ends all ranks; one line: first who died, then what the others raised."""
        late = [r for r in range(self.world) if r not in answers and r not in deaths]
        where = {r: bytes(self.trails[r].raw).split(b"\0")[0].decode(errors="replace") for r in late}
        self.kill()
        said = {text.splitlines()[0]: None for kind, text in answers.values() if kind != "ok"}  # each line once
        waiting = [f"rank {r} was still in {where[r] or 'no collective'}" for r in late]
        first = list(deaths.values()) or list(said)[:1]
        rest = [] if deaths else [*list(said)[1:], *waiting]
        return "; ".join([*first, *rest, "all ranks were ended"])

    def _read(self, rank: int, out: Connection) -> None:
        with os.fdopen(os.dup(out.fileno()), errors="replace") as lines:
            for line in lines:
                if self.logs:
                    self.logs[rank].write(line)
                    self.logs[rank].flush()
                self.on_line(rank, line.rstrip("\n"))
        out.close()

    def kill(self) -> None:
        """Ends all ranks at once."""
        self.closed = True
        for process in self.processes:
            process.kill()
        self._collect()

    def close(self) -> None:
        """Ends the ranks that have nothing more to do."""
        if not self.closed:
            self.closed = True
            for pipe in self.pipes:
                try:
                    pipe.send(None)
                except (BrokenPipeError, ConnectionResetError):
                    continue
            for process in self.processes:
                process.join(5)
                if process.exitcode is None:
                    process.kill()
            self._collect()

    def _collect(self) -> None:
        for process in self.processes:
            process.join(5)
        for reader in self.readers:
            reader.join(5)
        for pipe in self.pipes:
            pipe.close()
        for log in self.logs:
            log.close()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.close() if kind is None else self.kill()


# --- In a rank


def serve(
    pipe: Connection, output: Connection, number: int, world: int, port: int, timeout: float, check: bool, memory: Any
) -> None:
    """What a rank does: joins the group, then runs what it is sent until there is nothing more."""
    import torch
    import torch.distributed as dist

    from finetune.distributed.collectives import CollectiveError, Trail

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal: the starter decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for descriptor in (1, 2):
        os.dup2(output.fileno(), descriptor)
    output.close()
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, None, False, timedelta(seconds=timeout))
    dist.init_process_group("gloo", store=store, rank=number, world_size=world, timeout=timedelta(seconds=timeout))
    rank = Rank(number, world, Trail(memory, check))
    orders: list[Any] = []
    there = threading.Condition()
    threading.Thread(target=listen, args=(pipe, orders, there), daemon=True).start()
    while True:
        with there:
            there.wait_for(lambda: orders)
            order = orders.pop(0)
        if order is None:
            break
        function, args, kwargs = order
        try:
            answer = "ok", function(rank, *args, **kwargs)
        except UserError as e:
            answer = "refused", str(e)
        except CollectiveError as e:
            answer = "failed", str(e)
        except Exception as e:
            traceback.print_exc()
            answer = "failed", f"rank {number}: {type(e).__name__}: {e}"
        pipe.send(answer)
    dist.destroy_process_group()


def listen(pipe: Connection, orders: list[Any], there: threading.Condition) -> None:
    """Takes orders from the starter. When it is gone this process ends, even in the middle of a collective."""
    while True:
        try:
            order = pipe.recv()
        except (EOFError, OSError):
            os._exit(1)
        with there:
            orders.append(order)
            there.notify()
        if order is None:
            return
