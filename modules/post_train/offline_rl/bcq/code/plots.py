"""The module's pictures: learning curves, believed against true values, the sweep over τ, candidates in states of the
data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from finetune.runs.plots import GOOD, GREY, INK, figure, save
from finetune.runs.run import Run

COLORS = {"dqn": "#c53030", "td3": "#c53030", "bc": "#8a6d3b", "bcq": "#1769aa", "td3_bc": "#2e7d32",
           "iql": "#805ad5", "awac": "#d97706"}  # fmt: skip
SET_COLORS = ("#1769aa", "#2e7d32", "#d97706", "#805ad5", "#c53030")


Curves = dict[str, dict[str, tuple[list[int], list[float]]]]  # set → method → steps and values


def curves_of(series: dict[str, Any], column: str) -> Curves:
    """A column's series by set and method, of phases named set_method."""
    sets: Curves = {}
    for name, values in series.items():
        phase, _, what = name.partition(": ")
        if what == column:
            methods = [m for m in COLORS if phase.endswith(f"_{m}")]
            if methods:
                method = max(methods, key=len)
                sets.setdefault(phase.removesuffix(f"_{method}"), {})[method] = values
    return sets


def plot_returns(run: Run) -> None:
    """returns.png: return against updates, a panel for each set."""
    sets = curves_of(run.metrics.series(), "return")
    if not sets:
        return
    made, grid = figure(1 + 4.6 * len(sets), 4.2, 1, len(sets))
    for axes, (name, methods) in zip(grid, sets.items(), strict=True):
        for method, (xs, ys) in methods.items():
            axes.plot([x + 1 for x in xs], ys, color=COLORS[method], linewidth=2.6 if method == "bcq" else 1.4,
                      label=method, marker="o", markersize=3)  # fmt: skip
        axes.set_title(f"{name}: true return", loc="left", fontsize=11, color=INK)
        axes.set_xlabel("update", color=INK)
        axes.legend(fontsize=8.5, frameon=False)
    save(made, run.dir / "returns.png")


def plot_values(run: Run) -> None:
    """values.png: each method's own value of the starts (solid) and the true discounted return (dotted)."""
    series = run.metrics.series()
    believed, true = curves_of(series, "believed"), curves_of(series, "true")
    if not (believed and true):
        return
    made, grid = figure(1 + 4.6 * len(believed), 4.2, 1, len(believed))
    for axes, (name, methods) in zip(grid, believed.items(), strict=True):
        for method, (xs, ys) in methods.items():
            steps = [x + 1 for x in xs]
            axes.plot(steps, ys, color=COLORS[method], linewidth=2, label=f"{method}: Q")
            axes.plot(steps, true[name][method][1], color=COLORS[method], linewidth=1.4, linestyle=":",
                      label=f"{method}: true")  # fmt: skip
        use_log_scale_if_wide(axes)
        axes.set_title(f"{name}: value of the start", loc="left", fontsize=11, color=INK)
        axes.set_xlabel("update", color=INK)
        axes.legend(fontsize=8, frameon=False)
    save(made, run.dir / "values.png")


def plot_evaluations(run: Run, found: dict[str, dict[str, dict[str, float]]]) -> None:
    """evaluations.png: value of the starts by method: true return, the method's own Q, fitted Q evaluation."""
    made, grid = figure(1 + 4.2 * len(found), 4.2, 1, len(found))
    marks = (("true", "s", GOOD), ("fqe", "o", SET_COLORS[0]), ("believed", "^", COLORS["dqn"]))
    for axes, (name, methods) in zip(grid, found.items(), strict=True):
        for column, mark, color in marks:
            there = [(i, each[column]) for i, each in enumerate(methods.values()) if column in each]
            if there:
                axes.plot(*zip(*there, strict=True), mark, color=color, markersize=7, label=column)
        axes.set_xticks(range(len(methods)), list(methods))
        use_log_scale_if_wide(axes)
        axes.set_title(f"{name}: value of the start", loc="left", fontsize=11, color=INK)
        axes.legend(fontsize=8.5, frameon=False)
    save(made, run.dir / "evaluations.png")


def use_log_scale_if_wide(axes: Any) -> None:
    drawn = [y for line in axes.get_lines() for y in line.get_ydata()]
    if min(drawn) > 0 and max(drawn) > 20 * min(drawn):
        axes.set_yscale("log")


def plot_sweep(run: Run) -> None:
    """sweep.png: return against the threshold τ, from DQN at 0 to cloning at 1."""
    series = run.metrics.series()
    names = [name.removesuffix("_sweep: tau") for name in series if name.endswith("_sweep: tau")]
    if not names:
        return
    made, (axes,) = figure(7.2, 4.4)
    for name, color in zip(names, SET_COLORS * len(names), strict=False):
        taus, returns = series[f"{name}_sweep: tau"][1], series[f"{name}_sweep: return"][1]
        axes.plot(taus, returns, color=color, linewidth=2, marker="o", label=name)
    axes.set_xlabel("threshold τ", color=INK)
    axes.set_ylabel("return", color=INK)
    axes.text(0.0, 1.01, "DQN", transform=axes.transAxes, fontsize=9, color=INK)
    axes.text(1.0, 1.01, "cloning", transform=axes.transAxes, fontsize=9, color=INK, ha="right")
    axes.set_title("between DQN and cloning", loc="center", fontsize=11, color=INK)
    axes.legend(fontsize=9, frameon=False, title="data")
    save(made, run.dir / "sweep.png")


def plot_candidates(
    run: Run, name: str, observations: Tensor, logged: Tensor, proposed: Tensor, chosen: Tensor
) -> None:
    """candidates_NAME.png: in the same states the logged action, one proposal of the VAE, and BCQ's action."""
    pendulum = observations.shape[1] == 3  # cosine and sine of the angle, and the speed
    angles = torch.atan2(observations[:, 1], observations[:, 0]) if pendulum else observations[:, 0]
    made, grid = figure(13.4, 4.2, 1, 3)
    drawn = (("logged actions", logged, GREY), ("proposals of the VAE", proposed, COLORS["bcq"]),
             ("BCQ's actions", chosen, GOOD))  # fmt: skip
    for axes, (title, actions, color) in zip(grid, drawn, strict=True):
        axes.plot(angles, actions[:, 0], ".", color=color, markersize=3, alpha=0.4)
        axes.set_title(f"{name}: {title}", loc="left", fontsize=11, color=INK)
        axes.set_xlabel("angle, 0 is upright" if pendulum else "first observation", color=INK)
        axes.set_ylim(-1.08, 1.08)
    grid[0].set_ylabel("action, scaled", color=INK)
    save(made, run.dir / f"candidates_{name}.png")
