"""Every op beside torch's own composition of it: median times, their ratio, GB/s and GFLOP/s against measured peaks.

    python -m finetune bench [OP …] [--dtype f32 bf16] [--threads 1 2] [--sample NAME …] [--json FILE] [--check]

The samples are those of the op's page that carry bench=True. A backend that is wrong is refused before it is timed.
Ours and torch's calls alternate in one process, so that other work on the machine meets both; the ratio is the median
of the pairs' ratios (above 1: ours is faster). `--check` fails if any is below 0.95 in three rounds.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from compositions import COMPOSITIONS, Call

from finetune import machine, ops
from finetune.errors import UserError, nearest
from finetune.ops._check import WrongResult, check, cotangents, flat

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
ALLOWANCE = 0.95  # of the median ratio: what is left of the noise
ROUNDS = (5, 200)  # pairs a cell, at least and at most

# --- timing


@dataclass(frozen=True)
class Times:
    """Seconds a call."""

    median: float
    p20: float
    p80: float

    @staticmethod
    def of(values: list[float]) -> Times:
        ordered = sorted(values)
        last = len(ordered) - 1
        return Times(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)])


@dataclass(frozen=True)
class Side:
    """One of the two that are compared. `reset` undoes what a call changed in place, off the clock."""

    call: Call
    reset: Call
    changed: list[torch.Tensor]

    def results(self) -> list[torch.Tensor]:
        self.reset()
        return [leaf.detach().clone() for leaf in [*flat(self.call()), *self.changed]]

    def time(self, repeats: int) -> float:
        total = 0.0
        for _ in range(repeats):
            self.reset()
            start = time.perf_counter()
            result = self.call()
            total += time.perf_counter() - start
            del result
        return total / repeats


def side(args: tuple[Any, ...], sample: ops.Sample, call: Call, backward: bool, dtype: torch.dtype) -> Side:
    saved = [(leaf, leaf.detach().clone()) for i in sample.mutates for leaf in flat(args[i])]

    def reset() -> None:
        for leaf, old in saved:
            leaf.detach().copy_(old)

    if not backward:
        return Side(torch.no_grad()(call), reset, [leaf for leaf, _ in saved])
    wanted = [args[i] for i in sample.grad]
    incoming = cotangents(call(), dtype)
    return Side(lambda: torch.autograd.grad(flat(call()), wanted, incoming), reset, [])


def sides(
    op: str, sample: ops.Sample, dtype: torch.dtype, backend: str, backward: bool
) -> tuple[Side, dict[str, Side]]:
    """Ours and torch's, each on its own copies of the arguments."""
    args = sample.cast(dtype)
    ours = side(args, sample, lambda: ops.REGISTRY[op](*args, backend=backend, **sample.kwargs), backward, dtype)
    theirs_args = sample.cast(dtype)
    theirs = COMPOSITIONS[op](*theirs_args, **sample.kwargs)
    others = {label: side(theirs_args, sample, call, backward, dtype) for label, call in theirs.items()}
    tolerance = 1e-3 if dtype == torch.float32 else 0.1  # bf16: torch rounds its layer norm's partial sums
    wanted = ours.results()
    for label, other in others.items():
        for mine, theirs_too in zip(wanted, other.results(), strict=True):
            difference = (mine.double() - theirs_too.double()).abs().max()
            assert difference <= tolerance * mine.double().abs().max(), f"{op}: {label} computes something else"
    return ours, others


def alternate(a: Side, b: Side, seconds: float) -> tuple[list[float], list[float]]:
    """Times of a and b in turn (a b, b a, …) for about `seconds`, after one call of each to warm up."""
    once = a.time(1) + b.time(1)
    repeats = max(1, int(1e-3 / once))  # a reading is worth about a millisecond: the clock and the caches settle
    least = ROUNDS[0] if once < 2 else 2  # some of torch's bfloat16 products take half a minute without AVX-512
    rounds = min(max(int(seconds / (once * repeats)), least), ROUNDS[1])
    times: tuple[list[float], list[float]] = ([], [])
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            for which in (0, 1) if i % 2 == 0 else (1, 0):
                times[which].append((a, b)[which].time(repeats))
    finally:
        gc.enable()
    return times


# --- peaks, measured with the same threads in the same run


class Peaks:
    """What this machine does at best, measured now: bytes a second of a copy, fp32 FLOPs a second of a product."""

    def __init__(self) -> None:
        self.copies: dict[tuple[int, int], float] = {}
        self.products: dict[int, float] = {}

    def copy(self, bytes_moved: float) -> float:
        """Bytes a second, read and written, of a copy that moves about `bytes_moved`, so from the same caches."""
        power = min(max(int(bytes_moved / 2).bit_length(), 16), 28)
        key = (power, torch.get_num_threads())
        if key not in self.copies:
            source = torch.ones(2**power // 4)
            target = torch.empty_like(source)
            self.copies[key] = 2 * 2**power / best(lambda: target.copy_(source))
        return self.copies[key]

    def product(self) -> float:
        threads = torch.get_num_threads()
        if threads not in self.products:
            a, b, out = torch.randn(1024, 1024), torch.randn(1024, 1024), torch.empty(1024, 1024)
            self.products[threads] = 2 * 1024**3 / best(lambda: torch.mm(a, b, out=out))
        return self.products[threads]


def best(call: Call, seconds: float = 0.3) -> float:
    call()
    times, until = [], time.perf_counter() + seconds
    while time.perf_counter() < until or len(times) < 5:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


# --- cells


@dataclass(frozen=True)
class Cell:
    """One op on one sample, forward or forward + backward, in one dtype, on one backend, with so many threads."""

    op: str
    sample: str
    work: str  # "forward" or "forward + backward"
    dtype: str
    backend: str
    threads: int


@dataclass
class Result:
    cell: Cell
    ours: Times
    torch: Times
    composition: str
    ratio: Times  # torch / ours, pair by pair
    pairs: int
    bytes_per_second: float | None  # of the work that the sample's figures describe; None for half of it
    copy_bytes_per_second: float | None
    flops_per_second: float | None
    product_flops_per_second: float


@functools.lru_cache(maxsize=1)  # the tensors of one op at a time
def bench_samples(op: str) -> dict[str, ops.Sample]:
    return {sample.name: sample for sample in ops.REGISTRY[op].samples() if sample.bench}


def cells(
    names: list[str], samples: list[str], dtypes: list[str], backends: list[str], threads: list[int]
) -> Iterator[Cell]:
    for op in names:
        for sample in bench_samples(op).values():
            if samples and sample.name not in samples:
                continue
            for dtype in dtypes:
                for backend in backends:
                    for n in threads:
                        for work in ("forward", "forward + backward") if sample.grad else ("forward",):
                            yield Cell(op, sample.name, work, dtype, backend, n)


def traffic(sample: ops.Sample, dtype: torch.dtype) -> float:
    """The sample's bytes, which are those at fp32, for arguments of `dtype`."""
    width = {torch.float64: torch.finfo(dtype).bits // 8}
    leaves = [leaf for leaf in flat(sample.args) if leaf.is_floating_point()]
    now = sum(leaf.numel() * width.get(leaf.dtype, leaf.dtype.itemsize) for leaf in leaves)
    return sample.bytes * now / max(sum(4 * leaf.numel() for leaf in leaves), 1)


def measure(cell: Cell, peaks: Peaks, seconds: float = 1.0) -> Result:
    """Times one cell. The backend must already have passed `check`."""
    sample, dtype = bench_samples(cell.op)[cell.sample], DTYPES[cell.dtype]
    backward = cell.work != "forward"
    before = torch.get_num_threads()
    torch.set_num_threads(cell.threads)
    try:
        ours, theirs = sides(cell.op, sample, dtype, cell.backend, backward)
        label = next(iter(theirs))
        if len(theirs) > 1:
            label = min(theirs, key=lambda name: min(theirs[name].time(1) for _ in range(4)))
        mine, other = alternate(ours, theirs[label], seconds)
        whole = backward or not sample.grad  # a sample's bytes and FLOPs count the backward pass where there is one
        moved = traffic(sample, dtype)
        copy, product = peaks.copy(moved), peaks.product()
    finally:
        torch.set_num_threads(before)
    median = statistics.median(mine)
    return Result(
        cell,
        Times.of(mine),
        Times.of(other),
        label,
        Times.of([b / a for a, b in zip(mine, other, strict=True)]),
        len(mine),
        moved / median if whole and sample.bytes else None,
        copy if whole and sample.bytes else None,
        sample.flops / median if whole and sample.flops else None,
        product,
    )


def retried(cell: Cell, peaks: Peaks, seconds: float = 1.0, rounds: int = 3) -> Result:
    """The best of up to `rounds` measurements, stopping at the first that is not slower than torch."""
    result = measure(cell, peaks, seconds)
    for _ in range(rounds - 1):
        if result.ratio.median >= ALLOWANCE:
            break
        result = max(result, measure(cell, peaks, seconds), key=lambda r: r.ratio.median)
    return result


def refusals(todo: list[Cell]) -> dict[tuple[str, str, str, str], str]:
    """(op, sample, dtype, backend) → why not, for each that cannot run or disagrees with its reference."""
    found: dict[tuple[str, str, str, str], str] = {}
    for op, sample, dtype, backend in dict.fromkeys(key(cell) for cell in todo):
        try:
            check(op, bench_samples(op)[sample], DTYPES[dtype], backend)
        except (WrongResult, ops.BackendUnavailable) as error:
            found[op, sample, dtype, backend] = str(error)
    return found


def key(cell: Cell) -> tuple[str, str, str, str]:
    return cell.op, cell.sample, cell.dtype, cell.backend


# --- output


def header() -> dict[str, Any]:
    about = machine.describe()
    return {
        "cpu": about["cpu"],
        "physical_cores": about["physical_cores"],
        "level": torch.ops.finetune.cpu_level(),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "system": about["system"],
    }


def human(seconds: float) -> str:
    return (
        f"{seconds * 1e6:.0f} µs"
        if seconds < 1e-3
        else f"{seconds * 1e3:.3g} ms"
        if seconds < 1
        else f"{seconds:.2f} s"
    )


def share(value: float | None, of: float | None) -> str:
    return f"{value / 1e9:.1f} [dim]({value / of:.0%})[/]" if value and of else "[dim]-[/]"


def show(results: list[Result], about: dict[str, Any], console: Any) -> None:
    from rich.table import Table

    table = Table(title=" · ".join(str(about[k]) for k in ("cpu", "level")) + f" · torch {about['torch']}")
    for name in ("op", "sample", "work", "dtype", "thr"):
        table.add_column(name, no_wrap=True)
    for name in ("ours", "torch", "torch / ours", "20 … 80 %", "GB/s (of copy)", "GFLOP/s (of mm)"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("torch's composition")
    for r in results:
        colour = "red" if r.ratio.median < ALLOWANCE else "green"
        work = "fwd" if r.cell.work == "forward" else "fwd+bwd"
        name = r.cell.op if r.cell.backend == "cpp" else f"{r.cell.op} ({r.cell.backend})"
        table.add_row(
            name, r.cell.sample, work, r.cell.dtype, str(r.cell.threads), human(r.ours.median), human(r.torch.median),
            f"[{colour}]{r.ratio.median:.2f}×[/]", f"{r.ratio.p20:.2f} … {r.ratio.p80:.2f}",
            share(r.bytes_per_second, r.copy_bytes_per_second), share(r.flops_per_second, r.product_flops_per_second),
            r.composition,
        )  # fmt: skip
    console.print(table)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m finetune bench", description=(__doc__ or "").split("\n")[0])
    p.add_argument("ops", nargs="*", metavar="OP", help="ops to time (all)")
    p.add_argument("--sample", nargs="+", default=[], metavar="NAME", help="only these bench samples (all)")
    p.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="element types (both)")
    p.add_argument("--backend", nargs="+", choices=ops.BACKENDS, default=["cpp"], help="backends to time (cpp)")
    p.add_argument(
        "--threads", nargs="+", type=int, default=[machine.physical_cores()], help="thread counts (the cores)"
    )
    p.add_argument("--seconds", type=float, default=1.0, help="time for each line of the table (1)")
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    p.add_argument("--check", action="store_true", help=f"fail if a ratio is below {ALLOWANCE} in three rounds")
    return p


def main(argv: list[str] | None = None) -> int:
    """Runs what `argv` asks for. The status is 1 if a backend was refused, or `--check` found one slower than torch."""
    from rich.console import Console
    from rich.progress import Progress

    wanted = parser().parse_args(argv)
    for name in wanted.ops:
        if name not in ops.REGISTRY:
            raise UserError(f"unknown op '{name}'{nearest(name, ops.REGISTRY)}")
    names = wanted.ops or [name for name in ops.REGISTRY if bench_samples(name)]
    known = {sample for name in names for sample in bench_samples(name)}
    for sample in wanted.sample:
        if sample not in known:
            raise UserError(f"unknown sample '{sample}': these ops have {', '.join(sorted(known))}")
    console = Console() if sys.stdout.isatty() else Console(width=170)
    peaks, results = Peaks(), []
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    todo = list(cells(names, wanted.sample, wanted.dtype, wanted.backend, wanted.threads))
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("checking against the references", total=len(todo))
        refused = refusals(todo)
        for cell in todo:
            if key(cell) in refused:
                continue
            progress.update(bar, description=f"{cell.op} {cell.sample} {cell.dtype}")
            results.append((retried if wanted.check else measure)(cell, peaks, wanted.seconds))
            progress.advance(bar)
    about = header()
    about["load"] = load
    show(results, about, console)
    if load > 0.5:
        console.print(
            f"[yellow]load {load:.1f} when this began:[/] ratios hold, absolute figures and > 1 thread may not"
        )
    for reason in refused.values():
        console.print(f"[red]not timed:[/] {reason}")
    if wanted.json:
        wanted.json.parent.mkdir(parents=True, exist_ok=True)
        report = {"machine": about, "results": [asdict(r) for r in results], "refused": list(refused.values())}
        wanted.json.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    slow = [r for r in results if r.ratio.median < ALLOWANCE]
    if wanted.check:
        for r in slow:
            console.print(f"[red]slower than torch's own:[/] {r.cell} at {r.ratio.median:.2f}×")
        console.print(f"{len(results) - len(slow)} of {len(results)} not slower than torch's own")
    return int(bool(refused) or (wanted.check and bool(slow)))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
