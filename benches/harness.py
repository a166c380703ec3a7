"""Benchmark of every op against torch: median times, their ratio, GB/s and GFLOP/s against measured peaks.

    python -m finetune bench [OP …] [--dtype f32 bf16] [--threads 1 2] [--sample NAME …] [--json FILE] [--check]
                             [--compare OLD.json] [--keep]

The samples are those of the op file that carry bench=True. A backend whose result is wrong is not timed. Our calls and
torch's alternate in one process, so other work on the machine affects both; the ratio is the median of the pairs'
ratios (above 1: ours is faster). `--check` fails if a ratio is below 0.95 in three rounds. `--compare` shows the ratios
next to those of an earlier `--json`: absolute times of two runs cannot be compared where the machine's speed drifts.
`--keep` puts the figures into benches/results/<machine>.json, in place of earlier ones of the same cells;
`scripts/readme.py` makes the README's table from it.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from baselines import BASELINES
from timing import Call, Side, Times, alternate, roofs, settle

from finetune import ops
from finetune.errors import UserError, nearest
from finetune.ops._backends import device_for
from finetune.ops._check import WrongResult, check, cotangents, flat
from finetune.ops.quantized_linear import QuantizedWeight
from finetune.runs import display, machine

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
KEPT = Path(__file__).parent / "results"
ALLOWANCE = 0.95  # of the median ratio: what is left of the noise

# --- cells


@dataclass(frozen=True)
class Cell:
    """One op on one sample, forward or forward + backward, in one dtype, on one backend, with a number of threads."""

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
    baseline: str  # the fastest of torch's ways to do the same
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
    """The sample's bytes, which are those at fp32, for arguments of `dtype`; those of a packed weight stay."""
    width = {torch.float64: torch.finfo(dtype).bits // 8}
    leaves = [leaf for leaf in flat(sample.args) if leaf.is_floating_point()]
    now = sum(leaf.numel() * width.get(leaf.dtype, leaf.dtype.itemsize) for leaf in leaves)
    fixed = sum(arg.nbytes for arg in sample.args if isinstance(arg, QuantizedWeight))
    return fixed + (sample.bytes - fixed) * now / max(sum(4 * leaf.numel() for leaf in leaves), 1)


def side(
    args: tuple[Any, ...], sample: ops.Sample, call: Call, backward: bool, dtype: torch.dtype, device: str
) -> Side:
    saved = [(leaf, leaf.detach().clone()) for i in sample.mutates for leaf in flat(args[i])]

    def reset() -> None:
        for leaf, old in saved:
            leaf.detach().copy_(old)

    if not backward:
        return Side(torch.no_grad()(call), reset, [leaf for leaf, _ in saved], settle(device), device == "cuda")
    wanted = [args[i] for i in sample.grad]
    incoming = cotangents(call(), dtype)
    return Side(
        lambda: torch.autograd.grad(flat(call()), wanted, incoming), reset, [], settle(device), device == "cuda"
    )


def sides(
    op: str, sample: ops.Sample, dtype: torch.dtype, backend: str, backward: bool
) -> tuple[Side, dict[str, Side]]:
    """Ours and torch's, each on its own copies of the arguments, where `backend` wants them."""
    device = device_for(backend)
    args, options = sample.cast(dtype, device), sample.options(device)
    ours = side(args, sample, lambda: ops.REGISTRY[op](*args, backend=backend, **options), backward, dtype, device)
    theirs_args = sample.cast(dtype, device)
    theirs = BASELINES[op](*theirs_args, **options)
    others = {label: side(theirs_args, sample, call, backward, dtype, device) for label, call in theirs.items()}
    tolerance = 1e-3 if dtype == torch.float32 else 0.1  # bf16: torch rounds its layer norm's partial sums
    wanted = ours.results()
    for label, other in others.items():
        for mine, theirs_too in zip(wanted, other.results(), strict=True):
            difference = (mine.double() - theirs_too.double()).abs().max()
            # a code of 8 bits may be the next one, where a value lies between the two
            allowed = tolerance * mine.double().abs().max() if mine.is_floating_point() else 1
            assert difference <= allowed, f"{op}: {label} computes something else"
    return ours, others


def measure(cell: Cell, seconds: float = 1.0) -> Result:
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
        copy, product = roofs(moved, dtype, device_for(cell.backend))
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


def retried(cell: Cell, seconds: float = 1.0, rounds: int = 3) -> Result:
    """The best of up to `rounds` measurements, stopping at the first that is not slower than torch."""
    result = measure(cell, seconds)
    for _ in range(rounds - 1):
        if result.ratio.median >= ALLOWANCE:
            break
        result = max(result, measure(cell, seconds), key=lambda r: r.ratio.median)
    return result


def refusals(todo: list[Cell]) -> dict[tuple[str, str, str, str], str]:
    """(op, sample, dtype, backend) → why not, for each that cannot run or disagrees with its reference."""
    found: dict[tuple[str, str, str, str], str] = {}
    for op, sample, dtype, backend in dict.fromkeys(key(cell) for cell in todo):
        try:
            check(op, bench_samples(op)[sample], DTYPES[dtype], backend)
        except (WrongResult, RuntimeError) as error:  # a RuntimeError: unavailable, or the GPU's own
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
        "date": date.today().isoformat(),
    }


def slug(about: dict[str, Any]) -> str:
    """A file name for this kind of machine: amd-epyc-avx512vnni-2t."""
    return re.sub(r"[^a-z0-9]+", "-", f"{about['cpu']} {about['level']} {about['physical_cores']}t".lower()).strip("-")


def human(seconds: float) -> str:
    return (
        f"{seconds * 1e6:.0f} µs"
        if seconds < 1e-3
        else f"{seconds * 1e3:.3g} ms"
        if seconds < 1
        else f"{seconds:.2f} s"
    )


def share(value: float | None, of: float | None) -> str:
    return f"{value / 1e9:.1f} ({value / of:.0%})" if value and of else "-"


def show(results: list[Result], about: dict[str, Any], console: Any) -> None:
    numbers = (">ours", ">torch", ">torch / ours", ">20 … 80 %", ">GB/s (of copy)", ">GFLOP/s (of mm)")
    heads = ("op", "sample", "work", "dtype", "thr", *numbers, "torch's way")
    rows: list[Any] = []
    for r in results:
        color = "red" if r.ratio.median < ALLOWANCE else "green"
        work = "fwd" if r.cell.work == "forward" else "fwd+bwd"
        name = r.cell.op if r.cell.backend == "cpp" else f"{r.cell.op} ({r.cell.backend})"
        rows.append([
            name, r.cell.sample, work, r.cell.dtype, str(r.cell.threads), human(r.ours.median), human(r.torch.median),
            (f"{r.ratio.median:.2f}×", color), f"{r.ratio.p20:.2f} … {r.ratio.p80:.2f}",
            share(r.bytes_per_second, r.copy_bytes_per_second), share(r.flops_per_second, r.product_flops_per_second),
            r.baseline,
        ])  # fmt: skip
    title = " · ".join(str(about[k]) for k in ("cpu", "level")) + f" · torch {about['torch']}"
    display.table(console, heads, rows, title)


def read_report(path: Path) -> dict[Cell, float]:
    """The ratio of each cell in a file that `--json` wrote."""
    try:
        return {Cell(**r["cell"]): r["ratio"]["median"] for r in json.loads(path.read_text())["results"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a report of `bench --json`: {error}") from None


def write_report(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


def merged(kept: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """The kept report with the results of a new one in place of those of the same cells; new cells come last."""
    new = {Cell(**r["cell"]): r for r in report["results"]}
    results = [new.pop(Cell(**r["cell"]), r) for r in kept["results"]]
    return report | {"results": [*results, *new.values()]}


def show_comparison(results: list[Result], before: dict[Cell, float], console: Any) -> None:
    rows: list[Any] = []
    for r in results:
        old, now = before.get(r.cell), r.ratio.median
        change = f"{now / old - 1:+.0%}" if old else "new"
        noise = old is not None and r.ratio.p20 <= old <= r.ratio.p80
        cells = (*(str(value) for value in asdict(r.cell).values()), f"{old:.2f}×" if old else "-", f"{now:.2f}×")
        rows.append([*cells, (change, "dim") if noise else change])
    heads = ("op", "sample", "work", "dtype", "backend", "threads", ">then", ">now", ">change")
    display.table(console, heads, rows, "torch / ours, then and now")
    gone = sum(cell not in {r.cell for r in results} for cell in before)
    if gone:
        console.print(f"{gone} cells of the earlier report were not measured now")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m finetune bench", description=(__doc__ or "").split("\n")[0])
    p.add_argument("ops", nargs="*", metavar="OP", help="ops to time (all)")
    p.add_argument("--sample", nargs="+", default=[], metavar="NAME", help="only these bench samples (all)")
    p.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="element types (both)")
    backends = ["cpp", "cuda", "triton"] if torch.cuda.is_available() else ["cpp"]
    p.add_argument(
        "--backend", nargs="+", choices=ops.BACKENDS, default=backends, help="backends to time (those of this machine)"
    )
    p.add_argument(
        "--threads", nargs="+", type=int, default=[machine.physical_cores()], help="thread counts (the cores)"
    )
    p.add_argument("--seconds", type=float, default=1.0, help="time for each line of the table (1)")
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    p.add_argument("--keep", action="store_true", help="also write them to benches/results/<machine>.json")
    p.add_argument("--compare", type=Path, metavar="OLD.json", help="show also the ratios of an earlier --json")
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
    before = read_report(wanted.compare) if wanted.compare else None
    console = display.console() if "COLUMNS" in os.environ or sys.stdout.isatty() else Console(width=170)
    results: list[Result] = []
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    todo = list(cells(names, wanted.sample, wanted.dtype, wanted.backend, wanted.threads))
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("checking against the references", total=len(todo))
        refused = refusals(todo)
        for cell in todo:
            if key(cell) in refused:
                continue
            progress.update(bar, description=f"{cell.op} {cell.sample} {cell.dtype}")
            try:
                results.append((retried if wanted.check else measure)(cell, wanted.seconds))
            except (AssertionError, RuntimeError) as error:  # torch's side is not the same, or has no memory left
                refused[key(cell)] = f"{cell.op}, {cell.sample}, {cell.work}, {cell.dtype}, {cell.backend}: {error}"
            progress.advance(bar)
    about = header()
    about["load"] = load
    show(results, about, console)
    if before is not None:
        show_comparison(results, before, console)
    if load > 0.5:
        console.print(
            f"[yellow]load {load:.1f} when this began:[/] ratios hold, absolute figures and > 1 thread may not"
        )
    for reason in refused.values():
        display.say(console, f"not timed: {reason}", "red")
    report = {"machine": about, "results": [asdict(r) for r in results], "refused": list(refused.values())}
    if wanted.json:
        write_report(wanted.json, report)
    if wanted.keep:
        file = KEPT / f"{slug(about)}.json"
        write_report(file, merged(json.loads(file.read_text()), report) if file.exists() else report)
    slow = [r for r in results if r.ratio.median < ALLOWANCE]
    if wanted.check:
        for r in slow:
            display.say(console, f"slower than torch's own: {r.cell} at {r.ratio.median:.2f}×", "red")
        console.print(f"{len(results) - len(slow)} of {len(results)} not slower than torch's own")
    return int(bool(refused) or (wanted.check and bool(slow)))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
