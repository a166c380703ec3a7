"""Plots: training_curves.png of the logged metrics, memory.png, and the figure style of the modules' own plots."""

import math
import re
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

from finetune.runs.checkpoint import atomic_write

INK, FAINT, LINE, GOOD, GREY = "#1f2933", "#9fb3c8", "#1769aa", "#2e7d32", "#8a6d3b"


def training_curves(
    path: Path,
    title: str,
    series: dict[str, tuple[list[int], list[float]]],
    baseline: dict[str, float] | None = None,
    target: dict[str, float] | None = None,
    higher: dict[str, bool] | None = None,
) -> None:
    """Writes the picture. Dense noisy series show raw values faintly and their moving average; sparse ones show points.
    A metric logged fewer than three times is not drawn as a curve: its values are listed at the end.

    Repetitions (phases that differ by a number at their end) share a chart. A judged metric of the same name as a
    series adds its baseline and target as horizontal lines, or as text where they are far outside the plot.
    """
    from matplotlib.ticker import MaxNLocator

    charts: dict[str, list[tuple[list[int], list[float]]]] = {}
    for name, points in series.items():
        charts.setdefault(re.sub(r"_\d+(?=: )", "", name), []).append(points)
    few = {name: lines for name, lines in charts.items() if all(len(xs) < CURVE for xs, _ in lines)}
    charts = {name: lines for name, lines in charts.items() if name not in few}
    lists = [list(few.items())[i : i + LISTED] for i in range(0, len(few), LISTED)]
    panels = len(charts) + len(lists)
    columns = {1: 1, 2: 2, 4: 2}.get(panels, 3)
    rows = math.ceil(panels / columns)
    made, grid = figure(0.6 + 4.2 * columns, 0.7 + 2.7 * rows, rows, columns)
    made.suptitle(title, fontsize=13, color=INK, fontweight="bold")
    for axes, (name, lines) in zip(grid, charts.items(), strict=False):
        for xs, ys in lines:
            dense, alone = len(xs) > 30 and _noisy(ys), len(lines) == 1
            smooth = moving_average(ys, max(3, len(ys) // 25)) if dense else ys
            if dense and alone:
                axes.plot(xs, ys, color=FAINT, linewidth=0.8, alpha=0.7, label="each step")
            axes.plot(xs, smooth, color=LINE, linewidth=1.8 if alone else 1.0, marker=None if len(xs) > 30 else "o",
                      markersize=4, label="moving average" if dense and alone else None)  # fmt: skip
        if all(_spans_decades(ys) for _, ys in lines):
            axes.set_yscale("log")
        sign = {None: "", True: "≥ ", False: "≤ "}[(higher or {}).get(name)]
        values = [y for _, ys in lines for y in ys if math.isfinite(y)]
        if baseline and name in baseline:
            _level(axes, values, baseline[name], "baseline ", GREY)
        if target and name in target:
            _level(axes, values, target[name], f"target {sign}", GOOD)
        axes.set_title(
            name if len(lines) == 1 else f"{name}, {len(lines)} repetitions", fontsize=10.5, color=INK, loc="left"
        )
        axes.set_xlabel("step", fontsize=9, color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.tick_params(labelsize=8)
        axes.margins(x=0.02, y=0.08)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7.5, framealpha=0.85, edgecolor="none")
    for axes, part in zip(grid[len(charts) :], lists, strict=False):
        _list(axes, part)
    for axes in grid[panels:]:
        axes.set_visible(False)
    made.savefig(path, format="png")


CURVE, LISTED = 3, 12  # points that make a curve; names in a list


def _level(axes: Any, values: list[float], level: float, label: str, color: str) -> None:
    """A horizontal line, or only its number in the legend where the line would compress the curve."""
    low, high = min(values, default=level), max(values, default=level)
    if axes.get_yscale() == "log":
        near = level > 0 and low / 100 <= level <= high * 100
    else:
        near = low - 2 * (high - low) <= level <= high + 2 * (high - low)
    if near:
        axes.axhline(level, color=color, linewidth=1.2, linestyle="--", label=f"{label}{level:.4g}")
    else:
        side = "below" if level < low else "above"
        axes.plot([], [], " ", label=f"{label}{level:.4g}, far {side}")


def _list(axes: Any, charts: list[tuple[str, list[tuple[list[int], list[float]]]]]) -> None:
    axes.set_axis_off()
    axes.set_title("logged once or twice", fontsize=10.5, color=INK, loc="left")
    for i, (name, lines) in enumerate(charts):
        text = ", ".join(f"{y:.4g}" for _, ys in lines for y in ys)
        y = 1 - (i + 0.5) / LISTED
        axes.text(0, y, name, fontsize=8, color=INK, va="center", transform=axes.transAxes)
        axes.text(1, y, text, fontsize=8, color=LINE, va="center", ha="right", transform=axes.transAxes)


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
    """Mean of the finite values at most width/2 away, NaN without any: centered, so that it does not lag behind the raw
    curve. Each window is summed separately: a difference of prefix sums loses precision after one large value."""
    import numpy as np

    y, half = np.asarray(ys, np.float64), max(0, min(width // 2, len(ys) - 1))
    finite = np.isfinite(y)
    known = np.where(finite, y, 0.0)
    total, count = np.zeros(len(y)), np.zeros(len(y))
    for shift in range(-half, half + 1):
        to, of = slice(max(0, -shift), len(y) - max(0, shift)), slice(max(0, shift), len(y) - max(0, -shift))
        total[to] += known[of]
        count[to] += finite[of]
    return list(np.divide(total, count, out=np.full(len(y), math.nan), where=count > 0))


def _noisy(ys: list[float]) -> bool:
    """Whether a series turns more than twice. A schedule, such as that of lr, does not: it is drawn as it is."""
    steps = [b - a for a, b in pairwise(ys) if b != a]
    return sum((a > 0) != (b > 0) for a, b in pairwise(steps)) > 2


def _spans_decades(ys: list[float]) -> bool:
    """Whether the bulk of a series that is never negative covers a factor above 100, so that a linear axis would hide
    it. A log axis omits zeros."""
    some = sorted(y for y in ys if y > 0 and math.isfinite(y))
    if len(some) < CURVE or any(y < 0 for y in ys):
        return False
    cuts = statistics.quantiles(some, n=20) if len(some) >= 10 else some
    return cuts[-1] / cuts[0] > 100


TERMS = {"weights": "#1769aa", "optimizer states": "#5aa469", "gradients": "#d98e2b", "activations": "#b5493a",
         "logits": "#7d5ba6", "KV cache": "#2a9d8f"}  # fmt: skip
OTHERS = ("#8a6d3b", "#c06c9b", "#6b7f99", "#b8b03a", "#4f4f4f")
AT_ONCE, GROWS = "step growth", ("gradients", "activations", "logits")


def memory(path: Path, title: str, rows: list[dict[str, Any]], other: str = "measured") -> None:
    """Writes the picture: for each group of rows (the part before ": " in their names) two stacked bars, predicted
    above `other`, of the rows that have both.

    The row "step growth" is not stacked, since gradients, activations and logits never have their full sizes at the
    same time: it is drawn as a line at the peak of the step.
    """
    groups: dict[str, dict[str, tuple[int, int]]] = {}
    for row in rows:
        if row["predicted"] is not None and row["measured"] is not None:
            group, _, name = row["name"].rpartition(": ")
            groups.setdefault(group, {})[name] = row["predicted"], row["measured"]
    if not groups:
        return
    names = [*dict.fromkeys(name for group in groups.values() for name in group if name != AT_ONCE)]
    more = iter(OTHERS * len(names))
    colors = {name: TERMS.get(name) or next(more) for name in names}
    highest = max(sum(parts[i] for n, parts in g.items() if n != AT_ONCE) for g in groups.values() for i in (0, 1))
    scale, unit = next(((s, u) for s, u in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if highest >= s), (1.0, "B"))

    made, (axes,) = figure(9.6, 1.5 + 0.62 * len(groups) + 0.2 * (len(names) // 4))
    for y, group in enumerate(groups.values()):
        for i, side in enumerate((-0.19, 0.19)):
            left = 0.0
            for name in names:
                width = group.get(name, (0, 0))[i] / scale
                axes.barh(y + side, width, 0.36, left, color=colors[name], alpha=(0.55, 1.0)[i], linewidth=0)
                if width > 0.06 * highest / scale:
                    axes.text(left + width / 2, y + side, f"{width:.3g}", ha="center", va="center", fontsize=8,
                              color=(INK, "white")[i])  # fmt: skip
                left += width
            if AT_ONCE in group:
                peak = sum(parts[i] for n, parts in group.items() if n not in GROWS) / scale
                axes.vlines(peak, y + side - 0.18, y + side + 0.18, color=INK, linewidth=1.8)
    axes.set_yticks(range(len(groups)), groups, fontsize=9)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_xlim(0, 1.03 * highest / scale)
    for name in names:
        axes.barh(0, 0, color=colors[name], label=name)
    if any(AT_ONCE in group for group in groups.values()):
        axes.plot([], [], color=INK, linewidth=1.8, label="peak of a step")
    made.legend(fontsize=8.5, frameon=False, loc="outside lower center", ncols=5)
    axes.set_title(f"{title}: above predicted, below {other}", fontsize=11, color=INK, fontweight="bold", loc="left")
    axes.set_xlabel(unit, fontsize=9, color=INK)
    axes.grid(False, axis="y")
    save(made, path)
