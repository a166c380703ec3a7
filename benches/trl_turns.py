"""What the benches next to TRL share: two trainers, each in its own process, that take turns step by step."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from timing import Times

from finetune.errors import UserError
from finetune.runs import machine

# float32: rounding. bfloat16: TRL computes the adapters and the head in bfloat16 too, ours in float32.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


# --- in a side's process. One line comes in, one JSON object a step goes out.


class Turn:
    """A worker's end of the pipe, its clocks and its memory."""

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print must not get into the pipe

    def send(self, **values: Any) -> None:
        print(json.dumps(values), file=self.out, flush=True)

    def ready(self) -> None:
        """Everything is loaded: memory grows from here."""
        reset = machine.reset_peak_rss()
        self.loaded = machine.peak_rss_bytes(since_reset=True) if reset else None
        self.send(loaded=self.loaded)

    def wait(self) -> None:
        if not sys.stdin.readline():
            sys.exit(0)  # the parent has gone, or has seen enough
        self.began = time.perf_counter(), time.process_time()

    def done(self, loss: float, grad_norm: float) -> None:
        seconds, cpu = time.perf_counter() - self.began[0], time.process_time() - self.began[1]
        growth = None if self.loaded is None else machine.peak_rss_bytes(since_reset=True) - self.loaded
        peak = machine.peak_rss_bytes()
        self.send(loss=loss, grad_norm=grad_norm, seconds=seconds, cpu=cpu, peak=peak, growth=growth)


# Settings of TRL's trainers that every bench gives: a step is a step, and nothing else is done.
PLAIN: dict[str, Any] = {
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
}


def take_turns(turn: Turn) -> Any:
    """A callback of TRL's trainer, which waits for its turn before each step and reports the step's end."""
    from transformers import TrainerCallback

    class TakeTurns(TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            turn.ready()
            turn.wait()

        def on_log(self, args, state, control, **given):  # the end of a step, with its loss
            logs = given["logs"]
            if "loss" in logs:
                turn.done(logs["loss"], logs["grad_norm"])
                if state.global_step < state.max_steps:
                    turn.wait()

    return TakeTurns()


# --- the parent


class Worker:
    """One side's process as the parent sees it."""

    def __init__(self, script: str, name: str, task_file: Path, threads: int) -> None:
        self.name, self.log = name, task_file.parent / f"{name.replace(' ', '_')}.log"
        env = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, script, "--worker", name, str(task_file)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=env,
            )  # fmt: skip

    def read(self) -> dict[str, Any]:
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise UserError(f"{self.name} died, exit status {self.process.wait()}:\n{self.log.read_text()[-2000:]}")
        return json.loads(line)

    def step(self) -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):  # it has died: read() says of what
            print("step", file=self.process.stdin, flush=True)
        return self.read()

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()


def make_adapter(model: Path, folder: Path, rank: int, alpha: float) -> None:
    """The adapter that all sides start from; its B is 0."""
    import torch

    from finetune.lm.io import load
    from finetune.peft import adapters, lora

    llama = load.llama(model, torch.bfloat16)  # the adapter's dtype is float32 all the same
    lora.apply_lora(llama, rank, alpha, generator=torch.Generator().manual_seed(0))
    adapters.save_adapter(llama, folder, str(model))


def disagreement(losses: dict[str, float], tolerance: float) -> str | None:
    """Why the sides do not compute the same, if so; a NaN never agrees."""
    first = losses["ours"]
    for name, loss in losses.items():
        if not abs(loss - first) <= tolerance * abs(first):
            return f"not timed: the loss of step 1 is {loss:.6f} for {name} but {first:.6f} for ours"
    return None


Steps = dict[str, list[dict[str, Any]]]  # of each side


def measure(
    script: str, args: argparse.Namespace, dtype: str, sides: list[str], task: dict[str, Any], tick: Callable
) -> Steps:
    """Starts the sides, checks that they agree at step 1, and lets them take turns."""
    with tempfile.TemporaryDirectory() as folder:
        task_file = Path(folder, "task.json")
        task |= {"dtype": dtype, "threads": args.threads, "steps": args.steps + 1, "folder": folder}
        task_file.write_text(json.dumps(task))
        workers: list[Worker] = []
        try:
            for name in sides:
                tick(f"{dtype}: loading {name}")
                workers.append(Worker(script, name, task_file, args.threads))
                workers[-1].read()
            steps: Steps = {name: [] for name in sides}
            for number in range(args.steps + 1):
                for worker in workers if number % 2 else workers[::-1]:
                    tick(f"{dtype}: step {number}, {worker.name}")
                    steps[worker.name].append(worker.step())
                if number == 0 and (
                    reason := disagreement({n: s[0]["loss"] for n, s in steps.items()}, TOLERANCE[dtype])
                ):
                    raise UserError(reason)
        finally:
            for worker in workers:
                worker.stop()
    return steps


def summarize(steps: Steps, batches: list[list[int]]) -> dict[str, dict[str, Any]]:
    """Of each side: time, memory, its ratio to ours and how far its losses stray. `batches`: the lengths of the rows
    of each step, the first one included, which is not timed."""
    tokens = [sum(lengths) for lengths in batches]
    found = {}
    for name, all_steps in steps.items():
        timed, mine = all_steps[1:], steps["ours"][1:]
        pairs = list(zip(timed, mine, strict=True))
        speeds = [n / step["seconds"] for n, step in zip(tokens[1:], timed, strict=True)]
        growths = [step["growth"] for step in all_steps if step["growth"] is not None]
        found[name] = {
            "seconds": vars(Times.of([step["seconds"] for step in timed])),
            "cpu_seconds": vars(Times.of([step["cpu"] for step in timed])),
            "tokens_per_second": statistics.median(speeds),
            "peak": max(step["peak"] for step in all_steps),
            "growth": max(growths) if growths else None,
            "ratio": vars(Times.of([a["seconds"] / b["seconds"] for a, b in pairs])),
            "cpu_ratio": vars(Times.of([a["cpu"] / b["cpu"] for a, b in pairs])),
            "loss_difference": max(
                abs(a["loss"] / b["loss"] - 1) for a, b in zip(all_steps, steps["ours"], strict=True)
            ),
        }
    return found


def mib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:,.0f} MiB"


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "trl", "peft")}
