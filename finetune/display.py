"""What a run shows: a header, a progress bar, tables. Plain occasional lines where the output is not a terminal."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

if TYPE_CHECKING:
    from finetune.config import Config
    from finetune.registry import ModuleInfo

PLAIN_EVERY = 5.0  # seconds between two lines of progress where there is no terminal


def console(stderr: bool = False) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else 110)


def header(con: Console, info: "ModuleInfo", cfg: "Config", folder: Path, toy: bool, resumed: bool) -> None:
    from finetune import machine

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    setting = f"{'toy' if toy else 'default'}, {cfg.steps} steps, seed {cfg.seed}{', resumed' if resumed else ''}"
    device = f"{getattr(cfg, 'device', 'cpu')} ({machine.cpu_name()}), {cfg.threads} thread{'s'[: cfg.threads > 1]}"
    for name, text in (("module", f"{info.title} — {info.summary}"), ("setting", setting), ("device", device)):
        grid.add_row(name, text)
    grid.add_row("folder", short(folder))
    con.print(Panel(grid, title=f"[bold]{info.name}[/]", title_align="left", border_style="cyan", box=box.ROUNDED))


@contextmanager
def progress(con: Console, phase: str, start: int, total: int) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """Gives show(done, metrics): a live bar on a terminal, a line every few seconds elsewhere."""
    if start:
        con.print(f"{phase}: continuing after step {start} of {total}", highlight=False)
    if not con.is_terminal:
        yield _plain(con, phase, start, total)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=None, complete_style="cyan", finished_style="green"),
        MofNCompleteColumn(),
        TextColumn("[dim]{task.fields[rate]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[metrics]}"),
    )
    with Progress(*columns, console=con, refresh_per_second=5, expand=True) as bar:
        task = bar.add_task(phase, total=total, completed=start, rate="", metrics="")

        def show(done: int, metrics: dict[str, float]) -> None:
            rate = speed(bar.tasks[task].finished_speed or bar.tasks[task].speed)
            bar.update(task, completed=done, rate=rate, metrics=brief(metrics))

        yield show


def _plain(con: Console, phase: str, start: int, total: int) -> Callable[[int, dict[str, float]], None]:
    began = last = time.monotonic()

    def show(done: int, metrics: dict[str, float]) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < PLAIN_EVERY and done not in (start + 1, total):
            return
        last = now
        rate = (done - start) / max(now - began, 1e-9)
        left = f"{duration((total - done) / rate)} left" if done < total else f"took {duration(now - began)}"
        line = f"{phase} {done}/{total} · {speed(rate)} · {left} · {brief(metrics)}"
        con.print(line, markup=False, highlight=False, soft_wrap=True)

    return show


def memory(con: Console, rows: list[dict[str, Any]]) -> None:
    table = Table("memory", title="memory, predicted and measured", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("predicted", "measured", "error"):
        table.add_column(name, justify="right")
    for row in rows:
        predicted, measured = row["predicted"], row["measured"]
        error = f"{predicted / measured - 1:+.1%}" if predicted is not None and measured else "–"
        if predicted == measured:
            error = "exact"
        table.add_row(row["name"], size(predicted), size(measured), error)
    con.print(table)


def samples(con: Console, title: str, rows: list[dict[str, Any]]) -> None:
    from rich.text import Text

    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(title=title, title_justify="left", box=box.ROUNDED, show_lines=True, border_style="dim")
    for name in names:
        table.add_column(name, overflow="fold", ratio=1)
    for row in rows:
        table.add_row(*(Text(str(row.get(name, ""))) for name in names))
    con.print(table)


def closing(con: Console, summary: dict[str, Any], judged: dict[str, dict[str, Any]], folder: Path) -> None:
    table = Table("result", title="results", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("value", "baseline", "target", ""):
        table.add_column(name, justify="right")
    marks = {True: "[green]reached[/]", False: "[red]missed[/]", None: "–"}
    for name, value in summary["metrics"].items():
        j = judged.get(name, {"error": None, "baseline": None, "target": None, "passed": None, "higher": True})
        sign = "≥ " if j["higher"] else "≤ "
        target = sign + number(j["target"]) if j["target"] is not None else "–"
        mark = "equal" if j["target"] is None and value == j["baseline"] else marks[j["passed"]]
        table.add_row(name, uncertain(value, j["error"]), number(j["baseline"]), target, mark)
    con.print(table)
    verdict = {True: "[bold green]all targets reached[/]", False: "[bold red]a target was missed[/]"}
    con.print(
        f"{verdict.get(summary['passed'], 'no target set')} · {duration(summary['seconds'])} · "
        f"peak memory {size(summary['peak_rss_bytes'])}\n{short(folder)}",
        highlight=False,
        soft_wrap=True,
    )


def brief(metrics: dict[str, float]) -> str:
    """The first three metrics, on one line."""
    return " ".join(f"{name} {number(value)}" for name, value in list(metrics.items())[:3])


def number(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def uncertain(value: Any, error: float | None) -> str:
    """value ± its standard error, both to the error's first two digits."""
    if not error:
        return number(value) if error is None else f"{number(value)} ± 0"
    decimals = max(0, 1 - math.floor(math.log10(error)))
    if decimals > 6:
        return f"{value:.4g} ± {error:.2g}"
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def speed(rate: float | None) -> str:
    if not rate:
        return "–"
    return f"{rate:.3g} step/s" if rate >= 1 else f"{1 / rate:.3g} s/step"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: float | None) -> str:
    if count is None:
        return "–"
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000 or unit == "GB":
            return f"{count:.0f} B" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    raise AssertionError


def short(path: Path) -> str:
    """The path from here, where it lies below."""
    path = Path(path).resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
