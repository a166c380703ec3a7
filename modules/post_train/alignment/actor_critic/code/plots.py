"""The module's own pictures: returns with bands over the trainings, critics beside returns, SAC's temperature."""

import itertools
from typing import Any

import numpy as np

from finetune.rl.envs.evaluation import interval
from finetune.runs.display import uncertain
from finetune.runs.plots import GOOD, GREY, INK, figure, moving_average, save

from . import offpolicy

COLOURS = {"one_step": "#c53030", "a2c": "#1769aa", "lambda": "#b7791f", "vtrace": "#805ad5", "sac": "#1769aa",
           "td3": "#c53030"}  # fmt: skip


def across(run: Any, cfg: Any, method: str, name: str, chunk: int) -> tuple[Any, Any, Any] | None:
    """(environment steps, mean, half the 95 % interval) of a series over the trainings of a method, smoothed."""
    series = run.metrics.series()
    found = [series[key] for i in range(cfg.repeats) if (key := f"{method}_{i}: {name}") in series]
    if not found:
        return None
    grid = np.arange(max(xs[0] for xs, _ in found), 1 + min(xs[-1] for xs, _ in found))
    rows = [np.interp(grid, xs, moving_average(ys, max(3, len(ys) // 20))) for xs, ys in found]
    mean, half = np.array([interval(column.tolist()) for column in np.array(rows).T]).T
    return chunk * (grid + 1), mean, half


def draw(axes: Any, found: tuple[Any, Any, Any] | None, color: str, label: str, least: Any, most: Any) -> None:
    if found is None:
        return
    steps, mean, half = found
    axes.plot(steps, mean, color=color, linewidth=1.8, label=label)
    if np.isfinite(half).all():
        low, high = np.maximum(mean - half, least), np.minimum(mean + half, most)
        axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)


def learning(run: Any, cfg: Any, methods: list[str], chunk: int) -> None:
    """returns.png: returns of the episodes of training, with 95 % bands over the trainings."""
    groups = [
        (env, chosen)
        for env, chosen in (
            (cfg.env, [m for m in methods if m not in offpolicy.LEARNERS]),
            (cfg.continuous_env, [m for m in methods if m in offpolicy.LEARNERS]),
        )
        if chosen
    ]
    made, panels = figure(5.8 * len(groups), 4.4, 1, len(groups))
    for axes, (env, chosen) in zip(panels, groups, strict=True):
        values = [y for m in chosen for i in range(cfg.repeats)
                  for y in run.metrics.series().get(f"{m}_{i}: return", ([], []))[1]]  # fmt: skip
        for method in chosen:
            found = across(run, cfg, method, "return", chunk)
            draw(axes, found, COLOURS[method], method.replace("_", " "), min(values, default=0), max(values, default=0))
        for value in {run.judged[f"return_{m}"]["target"] for m in chosen} - {None}:
            axes.axhline(value, color=GOOD, linestyle="--", linewidth=1.0)
            axes.text(0, value, f" {value:g}", color=GOOD, fontsize=8, va="bottom")
        axes.set_title(f"{env}: return while training, {cfg.repeats} each", loc="left", fontsize=11, color=INK)
        axes.set_xlabel("steps of the environments", color=INK)
        if values:
            axes.legend(fontsize=9, frameon=False, loc="best")
    save(made, run.dir / "returns.png")


def critics(run: Any, pairs: dict[str, list[Any]]) -> None:
    """critics.png: what the critic of each training said beside what came; the dashed line is a right critic's."""
    columns = min(3, len(pairs))
    made, panels = figure(4.2 * columns, 4.2 * -(-len(pairs) // columns), -(-len(pairs) // columns), columns)
    for axes in panels[len(pairs) :]:
        axes.set_visible(False)
    for axes, (method, trainings) in zip(panels, pairs.items(), strict=False):
        for rows, shape in zip(trainings, itertools.cycle("o^sDv")):
            said, came = rows.T.numpy()
            axes.scatter(came, said, s=16, marker=shape, color=COLOURS[method], alpha=0.6, linewidths=0)
        every = np.concatenate([rows.numpy().ravel() for rows in trainings])
        ends = every.min(), every.max()
        axes.plot(ends, ends, color=GREY, linestyle="--", linewidth=1.2)
        words = {what: run.judged.get(f"critic_{what}_{method}") for what in ("correlation", "bias", "slope")}
        told = [f"{what} {uncertain(t['value'], t['error'])}" for what, t in words.items() if t]
        title = f"{method.replace('_', ' ')}: {told[0]},\n{told[1]}, {told[2]}" if told else method
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        came = "return and entropy bonus" if method == "sac" else "return"
        axes.set_xlabel(f"discounted {came} that came", color=INK)
        axes.set_ylabel("what the critic said", color=INK)
    save(made, run.dir / "critics.png")


def temperature(run: Any, cfg: Any, target: float, chunk: int) -> None:
    """temperature.png: SAC's α and the entropy that it steers."""
    made, (left, right) = figure(11.5, 4.0, 1, 2)
    draw(left, across(run, cfg, "sac", "alpha", chunk), COLOURS["sac"], "α", 0, np.inf)
    draw(right, across(run, cfg, "sac", "entropy", chunk), COLOURS["sac"], "entropy", -np.inf, np.inf)
    right.axhline(target, color=GOOD, linestyle="--", linewidth=1.2, label=f"target {target:.2f}")
    left.set_yscale("log")
    left.set_title("SAC: α, the price of an entropy of one nat", loc="left", fontsize=11, color=INK)
    right.set_title("SAC: entropy of the policy, nats", loc="left", fontsize=11, color=INK)
    for axes in (left, right):
        axes.set_xlabel("steps of the environment", color=INK)
        axes.legend(fontsize=9, frameon=False)
    save(made, run.dir / "temperature.png")
