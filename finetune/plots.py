"""training_curves.png: every logged series as a small chart of its own. And what a module's own pictures begin with."""

import math
import statistics
from pathlib import Path
from typing import Any

from finetune.checkpoint import atomic_write

INK, FAINT, LINE, GOOD, GREY = "#1f2933", "#9fb3c8", "#1769aa", "#2e7d32", "#8a6d3b"


def training_curves(
    path: Path,
    title: str,
    series: dict[str, tuple[list[int], list[float]]],
    baseline: dict[str, float] | None = None,
    target: dict[str, float] | None = None,
) -> None:
    """Writes the picture. Dense series show raw values faintly and their moving average; sparse ones show points.

    A judged metric of the same name as a series adds its baseline and target as level lines.
    """
    from matplotlib.ticker import MaxNLocator

    columns = {1: 1, 2: 2, 4: 2}.get(len(series), 3)
    rows = math.ceil(len(series) / columns)
    made, grid = figure(0.6 + 4.2 * columns, 0.7 + 2.7 * rows, rows, columns)
    made.suptitle(title, fontsize=13, color=INK, fontweight="bold")
    for axes, (name, (xs, ys)) in zip(grid, series.items(), strict=False):
        dense = len(xs) > 30
        smooth = moving_average(ys, max(3, len(ys) // 25)) if dense else ys
        if dense:
            axes.plot(xs, ys, color=FAINT, linewidth=0.8, alpha=0.7, label="each step")
        axes.plot(xs, smooth, color=LINE, linewidth=1.8, marker=None if dense else "o", markersize=4,
                  label="moving average" if dense else None)  # fmt: skip
        for values, label, colour in ((baseline, "baseline", GREY), (target, "target", GOOD)):
            if values and name in values:
                axes.axhline(
                    values[name], color=colour, linewidth=1.2, linestyle="--", label=f"{label} {values[name]:.4g}"
                )
        if _spans_decades(ys):
            axes.set_yscale("log")
        axes.set_title(name, fontsize=10.5, color=INK, loc="left")
        axes.set_xlabel("step", fontsize=9, color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.tick_params(labelsize=8)
        axes.margins(x=0.02, y=0.08)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7.5, frameon=False)
    for axes in grid[len(series) :]:
        axes.set_visible(False)
    made.savefig(path, format="png")


def figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, list[Any]]:
    """A figure (in inches) and its axes, row by row, in the style of all pictures here."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), dpi=120, layout="constrained")
    grid = list(made.subplots(rows, columns, squeeze=False).flat)
    for axes in grid:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color="#e4e7eb", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=9, colors=INK)
    return made, grid


def save(made: Any, path: Path) -> None:
    """The figure as a PNG, whole or not at all."""
    with atomic_write(path) as temporary:
        made.savefig(temporary, format="png")


def moving_average(ys: list[float], width: int) -> list[float]:
    """Mean of the values at most width/2 away: centred, so that it does not lag behind the raw curve."""
    half = width // 2
    total = [0.0]
    for y in ys:
        total.append(total[-1] + y)
    ends = [(max(0, i - half), min(len(ys), i + half + 1)) for i in range(len(ys))]
    return [(total[b] - total[a]) / (b - a) for a, b in ends]


def _spans_decades(ys: list[float]) -> bool:
    """Whether the bulk of a positive series covers a factor above 100, so that a linear axis would hide it."""
    if len(ys) < 10 or min(ys) <= 0:
        return False
    cuts = statistics.quantiles(ys, n=20)
    return cuts[-1] / cuts[0] > 100
