"""Terminal output: wrapped text, tables, a run's header and progress. Numbers are never truncated: a table that is too
wide becomes a list, and a progress line drops its metrics first and then its bar.

Texts are printed literally: rich markup in them is not interpreted.
"""

import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import zip_longest
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

if TYPE_CHECKING:
    from rich.progress import Task

    from finetune.runs.config import Config
    from finetune.runs.registry import ModuleInfo

PLAIN_EVERY = 5.0  # seconds between two lines of progress where there is no terminal
PIPED = 110  # columns where there is neither a terminal nor $COLUMNS
GAP = 2  # blanks between two columns
COLUMN = 45  # columns of the screen that a text needs to stand next to another

Cell = str | tuple[str, str]  # text, or text and its style


class Output:
    """stdout or stderr that survives a closed pipe: `run … | head` must not end the run silently."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.closed_by_reader = stream, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        if not self.closed_by_reader:
            try:
                return int(self.stream.write(text))
            except BrokenPipeError:
                self._go_on()
        return len(text)

    def flush(self) -> None:
        if not self.closed_by_reader:
            try:
                self.stream.flush()
            except BrokenPipeError:
                self._go_on()

    def _go_on(self) -> None:
        self.closed_by_reader = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())  # what is buffered goes there too
        if self.stream is not sys.stderr:
            with suppress(OSError):
                print("nobody reads the output any more; continuing without it", file=sys.stderr)


def console(stderr: bool = False, unread: bool = False) -> Console:
    """A rich console. `unread`: printing continues silently after the reader has closed the pipe."""
    stream: Any = sys.stderr if stderr else sys.stdout
    known = stream.isatty() or os.environ.get("COLUMNS", "").isdigit()
    return Console(file=cast(IO[str], Output(stream) if unread else stream), width=None if known else PIPED)


# --- text

WIDE = "\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef\u3000-\u303f"  # Chinese: a line may end behind each character, but
CLOSING, OPENING = "，。、；：！？）》」』”’…", "（《「『“‘"  # none begins with the former or ends with the latter
UNIT = re.compile(rf"(\s*)([{OPENING}]*(?:[{WIDE}]|[^\s{WIDE}]+)[{CLOSING}]*)")
LONG = 12  # columns; a longer word may be split …
SOFT = re.compile(r"(?<=[/_|])|(?<=-)(?=[a-z])|(?<=,)(?!\d{3}(?!\d))")  # … here


def wrap(text: str, width: int, indent: str = "") -> list[str]:
    """Lines of the text, wrapped between words at `width` columns; all but the first begin with `indent`. Only a word
    wider than a line is split, at SOFT where possible."""
    lines = []
    for paragraph in text.split("\n"):
        line, empty = "", True
        for blank, word in UNIT.findall(paragraph):
            if not empty and cell_len(line + blank + word) > width:
                lines.append(line)
                line, blank = indent, ""
            line += blank + word
            empty = False
            while cell_len(line) > width > len(indent):
                at = _cut(line, width, len(indent))
                lines.append(line[:at])
                line = indent + line[at:]
        lines.append(line)
    return lines


def _cut(line: str, width: int, start: int) -> int:
    """Index at which a word wider than the line is split."""
    full = next(i for i in range(len(line)) if cell_len(line[: i + 1]) > width)
    return max(
        [m.end() for m in SOFT.finditer(line, start + 1, full + 1) if m.end() <= full], default=max(full, start + 1)
    )


def _least(text: str) -> int:
    """Least width at which no word is split, except long ones at SOFT; slightly more for Chinese."""
    least = min(LONG, cell_len(text)) if cell_len(text) > len(text) else 0
    for _, word in UNIT.findall(text):
        parts = SOFT.split(word) if cell_len(word) > LONG else [word]
        least = max(least, *(cell_len(part) for part in parts), min(LONG, cell_len(word)))
    return least


def say(con: Console, text: str, style: str = "", indent: str = "") -> None:
    """Prints text wrapped by words at the console's width."""
    for line in wrap(text, con.width, indent):
        con.print(Text(line, style), soft_wrap=True)


# --- tables


def table(
    con: Console, heads: Sequence[str], rows: Iterable["list[Cell] | Cell"], title: str = "", apart: bool = False
) -> None:
    """Prints a table; `apart`: with an empty line between rows. A head that begins with ">" is a column of numbers:
    right-aligned, never wrapped; all other cells wrap between words. A row that is a cell rather than a list spans all
    columns. Where even one word per line is too wide for the console, each row becomes a list of "head: cell"."""
    numeric = [head.startswith(">") for head in heads]
    names: list[tuple[str, str]] = [(head.removeprefix(">"), "bold") for head in heads]
    body = [[_pair(cell) for cell in row] if isinstance(row, list) else _pair(row) for row in rows]
    columns = list(zip(names, *(row for row in body if isinstance(row, list)), strict=True))
    widths = _widths([[text for text, _ in cells] for cells in columns], numeric, con.width - GAP * (len(heads) - 1))
    if title:
        say(con, f"\n{title}", "bold")
    if widths:
        _row(con, names, widths, numeric)
        con.print(Text("─" * (sum(widths) + GAP * (len(heads) - 1)), "dim"), soft_wrap=True)
    for i, row in enumerate(body):
        if i and apart:
            con.print()
        if not isinstance(row, list):
            say(con, *row, indent=" " * (len(row[0]) - len(row[0].lstrip()) or 2))
        elif widths:
            _row(con, row, widths, numeric)
        else:
            _record(con, [name for name, _ in names], row, named=numeric[0])
    con.print()


def _pair(cell: Cell) -> tuple[str, str]:
    return (cell, "") if isinstance(cell, str) else cell


def _widths(columns: list[list[str]], numeric: list[bool], room: int) -> list[int] | None:
    """Widths of the columns: full, or what the minimum widths of the others leave; None if those are too wide."""
    wanted = [max(cell_len(line) for text in cells for line in text.split("\n")) for cells in columns]
    least = [
        want if number else max(map(_least, cells))
        for want, number, cells in zip(wanted, numeric, columns, strict=True)
    ]
    if sum(least) > room:
        return None
    widths = least
    for level in range(1, max(wanted) + 1):
        wider = [max(low, min(want, level)) for low, want in zip(least, wanted, strict=True)]
        if sum(wider) > room:
            break
        widths = wider
    return widths


def _row(con: Console, cells: Sequence[tuple[str, str]], widths: list[int], numeric: list[bool]) -> None:
    parts = [wrap(text, width) for (text, _), width in zip(cells, widths, strict=True)]
    for i in range(max(map(len, parts))):
        line = Text()
        for part, (_, style), width, number in zip(parts, cells, widths, numeric, strict=True):
            text = part[i] if i < len(part) else ""
            blanks = " " * (width - cell_len(text))
            line.append(" " * GAP if line else "").append(blanks + text if number else text + blanks, style)
        line.rstrip()
        con.print(line, soft_wrap=True)


def _record(con: Console, names: list[str], cells: list[tuple[str, str]], named: bool) -> None:
    """Prints a row as a list of "head: cell"; `named`: also the first cell shows its head."""
    for i, (name, (text, style)) in enumerate(zip(names, cells, strict=True)):
        if text:
            say(con, f"{name}: {text}" if (i or named) and name else text, style or ("" if i else "bold"), indent="  ")


# --- a run


def header(con: Console, info: "ModuleInfo", cfg: "Config", folder: Path, toy: bool, resumed: bool) -> None:
    from finetune.runs import machine

    setting = f"{'toy' if toy else 'default'}, {cfg.steps} steps, seed {cfg.seed}{', resumed' if resumed else ''}"
    device = f"{getattr(cfg, 'device', 'cpu')} ({machine.cpu_name()}), {cfg.threads} thread{'s'[: cfg.threads > 1]}"
    rows = (("module", f"{info.title} — {info.summary}"), ("setting", setting), ("device", device))
    lines = Text()
    for name, text in (*rows, ("folder", short(folder))):
        for i, part in enumerate(wrap(text, con.width - 4 - 9)):
            lines.append("\n" if lines else "").append(f"{'' if i else name:<9}", "dim").append(part)
    con.print(Panel(lines, title=f"[bold]{info.name}[/]", title_align="left", border_style="cyan", box=box.ROUNDED))


@contextmanager
def progress(con: Console, phase: str, start: int, total: int) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """Context that yields show(done, metrics): a live bar on a terminal, a line every few seconds elsewhere."""
    if start:
        say(con, f"{phase}: continuing after step {start} of {total}")
    if not con.is_terminal:
        yield _plain(con, phase, start, total)
        return
    from rich.progress import Progress

    class Bar(Progress):
        def make_tasks_table(self, tasks: Iterable["Task"]) -> Any:
            return Text("\n").join(bar(task, con.width) for task in tasks)

    with Bar(console=con, refresh_per_second=5) as live:
        task = live.add_task(phase, total=total, completed=start, metrics={})
        yield lambda done, metrics: live.update(task, completed=done, metrics=dict(metrics))


def bar(task: "Task", width: int) -> Text:
    """One progress line: phase, bar, count, rate, time left, metrics. A narrow terminal drops first the metrics, then
    the bar, and then puts the phase on its own line; count, rate and time are always complete."""
    done, total = int(task.completed), int(task.total or 0)
    took = task.finished_time if task.finished else task.time_remaining
    left = "" if took is None else f"{clock(took)} {'taken' if task.finished else 'left'}"
    rate = speed(task.finished_speed or task.speed)
    counts = "  ".join(part for part in (f"{done}/{total}", rate, left) if part)
    line = Text(task.description, "bold")
    free = width - cell_len(task.description) - len(counts) - 2
    metrics = ""
    for count in range(SHOWN, 0, -1):
        metrics = "  " + brief(task.fields["metrics"], count)
        if len(metrics.strip()) and len(metrics) + BAR + 2 <= free:
            free -= len(metrics)
            break
        metrics = ""
    if free >= 6:  # blanks, and a bar of four or more
        long = min(free - 2, 2 * BAR)
        full = long * done // max(total, 1)
        line.append("  ").append("━" * full, "green" if task.finished else "cyan").append("━" * (long - full), "dim")
    line.append("\n" if free < 0 else "  ").append(counts, "dim").append(metrics)
    return line


BAR, SHOWN = 12, 3  # columns of a bar that leaves room for metrics; number of metrics


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
        line = " · ".join(filter(None, (f"{phase} {done}/{total}", speed(rate), left, brief(metrics))))
        con.print(line, markup=False, highlight=False, soft_wrap=True)

    return show


def memory(con: Console, rows: list[dict[str, Any]]) -> None:
    shown: list[Any] = []
    for row in rows:
        predicted, measured = row["predicted"], row["measured"]
        error = f"{predicted / measured - 1:+.1%}" if predicted is not None and measured else "–"
        if predicted == measured:
            error = "exact"
        shown.append([row["name"], size(predicted), size(measured), error])
    table(con, ("memory", ">predicted", ">measured", ">error"), shown, "memory, predicted and measured")


def samples(con: Console, title: str, rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    table(con, names, [[str(row.get(name, "")) for name in names] for row in rows], title, apart=True)


def closing(con: Console, summary: dict[str, Any], judged: dict[str, dict[str, Any]], folder: Path) -> None:
    """Prints the results, those with a target first (only they are "reached" or "missed"), and the checks."""
    marks: dict[Any, Cell] = {True: ("reached", "green"), False: ("missed", "red"), None: "–"}
    rows: tuple[list[Any], list[Any]] = [], []
    for name, value in summary["metrics"].items():
        j = {"error": None, "baseline": None, "target": None, "passed": None, "higher": True} | judged.get(name, {})
        aimed = j["target"] is not None
        target = ("≥ " if j["higher"] else "≤ ") + number(j["target"]) if aimed else "–"
        mark = marks[j["passed"]] if aimed else "equal" if value == j["baseline"] else "–"
        rows[not aimed].append([name, uncertain(value, j["error"]), number(j["baseline"]), target, mark])
    table(con, ("result", ">value", ">baseline", ">target", ""), [*rows[0], *rows[1]], "results")
    verdict: Any = {True: ("all targets reached", "bold green"), False: ("a target was missed", "bold red")}
    text = verdict.get(summary["passed"], ("no target set", ""))
    rest = f" · {duration(summary['seconds'])} · peak memory {size(summary['peak_rss_bytes'])}"
    con.print(Text.assemble(text, rest), soft_wrap=True)
    bounded = {name: row for name, row in summary.get("checks", {}).items() if {"at_least", "at_most"} & set(row)}
    for name, row in bounded.items():
        if not row["passed"]:
            low = row["value"] < row.get("at_least", row["value"])
            limit = f"at least {number(row['at_least'])}" if low else f"at most {number(row['at_most'])}"
            say(con, f"check failed: {name} is {number(row['value'])}, must be {limit}", "red", indent="  ")
    if bounded:
        holding = sum(row["passed"] for row in bounded.values())
        say(con, f"{holding} of {len(bounded)} checks hold (`checks` in summary.json)", indent="  ")
    if pictures := sorted(path.name for path in folder.glob("*.png")):
        say(con, f"pictures: {', '.join(pictures)}", indent="  ")
    con.print(Text(short(folder)), soft_wrap=True)


def side_by_side(con: Console, title: str, texts: Mapping[str, str]) -> None:
    """Prints texts by name: two in columns where there is room, else one below the other."""
    say(con, f"\n{title}", "bold")
    width = (con.width - GAP) // 2
    if len(texts) == 2 and width >= COLUMN:
        heads, bodies = ([wrap(text, width) for text in part] for part in (texts, texts.values()))
        line = "─" * width
        for one, other in [*zip_longest(*heads, fillvalue=""), (line, line), *zip_longest(*bodies, fillvalue="")]:
            con.print(Text(f"{one}{' ' * (width + GAP - cell_len(one))}{other}".rstrip()), soft_wrap=True)
    else:
        for name, text in texts.items():
            say(con, name, "dim")
            for line in wrap(text, con.width - GAP):
                con.print(Text(f"{' ' * GAP}{line}".rstrip()), soft_wrap=True)
    con.print()


def commands(con: Console, rows: Sequence[tuple[str, str]]) -> None:
    """Prints what can be done next: for each (what for, words), a line that can be copied."""
    if rows:
        con.print()
    for what, words in rows:
        con.print(Text.assemble((f"# {what}\n", "dim"), f"python -m finetune {words}"), soft_wrap=True)


def brief(metrics: dict[str, float], count: int = SHOWN) -> str:
    """The first metrics, on one line."""
    return " ".join(f"{name} {number(value)}" for name, value in list(metrics.items())[:count])


def number(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def uncertain(value: Any, error: float | None) -> str:
    """value ± its standard error, both to the error's first two digits."""
    if not error or math.isnan(error):
        return number(value) if error != 0 else f"{number(value)} ± 0"
    decimals = max(0, 1 - math.floor(math.log10(error)))
    if decimals > 6:
        return f"{value:.4g} ± {error:.2g}"
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def speed(rate: float | None) -> str:
    if not rate:
        return "–"
    return f"{rate:.3g} step/s" if rate >= 1 else f"{1 / rate:.3g} s/step"


def clock(seconds: float) -> str:
    """h:mm:ss, without the hours where there are none."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


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
    """The path relative to the current folder, if it is below it."""
    path = Path(path).resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
