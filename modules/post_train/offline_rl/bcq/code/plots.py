"""The module's own pictures: learning curves, Q beside true returns, the thresholds, candidates beside the data."""

from typing import Any

import torch
from torch import Tensor

from finetune.runs.plots import GOOD, GREY, INK, figure, save

COLOURS = {"dqn": "#c53030", "td3": "#c53030", "bc": "#8a6d3b", "bcq": "#1769aa", "td3_bc": "#2e7d32",
           "iql": "#805ad5", "awac": "#d97706"}  # fmt: skip
SETS = ("#1769aa", "#2e7d32", "#d97706", "#805ad5", "#c53030")


def found(series: dict[str, Any], column: str) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
    """Set → method → the column's series, of phases named set_method."""
    sets: dict[str, dict[str, tuple[list[int], list[float]]]] = {}
    for name, values in series.items():
        phase, _, what = name.partition(": ")
        if what == column:
            methods = [m for m in COLOURS if phase.endswith(f"_{m}")]
            if methods:
                method = max(methods, key=len)
                sets.setdefault(phase.removesuffix(f"_{method}"), {})[method] = values
    return sets


def returns(run) -> None:
    """returns.png: true return against updates, a panel a set."""
    sets = found(run.metrics.series(), "return")
    if not sets:
        return
    made, grid = figure(1 + 4.6 * len(sets), 4.2, 1, len(sets))
    for axes, (name, methods) in zip(grid, sets.items(), strict=True):
        for method, (xs, ys) in methods.items():
            axes.plot([x + 1 for x in xs], ys, color=COLOURS[method], linewidth=2.6 if method == "bcq" else 1.4,
                      label=method, marker="o", markersize=3)  # fmt: skip
        axes.set_title(f"{name}: true return", loc="left", fontsize=11, color=INK)
        axes.set_xlabel("update", color=INK)
        axes.legend(fontsize=8.5, frameon=False)
    save(made, run.dir / "returns.png")


def values(run) -> None:
    """values.png: what each method believes its start is worth against what it then earns."""
    series = run.metrics.series()
    believed, true = found(series, "believed"), found(series, "true")
    if not believed:
        return
    made, grid = figure(1 + 4.6 * len(believed), 4.2, 1, len(believed))
    for axes, (name, methods) in zip(grid, believed.items(), strict=True):
        for method, (xs, ys) in methods.items():
            steps = [x + 1 for x in xs]
            axes.plot(steps, ys, color=COLOURS[method], linewidth=2, label=f"{method}: Q")
            axes.plot(steps, true[name][method][1], color=COLOURS[method], linewidth=1.4, linestyle=":",
                      label=f"{method}: true")  # fmt: skip
        log_if_wide(axes)
        axes.set_title(f"{name}: value of the start", loc="left", fontsize=11, color=INK)
        axes.set_xlabel("update", color=INK)
        axes.legend(fontsize=8, frameon=False)
    save(made, run.dir / "values.png")


def evaluations(run, found: dict[str, dict[str, dict[str, float]]]) -> None:
    """evaluations.png: what each method earned from the start, and what its Q and fitted Q evaluation say."""
    made, grid = figure(1 + 4.2 * len(found), 4.2, 1, len(found))
    marks = (("true", "s", GOOD), ("fqe", "o", SETS[0]), ("believed", "^", COLOURS["dqn"]))
    for axes, (name, methods) in zip(grid, found.items(), strict=True):
        for column, mark, color in marks:
            there = [(i, each[column]) for i, each in enumerate(methods.values()) if column in each]
            if there:
                axes.plot(*zip(*there, strict=True), mark, color=color, markersize=7, label=column)
        axes.set_xticks(range(len(methods)), list(methods))
        log_if_wide(axes)
        axes.set_title(f"{name}: value of the start", loc="left", fontsize=11, color=INK)
        axes.legend(fontsize=8.5, frameon=False)
    save(made, run.dir / "evaluations.png")


def log_if_wide(axes: Any) -> None:
    drawn = [y for line in axes.get_lines() for y in line.get_ydata()]
    if min(drawn) > 0 and max(drawn) > 20 * min(drawn):
        axes.set_yscale("log")


def sweep(run) -> None:
    """sweep.png: return against the threshold, from DQN at 0 to cloning at 1."""
    series = run.metrics.series()
    names = [name.removesuffix("_sweep: tau") for name in series if name.endswith("_sweep: tau")]
    if not names:
        return
    made, (axes,) = figure(7.2, 4.4)
    for name, color in zip(names, SETS * len(names), strict=False):
        taus, found_ = series[f"{name}_sweep: tau"][1], series[f"{name}_sweep: return"][1]
        axes.plot(taus, found_, color=color, linewidth=2, marker="o", label=name)
    axes.set_xlabel("threshold τ", color=INK)
    axes.set_ylabel("return", color=INK)
    axes.text(0.0, 1.01, "DQN", transform=axes.transAxes, fontsize=9, color=INK)
    axes.text(1.0, 1.01, "cloning", transform=axes.transAxes, fontsize=9, color=INK, ha="right")
    axes.set_title("between DQN and cloning", loc="center", fontsize=11, color=INK)
    axes.legend(fontsize=9, frameon=False, title="data")
    save(made, run.dir / "sweep.png")


def candidates(run, name: str, observations: Tensor, logged: Tensor, proposed: Tensor, chosen: Tensor) -> None:
    """candidates.png: in the same states the logged actions, one proposal each of the VAE, and what BCQ takes."""
    pendulum = observations.shape[1] == 3  # cosine and sine of the angle, and the speed
    places = torch.atan2(observations[:, 1], observations[:, 0]) if pendulum else observations[:, 0]
    made, grid = figure(13.4, 4.2, 1, 3)
    drawn = (("logged actions", logged, GREY), ("proposals of the VAE", proposed, COLOURS["bcq"]),
             ("taken by BCQ", chosen, GOOD))  # fmt: skip
    for axes, (title, actions, color) in zip(grid, drawn, strict=True):
        axes.plot(places, actions[:, 0], ".", color=color, markersize=3, alpha=0.4)
        axes.set_title(f"{name}: {title}", loc="left", fontsize=11, color=INK)
        axes.set_xlabel("angle, 0 is upright" if pendulum else "first observation", color=INK)
        axes.set_ylim(-1.08, 1.08)
    grid[0].set_ylabel("action, scaled", color=INK)
    save(made, run.dir / f"candidates_{name}.png")
