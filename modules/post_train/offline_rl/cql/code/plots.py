"""The module's own pictures: returns by set, the gap that is pushed down, and values against what came true."""

import numpy as np

from finetune.runs.plots import GREY, INK, figure, save

COLOURS = {"bc": "#8a6d3b", "naive": "#c53030", "cql": "#1769aa"}
LABELS = {"bc": "behavior cloning", "naive": "naive Q-learning", "cql": "CQL"}
SHOWN = 1500  # points of a scatter


def learning(run, names: list[str], learners: tuple[str, ...]) -> None:
    """returns.png: mean return of the evaluations, a chart for each set."""
    series = run.metrics.series()
    made, grid = figure(4.2 * len(names), 3.8, 1, len(names))
    for axes, name in zip(grid, names, strict=True):
        for key in learners:
            xs, ys = series[f"{name}: return_{key}"]
            axes.plot([x + 1 for x in xs], ys, color=COLOURS[key], linewidth=1.8, marker="o", markersize=4,
                      label=LABELS[key])  # fmt: skip
        _dress(axes, f"{name}: return", "step")
    grid[0].legend(fontsize=8.5, frameon=False)
    save(made, run.dir / "returns.png")


def gaps(run, names: list[str]) -> None:
    """gaps.png: what Q thinks of all actions more than of the data's, and Q of the data's."""
    series = run.metrics.series()
    made, grid = figure(4.2 * len(names), 6.6, 2, len(names))
    for i, name in enumerate(names):
        for row, what in enumerate(("gap", "value")):
            axes = grid[row * len(names) + i]
            found = {key: series.get(f"{name}: {what}_{key}", ([], [])) for key in ("naive", "cql")}
            for key, (xs, ys) in found.items():
                if xs:
                    axes.plot([x + 1 for x in xs], ys, color=COLOURS[key], linewidth=1.8, label=LABELS[key])
            if max(y for _, ys in found.values() for y in ys) > 1000:
                axes.set_yscale("symlog", linthresh=10)
            _dress(axes, f"{name}: " + ("gap" if what == "gap" else "Q of the data's actions"), "step")
    grid[0].legend(fontsize=8.5, frameon=False)
    save(made, run.dir / "gaps.png")


def values(run, found) -> None:
    """values.png: the value that a learner believes in against the discounted return that came, state by state; the
    crosses are the starts: what fitted Q evaluation says of them."""
    made, grid = figure(4.2 * len(found), 7.6, 2, len(found))
    for i, (name, estimates) in enumerate(found.items()):
        for row, key in enumerate(("naive", "cql")):
            axes, e = grid[row * len(found) + i], estimates[key]
            believed, true = e.values.numpy(), e.to_go.numpy()
            if len(true):
                at = np.linspace(0, len(true) - 1, min(SHOWN, len(true))).astype(int)
                axes.scatter(true[at], believed[at], s=5, alpha=0.35, color=COLOURS[key], linewidths=0,
                             label="states on its way")  # fmt: skip
            axes.scatter([e.true], [e.believed], s=70, color=INK, marker="*", zorder=3, label="starts, believed")
            if e.fqe is not None:
                axes.scatter([e.true], [e.fqe], s=55, color=INK, marker="x", zorder=3, label="starts, by FQE")
            low, high = min([*true, e.true, 0.0]), max([*true, e.true, 0.0])
            room = 0.1 * max(high - low, 1.0)
            axes.plot([low - room, high + room], [low - room, high + room], color=GREY, linestyle="--", linewidth=1.2,
                      label="true")  # fmt: skip
            if max(believed.max(initial=0.0), e.believed) > 10 * max(abs(low), abs(high)):
                axes.set_yscale("symlog", linthresh=max(abs(low), abs(high)))
            _dress(axes, f"{name}: {LABELS[key]}", "discounted return that came")
            if i == 0:
                axes.set_ylabel("value", color=INK)
    grid[0].legend(fontsize=8, frameon=False)
    save(made, run.dir / "values.png")


def _dress(axes, title: str, below: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_xlabel(below, color=INK)
