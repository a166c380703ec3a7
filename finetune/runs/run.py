"""A run: one folder with settings, metrics, curves, checkpoints and a summary; killed at any moment, it resumes.

The result is a function of (settings, seed, inputs). No random state is carried from step to step: before step s
every generator is seeded from (seed, phase, s), so a resumed step draws the same numbers. A resumed run checks
that its inputs, the kernels and the versions are those that it began with. `execute` runs a module; its
`main(cfg, run)` uses the public methods of `Run`.
"""

import dataclasses
import hashlib
import math
import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from finetune.errors import UserError
from finetune.runs import checkpoint, config, display, machine, reading, registry, run_folder
from finetune.runs.metrics import MAIN, Metrics

if TYPE_CHECKING:
    import torch
    from rich.console import Console

KEPT = 2  # checkpoints kept: the newest, and one to fall back to


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, raised once the step in progress is finished and saved. No `except Exception` catches it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class NotFinite(UserError):
    """A metric or result became NaN or infinite."""


def _finite(name: str, value: float) -> float:
    """The value of a result or check. NotFinite for NaN and infinities."""
    value = float(value)
    if not math.isfinite(value):
        raise NotFinite(f"{name} is {value}, which is no result: look at the data, or try a smaller learning rate")
    return value


class Run:
    """One run, as a module sees it. `dir`, `cfg`, `toy` and `console` may be read; `phase` names the current loop."""

    def __init__(
        self,
        folder: Path,
        cfg: config.Config,
        *,
        toy: bool = False,
        resume: bool = False,
        saved: run_folder.Saved | None = None,
        accept_changes: bool = False,
        console: "Console | None" = None,
    ) -> None:
        self.dir = Path(folder)
        self.cfg, self.toy, self.resume = cfg, toy, resume
        self.saved, self._accept_changes = saved, accept_changes
        self.console = console or display.console()
        self.phase = MAIN
        self.metrics = Metrics(self.dir / "metrics.csv", resume)
        self.judged: dict[str, dict[str, Any]] = {}
        self.checks: dict[str, dict[str, Any]] = {}
        self.memory_rows: list[dict[str, Any]] = []
        self.sample_tables: list[dict[str, Any]] = []
        self.next_commands: list[
            tuple[str, str]
        ] = []  # (what for, words behind `python -m finetune`), shown at the end
        self.finished_steps = 0
        self._latest: dict[str, float] = {}
        self._signal, self.busy = 0, False  # busy: within a step
        self._began, self._earlier_seconds, self._earlier_peak = time.monotonic(), 0.0, 0
        with checkpoint.writing(self.dir):
            self.dir.mkdir(parents=True, exist_ok=True)

    def print(self, text: str) -> None:
        """One line to the terminal, above the progress bar."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def depends_on(self, name: str, path: Path) -> None:
        """Records the hash of a file or folder that the result depends on (paths in the settings are recorded already).

        UserError if the run is resumed and the contents have changed since it began.
        """
        if self.saved is None:
            return
        path, before = reading.home_path(path), self.saved.inputs.get(name)
        if before and before.path == str(path) and path.exists() and run_folder.changed_at(path) == before.changed:
            return
        now = run_folder.described(path)
        if before and before.sha256 != now.sha256:
            self.changed([f"{name} ({path}) has other contents"])
        self.saved.inputs[name] = now
        self.saved.write(self.dir)

    def changed(self, what: list[str]) -> None:
        """Refuses to continue with changed inputs, or with --accept-changes prints and records them."""
        if not what or self.saved is None:
            return
        if not self._accept_changes:
            raise UserError(
                f"since the run in {self.dir} began, {'; '.join(what)}: restore it, start a new run, "
                "or add --accept-changes to continue all the same"
            )
        self.saved.changes += what
        self.saved.write(self.dir)
        self.print(f"continuing although {'; '.join(what)}")

    def generator(self, *key: Any) -> "torch.Generator":
        """A CPU generator that depends on (seed, *key) only: `run.generator("batch", step)`."""
        import torch

        return torch.Generator().manual_seed(stable_hash(self.cfg.seed, *key))

    def steps(self, total: int, state: dict[str, Any], phase: str = MAIN) -> Iterator[int]:
        """Yields the remaining steps of 0 … total-1, with a progress bar, checkpoints and safe interruption.

        state: everything that a step changes, name -> an object with state_dict() and load_state_dict(), or a dict of
        tensors and plain values (updated in place). A run with several loops names each by its own `phase`.
        """
        folder = self.dir / "checkpoints" / ("" if phase == MAIN else phase)
        start = self._restore(folder, state, phase) if self.resume else 0
        self.phase, self.finished_steps, self._latest = phase, start, {}
        self.metrics.keep(phase, start)
        try:
            with display.progress(self.console, phase, start, total) as show:
                for step in range(start, total):
                    self.busy = True
                    self.seed(phase, step)
                    yield step
                    self.finished_steps = step + 1
                    if self._signal or (step + 1) % self.cfg.checkpoint_every == 0 or step + 1 == total:
                        self.metrics.flush()
                        self._save(folder, step + 1, state)
                    show(step + 1, self._latest)
                    if self._signal:
                        raise Stopped(self._signal)
                    self.busy = False
        finally:
            self.busy = False
        self.seed(phase, total)

    def log(self, step: int, **metrics: Any) -> None:
        """Adds to the row of this step in metrics.csv. UserError if a value is not finite."""
        values = {name: v.item() if hasattr(v, "item") else v for name, v in metrics.items()}
        for name, value in values.items():
            if not math.isfinite(value):
                self.metrics.flush()
                raise NotFinite(
                    f"{name} became {value} at step {step}: try a smaller learning rate or another --seed; "
                    f"what was recorded before is kept in {self.dir}"
                )
        self.metrics.log(self.phase, step, {name: repr(value) for name, value in values.items()})
        self._latest |= values

    def result(
        self,
        name: str,
        value: float,
        *,
        error: float | None = None,
        baseline: float | None = None,
        target: float | None = None,
        higher: bool = True,
    ) -> None:
        """Records a headline result: its standard error, its baseline and the target it must reach (`higher=False`:
        must not exceed; if baseline equals target: must surpass). Without a target it is shown and not judged. A run
        has three to six; everything else is a `check`. NotFinite for NaN and infinities.
        """
        value = _finite(name, value)
        error, baseline, target = (None if x is None else float(x) for x in (error, baseline, target))
        if error is not None and not math.isfinite(error):
            error = None  # one sample has none
        passed: bool | None = None
        if target is not None:
            reached = value >= target if higher else value <= target
            passed = reached and not value == baseline == target
        self.judged[name] = {"value": value, "error": error, "baseline": baseline, "target": target, "higher": higher,
                             "passed": passed}  # fmt: skip

    def check(
        self,
        name: str,
        value: float,
        *,
        error: float | None = None,
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> None:
        """Records a number behind the results (an equality, a z-score, a control) in `checks` of summary.json.

        It is not in the table of results, unless it breaks its bound: then `passed` is false. Without a bound it is
        recorded only. NotFinite for NaN and infinities.
        """
        value = _finite(name, value)
        row = {"value": value} | {
            key: float(bound)
            for key, bound in (("error", error), ("at_least", at_least), ("at_most", at_most))
            if bound is not None and math.isfinite(bound)
        }
        row["passed"] = row.get("at_least", value) <= value <= row.get("at_most", value)
        self.checks[name] = row

    def record_memory(self, rows: list[dict[str, Any]]) -> None:
        """Shows, records and draws (memory.png) rows of {name, predicted, measured}, in bytes; either may be None."""
        from finetune.runs import plots

        self.memory_rows += rows
        display.memory(self.console, rows)
        plots.memory(self.dir / "memory.png", f"{self._title()} · memory", self.memory_rows)

    def table(self, title: str, rows: list[dict[str, Any]]) -> None:
        """Shows rows of text with the same keys, such as {prompt, before, after}, and writes them to samples.json."""
        self.sample_tables.append({"title": title, "rows": rows})
        checkpoint.write_json(self.dir / "samples.json", self.sample_tables)
        display.samples(self.console, title, rows)

    def curves(self) -> None:
        """Writes training_curves.png, if anything was logged."""
        from finetune.runs import plots

        self.metrics.flush()
        if series := self.metrics.series():
            kinds = ("baseline", "target", "higher")
            levels = {k: {n: j[k] for n, j in self.judged.items() if j[k] is not None} for k in kinds}
            with checkpoint.atomic_write(self.dir / "training_curves.png") as temporary:
                plots.training_curves(temporary, self._title(), series, **levels)

    def _title(self) -> str:
        return f"{self.dir.name} · {'toy' if self.toy else 'default'} · seed {self.cfg.seed}"

    def summary(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """The contents of summary.json. `passed` is null if there is neither a target nor a bounded check."""
        results = [j["passed"] for j in self.judged.values() if j["passed"] is not None]
        results += [row["passed"] for row in self.checks.values() if {"at_least", "at_most"} & set(row)]
        return {
            "metrics": {**{n: j["value"] for n, j in self.judged.items()}, **metrics},
            "standard_error": {n: j["error"] for n, j in self.judged.items() if j["error"] is not None},
            "baseline": {n: j["baseline"] for n, j in self.judged.items() if j["baseline"] is not None},
            "target": {n: j["target"] for n, j in self.judged.items() if j["target"] is not None},
            "higher_is_better": {n: j["higher"] for n, j in self.judged.items()},
            "reached": {n: j["passed"] for n, j in self.judged.items()},
            "checks": self.checks,
            "passed": all(results) if results else None,
            "seconds": round(self._seconds(), 3),
            "peak_rss_bytes": self._peak(),
            "memory": self.memory_rows,
            "changes": self.saved.changes if self.saved else [],
        }

    def seed(self, *key: Any) -> None:
        """Seeds torch, random and (where loaded) numpy from (seed, *key)."""
        import torch

        value = stable_hash(self.cfg.seed, *key)
        torch.default_generator.manual_seed(value)  # torch.manual_seed takes a stack trace each time without a GPU
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(value)
        random.seed(value)
        if numpy := sys.modules.get("numpy"):
            numpy.random.seed(value % 2**32)

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Context in which Ctrl-C and SIGTERM let the current step finish and save; a second one, or one between loops,
        stops at once."""

        def stop(number: int, frame: Any) -> None:
            if self._signal or not self.busy:
                raise Stopped(number)
            self._signal = number
            os.write(2, b"\nstopping after this step (again: at once)\n")  # print() is not re-entrant, os.write is

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _seconds(self) -> float:
        return self._earlier_seconds + time.monotonic() - self._began

    def _peak(self) -> int:
        return max(self._earlier_peak, machine.peak_rss_bytes())

    def _save(self, folder: Path, step: int, state: dict[str, Any]) -> None:
        tree, tensors = checkpoint.flatten(
            {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in state.items()}
        )
        meta = {
            "step": step,
            "seconds": self._seconds(),
            "peak_rss_bytes": self._peak(),
            "run": self._identity(),
            "metrics": self.metrics.digest(self.phase, step),
            "state": tree,
        }
        checkpoint.save(folder / f"step_{step:06d}", tensors, meta)
        for old in _checkpoints(folder)[:-KEPT]:
            checkpoint.remove(old)

    def _identity(self) -> dict[str, Any]:
        """The identity of this run that its checkpoints record."""
        if self.saved is None:
            return {}
        settings = hashlib.sha256(repr(sorted(self.saved.config.items())).encode()).hexdigest()
        inputs = {name: given.sha256 for name, given in self.saved.inputs.items()}
        return {"id": self.saved.id, "settings": settings, "inputs": inputs, "versions": self.saved.versions}

    def _restore(self, folder: Path, state: dict[str, Any], phase: str) -> int:
        """Loads the newest intact checkpoint into `state`; returns its number of finished steps, 0 without one."""
        found = _checkpoints(folder)[::-1]
        for i, path in enumerate(found):
            try:
                meta = self._load(path, state)
            except (UserError, KeyError, TypeError, ValueError, RuntimeError) as e:
                reason = str(e) if isinstance(e, UserError) else f"checkpoint {path} cannot be read: {e}"
                if i + 1 == len(found):
                    raise UserError(f"{reason}; no earlier one is left: {run_folder.STALE}") from None
                self.print(f"{reason}; falling back to {found[i + 1].name}")
                continue
            if not self.metrics.holds(msgspec.to_builtins(meta.metrics), phase, meta.step):
                self.changed(["the rows of metrics.csv were altered"])
            self._earlier_seconds = max(self._earlier_seconds, meta.seconds)
            self._earlier_peak = max(self._earlier_peak, meta.peak_rss_bytes)
            return meta.step
        return 0

    def _load(self, path: Path, state: dict[str, Any]) -> "Meta":
        """Loads a checkpoint into `state`. UserError if it is damaged, or belongs to another run or module."""
        tensors, raw = checkpoint.load(path)
        meta = reading.convert(raw, Meta, path / checkpoint.META)
        if self.saved and (meta.run.get("id"), meta.run.get("settings")) != (
            self.saved.id,
            self._identity()["settings"],
        ):
            raise UserError(f"checkpoint {path} is of another run")
        saved = checkpoint.unflatten(meta.state, tensors)
        if set(saved) != set(state):
            raise UserError(f"checkpoint {path} holds {sorted(saved)}, this module has {sorted(state)}")
        for name, target in state.items():
            if hasattr(target, "load_state_dict"):
                target.load_state_dict(saved[name])
            else:
                _update(target, saved[name], name)
        return meta


class MetricsDigest(msgspec.Struct):
    columns: list[str]
    sha256: str


class Meta(msgspec.Struct):
    """meta.json of a checkpoint."""

    step: reading.Index
    seconds: reading.NonNegative
    peak_rss_bytes: reading.Index
    run: dict[str, Any]
    metrics: MetricsDigest
    state: dict[str, Any]


def execute(
    info: registry.ModuleInfo,
    cfg: config.Config,
    out: Path | None = None,
    *,
    toy: bool = False,
    resume: bool = False,
    again: bool = False,
    accept_changes: bool = False,
    console: "Console | None" = None,
) -> dict[str, Any]:
    """Runs a module in a new folder (`out`, or a default one), or continues the one in `out`; returns the summary.

    `again` repeats what follows the last step of a run that is finished.
    """
    main = registry.load(info).main
    if not resume:
        cfg = dataclasses.replace(cfg, threads=cfg.threads or machine.physical_cores())
    folder = Path(out) if out else run_folder.default(info, cfg, toy)
    run_folder.check_name(folder)
    if resume:
        saved = run_folder.read(folder)
    else:
        run_folder.refuse_foreign(folder)
        saved = run_folder.begin(info, cfg, toy)
    if resume and not again and (folder / run_folder.SUMMARY).exists():
        (console or display.console()).print(
            f"{folder} is finished already: nothing to resume", markup=False, soft_wrap=True
        )
        return run_folder.summary(folder)
    run = Run(folder, cfg, toy=toy, resume=resume, saved=saved, accept_changes=accept_changes, console=console)
    with run_folder.locked(folder), checkpoint.owned_by(saved.id), torch_settings(cfg.threads), run.signals():
        checkpoint.clean(folder, saved.id)
        try:
            begin(run, saved, new=not resume)
            display.header(run.console, info, cfg, folder, toy, resume)
            run.seed("init")
            metrics = main(cfg, run) or {}
            run.curves()
            summary = {"module": info.name, "toy": toy, "seed": cfg.seed, "steps": cfg.steps, **run.summary(metrics)}
            checkpoint.write_json(folder / run_folder.SUMMARY, summary)
        except Stopped as e:
            run.curves()
            e.args = (f"{e}: continue with python -m finetune run {info.name} --resume --out {display.short(folder)}",)
            raise
        except UserError as e:
            if isinstance(e, NotFinite):
                run.curves()
            elif not (resume or run.metrics.rows or (folder / "checkpoints").exists()):
                run_folder.withdraw(folder)
            if run.finished_steps and not run.busy:
                e.args = (f"{e}; {kept(folder)}",)
            raise
        except Exception:
            if run.finished_steps and not run.busy:
                print(kept(folder), file=sys.stderr)
            raise
        display.closing(run.console, summary, run.judged, folder)
        display.commands(run.console, run.next_commands)
    return summary


def begin(run: Run, saved: run_folder.Saved, new: bool) -> None:
    """Writes the settings of a new run; checks that what a resumed one depends on has not changed."""
    if new:
        saved.write(run.dir)
    else:
        now = run_folder.versions()
        differing = run_folder.differences(saved.versions, now)
        saved.versions = now
        run.changed(differing)
    for name, path in run.cfg.inputs().items():
        run.depends_on(name, path)


def kept(folder: Path) -> str:
    where = display.short(folder)
    return f"what was trained is kept in {where}: python -m finetune finish {where} repeats what is missing"


@contextmanager
def torch_settings(threads: int) -> Iterator[None]:
    """Context with the run's thread count and deterministic algorithms; restores the earlier settings."""
    import torch

    deterministic: Any = torch.utils.deterministic
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    fill = deterministic.fill_uninitialized_memory
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = False  # it would cost a pass over every new tensor
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])
        deterministic.fill_uninitialized_memory = fill


def stable_hash(*key: Any) -> int:
    """A 63-bit hash that is the same in every process, unlike hash()."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a loop, oldest first; other files are ignored."""
    found = [p for p in folder.glob("step_*") if re.fullmatch(r"step_\d{6,12}", p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step_")))


def _update(target: dict[str, Any], saved: dict[str, Any], place: str) -> None:
    """Restores saved values into a dict; tensors are copied into the existing ones, which others may refer to.

    UserError for a tensor that is there and was not saved, or not in this shape and dtype."""
    import torch

    for name, there in target.items():
        if isinstance(there, torch.Tensor) and there.requires_grad:
            value = saved.get(name)
            if not isinstance(value, torch.Tensor) or (value.shape, value.dtype) != (there.shape, there.dtype):
                raise UserError(f"the checkpoint's {place}.{name} is missing or of another shape or dtype")
    for name, value in saved.items():
        there = target.get(name)
        if isinstance(there, torch.Tensor) and isinstance(value, torch.Tensor) and there.shape == value.shape:
            there.detach().copy_(value)
        elif isinstance(there, dict) and isinstance(value, dict):
            _update(there, value, f"{place}.{name}")
        else:
            target[name] = value
    for name in set(target) - set(saved):
        del target[name]
