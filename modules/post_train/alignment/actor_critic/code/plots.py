"""Pictures of actor_critic: returns with bands over the trainings, V(s) against returns, SAC's temperature."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from finetune.rl.envs.evaluation import interval
from finetune.runs.display import uncertain
from finetune.runs.plots import GOOD, GREY, INK, figure, moving_average, save
from finetune.runs.run import Run

if TYPE_CHECKING:
    from .main import Config

COLORS = {"one_step": "#c53030", "a2c": "#1769aa", "lambda": "#b7791f", "vtrace": "#805ad5", "sac": "#1769aa",
          "td3": "#c53030"}  # fmt: skip
Band = tuple[Any, Any, Any]  # environment steps, mean, half the 95 % interval


def band(run: Run, cfg: Config, method: str, name: str, chunk: int) -> Band | None:
    """A metric of a method over its trainings, smoothed."""
    series = run.metrics.series()
    curves = [series[key] for i in range(cfg.repeats) if (key := f"{method}_{i}: {name}") in series]
    if not curves:
        return None
    grid = np.arange(max(xs[0] for xs, _ in curves), 1 + min(xs[-1] for xs, _ in curves))
    rows = [np.interp(grid, xs, moving_average(ys, max(3, len(ys) // 20))) for xs, ys in curves]
    mean, half = np.array([interval(column.tolist()) for column in np.array(rows).T]).T
    return chunk * (grid + 1), mean, half


def draw_band(axes: Any, found: Band | None, color: str, label: str, least: float, most: float) -> None:
    if found is None:
        return
    steps, mean, half = found
    axes.plot(steps, mean, color=color, linewidth=1.8, label=label)
    if np.isfinite(half).all():
        low, high = np.maximum(mean - half, least), np.minimum(mean + half, most)
        axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)


def returns(run: Run, cfg: Config, groups: list[tuple[str, list[str]]], chunk: int) -> None:
    """returns.png: returns of the training episodes. groups: an environment and its methods, a chart each."""
    groups = [(env, names) for env, names in groups if names]
    made, panels = figure(5.8 * len(groups), 4.4, 1, len(groups))
    for axes, (env, names) in zip(panels, groups, strict=True):
        values = [y for m in names for i in range(cfg.repeats)
                  for y in run.metrics.series().get(f"{m}_{i}: return", ([], []))[1]]  # fmt: skip
        least, most = min(values, default=0), max(values, default=0)
        for method in names:
            found = band(run, cfg, method, "return", chunk)
            draw_band(axes, found, COLORS[method], method.replace("_", " "), least, most)
        for value in {run.judged[f"return_{m}"]["target"] for m in names} - {None}:
            axes.axhline(value, color=GOOD, linestyle="--", linewidth=1.0)
            axes.text(0, value, f" {value:g}", color=GOOD, fontsize=8, va="bottom")
        axes.set_title(f"{env}: return while training, {cfg.repeats} trainings", loc="left", fontsize=11, color=INK)
        axes.set_xlabel("environment steps", color=INK)
        if values:
            axes.legend(fontsize=9, frameon=False, loc="best")
    save(made, run.dir / "returns.png")


def critics(run: Run, pairs: dict[str, list[Tensor]]) -> None:
    """critics.png: V(s) against the mean return from s; on the dashed line they are equal."""
    columns = min(3, len(pairs))
    made, panels = figure(4.2 * columns, 4.2 * -(-len(pairs) // columns), -(-len(pairs) // columns), columns)
    for axes in panels[len(pairs) :]:
        axes.set_visible(False)
    for axes, (method, trainings) in zip(panels, pairs.items(), strict=False):
        for rows, shape in zip(trainings, itertools.cycle("o^sDv")):
            values, earned = rows.T.numpy()
            axes.scatter(earned, values, s=16, marker=shape, color=COLORS[method], alpha=0.6, linewidths=0)
        every = np.concatenate([rows.numpy().ravel() for rows in trainings])
        ends = every.min(), every.max()
        axes.plot(ends, ends, color=GREY, linestyle="--", linewidth=1.2)
        checks = {what: run.checks.get(f"critic_{what}_{method}") for what in ("correlation", "bias", "slope")}
        told = [f"{what} {uncertain(c['value'], c.get('error'))}" for what, c in checks.items() if c]
        title = f"{method.replace('_', ' ')}: {told[0]},\n{told[1]}, {told[2]}" if told else method
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        bonus = " with entropy bonus" if method == "sac" else ""
        axes.set_xlabel(f"mean discounted return{bonus}", color=INK)
        axes.set_ylabel("V(s)", color=INK)
    save(made, run.dir / "critics.png")


def temperature(run: Run, cfg: Config, target: float, chunk: int) -> None:
    """temperature.png: SAC's α and the entropy that it steers."""
    made, (left, right) = figure(11.5, 4.0, 1, 2)
    draw_band(left, band(run, cfg, "sac", "alpha", chunk), COLORS["sac"], "α", 0, np.inf)
    draw_band(right, band(run, cfg, "sac", "entropy", chunk), COLORS["sac"], "entropy", -np.inf, np.inf)
    right.axhline(target, color=GOOD, linestyle="--", linewidth=1.2, label=f"target {target:.2f}")
    left.set_yscale("log")
    left.set_title("SAC: temperature α", loc="left", fontsize=11, color=INK)
    right.set_title("SAC: entropy of the policy, nats", loc="left", fontsize=11, color=INK)
    for axes in (left, right):
        axes.set_xlabel("environment steps", color=INK)
        axes.legend(fontsize=9, frameon=False)
    save(made, run.dir / "temperature.png")
