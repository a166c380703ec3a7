"""The module's pictures: returns by set, the gap that CQL reduces, believed values against true returns."""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

import numpy as np

from finetune.rl.agents.log_alone import HeldOut
from finetune.rl.statistics import standard_error
from finetune.runs.plots import GREY, INK, figure, save
from finetune.runs.run import Run

from .evaluation import Estimate, Judged

COLORS = {"bc": "#8a6d3b", "naive": "#c53030", "cql": "#1769aa"}
LABELS = {"bc": "behavior cloning", "naive": "naive Q-learning", "cql": "CQL"}
POINTS = 1500  # of a scatter plot


def plot_returns(run: Run, sets: list[str]) -> None:
    """returns.png: mean return at each evaluation, a chart for each set."""
    series = run.metrics.series()
    made, grid = figure(4.2 * len(sets), 3.8, 1, len(sets))
    for axes, name in zip(grid, sets, strict=True):
        for key, color in COLORS.items():
            xs, ys = series[f"{name}: return_{key}"]
            axes.plot([x + 1 for x in xs], ys, color=color, linewidth=1.8, marker="o", markersize=4, label=LABELS[key])
        label(axes, f"{name}: return", "step")
    grid[0].legend(fontsize=8.5, frameon=False)
    save(made, run.dir / "returns.png")


def plot_gaps(run: Run, sets: list[str]) -> None:
    """gaps.png: the gap (soft maximum of Q minus Q of the logged action), and Q of the logged actions."""
    series = run.metrics.series()
    made, grid = figure(4.2 * len(sets), 6.6, 2, len(sets))
    for i, name in enumerate(sets):
        for row, (metric, title) in enumerate((("gap", "gap"), ("value", "Q of the logged actions"))):
            axes = grid[row * len(sets) + i]
            curves = {key: series.get(f"{name}: {metric}_{key}", ([], [])) for key in ("naive", "cql")}
            for key, (xs, ys) in curves.items():
                if xs:
                    axes.plot([x + 1 for x in xs], ys, color=COLORS[key], linewidth=1.8, label=LABELS[key])
            if max(y for _, ys in curves.values() for y in ys) > 1000:
                axes.set_yscale("symlog", linthresh=10)
            label(axes, f"{name}: {title}", "step")
    grid[0].legend(fontsize=8.5, frameon=False)
    save(made, run.dir / "gaps.png")


def plot_values(run: Run, found: dict[str, dict[str, Estimate]]) -> None:
    """values.png: a learner's own value of each state against the discounted return from there; stars are the starts,
    crosses their values by fitted Q evaluation."""
    made, grid = figure(4.2 * len(found), 7.6, 2, len(found))
    for i, (name, estimates) in enumerate(found.items()):
        for row, key in enumerate(("naive", "cql")):
            axes, e = grid[row * len(found) + i], estimates[key]
            assert e.values is not None
            assert e.believed is not None
            believed, true = e.values.numpy(), e.returns_to_go.numpy()
            if len(true):
                at = np.linspace(0, len(true) - 1, min(POINTS, len(true))).astype(int)
                axes.scatter(true[at], believed[at], s=5, alpha=0.35, color=COLORS[key], linewidths=0,
                             label="states on the way")  # fmt: skip
            axes.scatter([e.true], [e.believed], s=70, color=INK, marker="*", zorder=3, label="starts, believed")
            if e.fqe is not None:
                axes.scatter([e.true], [e.fqe], s=55, color=INK, marker="x", zorder=3, label="starts, by FQE")
            low, high = min([*true, e.true, 0.0]), max([*true, e.true, 0.0])
            room = 0.1 * max(high - low, 1.0)
            axes.plot([low - room, high + room], [low - room, high + room], color=GREY, linestyle="--", linewidth=1.2,
                      label="believed = true")  # fmt: skip
            size = max(abs(low), abs(high))
            if size and max(believed.max(initial=0.0), e.believed) > 10 * size:
                axes.set_yscale("symlog", linthresh=size)
            label(axes, f"{name}: {LABELS[key]}", "discounted return")
            if i == 0:
                axes.set_ylabel("believed value", color=INK)
    grid[0].legend(fontsize=8, frameon=False)
    save(made, run.dir / "values.png")


def plot_judged(run: Run, judged: Judged, held: HeldOut) -> None:
    """values.png of a log alone: each policy's value by fitted Q evaluation (± a standard error) and its own belief;
    the line is what the behavior policy earned."""
    made, (axes,) = figure(6.2, 4.2)
    for i, (name, values) in enumerate(judged.fqe.items()):
        error = standard_error(values.tolist())
        axes.errorbar([i], [float(values.mean())], yerr=[0.0 if math.isnan(error) else error], fmt="o",
                      color=COLORS.get(name, INK), capsize=4, label="FQE" if name == "cql" else None)  # fmt: skip
        if name in judged.believed:
            axes.plot([i], [judged.believed[name]], "^", color=COLORS.get(name, INK), fillstyle="none",
                      label="believed" if name == "cql" else None)  # fmt: skip
    if held.returns:
        axes.axhline(fmean(held.returns), color=GREY, linestyle="--", linewidth=1.2, label="the log's return")
    axes.set_xticks(range(len(judged.fqe)), [LABELS.get(name, name) for name in judged.fqe], fontsize=8.5)
    label(axes, "discounted value of held-out starts", "")
    axes.legend(fontsize=8.5, frameon=False)
    save(made, run.dir / "values.png")


def label(axes: Any, title: str, x: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_xlabel(x, color=INK)
