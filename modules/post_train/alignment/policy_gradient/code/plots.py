"""Pictures of the policy_gradient module: returns, the short corridor, off-policy estimates, variance by baseline."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.runs.display import uncertain
from finetune.runs.plots import GOOD, GREY, INK, figure, moving_average, save
from finetune.runs.run import Run

if TYPE_CHECKING:
    from .main import Config

COLORS = {"reinforce": "#1769aa", "natural": "#b7791f", "trpo": "#805ad5",
           "none": "#c53030", "mean": "#1769aa", "leave_one_out": "#2e7d32", "learned": "#805ad5", "optimal": "#8a6d3b",
           "uncorrected": "#c53030", "step": "#b7791f", "truncated": "#8a6d3b", "weighted": "#805ad5",
           "trajectory": "#1769aa", "per_decision": "#2e7d32"}  # fmt: skip


def learning(run: Run, cfg: Config) -> None:
    """returns.png: learning curves by method, and the KL of each step."""
    series = run.metrics.series()
    names = [name for name in cfg.methods.split(",") if f"{name}: return" in series]
    if not names:
        return
    made, (left, right) = figure(11.5, 4.4, 1, 2)
    for name in names:
        xs, ys = series[f"{name}: return"]
        left.plot(xs, ys, color=COLORS[name], linewidth=0.8, alpha=0.35)
        left.plot(xs, moving_average(ys, max(3, len(ys) // 20)), color=COLORS[name], linewidth=2, label=name)
        right.plot(*series[f"{name}: kl"], color=COLORS[name], linewidth=1.2, label=name)
    right.axhline(cfg.delta, color=GREY, linestyle="--", linewidth=1.2, label=f"δ = {cfg.delta:g}")
    right.set_yscale("log")
    left.set_title(f"{cfg.env}: mean return of {cfg.episodes} episodes", loc="left", fontsize=11, color=INK)
    right.set_title("KL(policy before ‖ after an update)", loc="left", fontsize=11, color=INK)
    for axes in (left, right):
        axes.set_xlabel("update", color=INK)
        axes.legend(fontsize=9, frameon=False)
    save(made, run.dir / "returns.png")


def corridor(run: Run, baselines: tuple[str, ...], best: float, value_of: Callable[[float], float]) -> None:
    """corridor.png: the value of the start over p(right), the book's figure, and both over training, with 95 % bands
    over the repetitions."""
    series = run.metrics.series()
    made, (book, left, right) = figure(15.5, 4.4, 1, 3)
    ps = np.linspace(0.03, 0.97, 95)
    book.plot(ps, [value_of(p) for p in ps], color=INK, linewidth=1.8)
    marks = ((0.05, "ε-greedy left", (12, 2)), (0.95, "ε-greedy right", (-12, -4)), (best, "best", (0, -18)))
    for p, name, place in marks:
        book.plot(p, value_of(p), "o", color=GOOD if p == best else "#c53030", markersize=7)
        book.annotate(f"{name} {value_of(p):.1f}", (p, value_of(p)), xytext=place, textcoords="offset points",
                      ha="center" if p == best else "left" if p < 0.5 else "right", fontsize=9, color=INK)  # fmt: skip
    book.set_ylim(-105, -5)
    for name in baselines:
        xs, ys = series[f"corridor_{name}: value"]
        values, half = np.array(ys), np.array(series[f"corridor_{name}: half_width"][1])
        left.plot(xs, values, color=COLORS[name], linewidth=1.8, label=name.replace("_", " "))
        left.fill_between(
            xs, values - half, np.minimum(values + half, -11.6), color=COLORS[name], alpha=0.15, linewidth=0
        )
        right.plot(*series[f"corridor_{name}: right"], color=COLORS[name], linewidth=1.8, label=name.replace("_", " "))
    left.axhline(value_of(best), color=GOOD, linestyle="--", linewidth=1.2, label=f"best {value_of(best):.2f}")
    left.set_ylim(-45, -10)
    right.axhline(best, color=GOOD, linestyle="--", linewidth=1.2, label=f"best {best:.3f}")
    for axes, title in (
        (book, "short corridor: value of the start over p(right)"),
        (left, "value of the start as it is learned"),
        (right, "p(right) as it is learned"),
    ):
        axes.set_title(title, loc="left", fontsize=11, color=INK)
    book.set_xlabel("p(right)", color=INK)
    for axes in (left, right):
        axes.set_xlabel("update (8 episodes)", color=INK)
        axes.legend(fontsize=9, frameon=False, loc="lower right")
    save(made, run.dir / "corridor.png")


def off_policy(
    run: Run, distances: tuple[float, ...], found: dict[str, dict[str, list[float]]], paths: dict[str, list[float]]
) -> None:
    """off_policy.png: bias, variance and effective sample over the distance of μ; J while one batch is used often."""
    made, (bias, spread, size, reuse) = figure(11.5, 8.0, 2, 2)
    sample = found["sample"]
    for (name, values), marker in zip(found.items(), "os^vDx", strict=False):
        if name != "sample":
            look = {"color": COLORS[name], "marker": marker, "linewidth": 1.6, "markersize": 5}
            bias.plot(distances, values["bias"], label=name.replace("_", " "), **look)
            spread.plot(distances, values["variance"], **look)
    size.plot(distances, sample["effective"], "o-", color=INK, linewidth=1.8, label="effective part of the episodes")
    size.plot(distances, sample["kl"], "s--", color=GREY, linewidth=1.4, label="KL(μ ‖ π) of an episode, nats")
    for name, path in paths.items():
        reuse.plot(path, color=COLORS[name], linewidth=1.8)
    bias.set_yscale("symlog", linthresh=0.1)
    bias.set_yticks([0, 0.05, 0.1, 0.5, 1, 5], ["0", "0.05", "0.1", "0.5", "1", "5"])
    bias.set_ylim(bottom=-0.01)
    spread.set_ylim(bottom=0)
    distance = "distance of μ from π; 1: μ is uniform, 2: π reversed"
    for axes, title, x in (
        (bias, "|E[estimate] − ∇J| / |∇J|: exact, except for weighted", distance),
        (spread, "variance of an estimate from 32 episodes of μ", distance),
        (size, "how much the episodes of μ are worth", distance),
        (reuse, "exact J while one batch of the first policy is used", "update on the same batch"),
    ):
        axes.set_title(title, loc="left", fontsize=11, color=INK)
        axes.set_xlabel(x, color=INK)
    size.set_ylim(top=1.3 * max(*sample["effective"], *sample["kl"]))  # room for its legend
    size.legend(fontsize=8.5, frameon=False, loc="upper left")
    made.legend(*bias.get_legend_handles_labels(), fontsize=9, frameon=False, loc="outside upper center", ncols=6)
    save(made, run.dir / "off_policy.png")


def variance(run: Run, env: str, listed: dict[str, Any], network: dict[str, Any]) -> None:
    """variance.png: variance of the gradient estimate by baseline ± standard error, without a baseline = 1."""
    made, axes = figure(10.5, 4.0, 1, 2)
    for place, values, title in (
        (axes[0], listed, "two-step MDP (learned: the exact V)"),
        (axes[1], network, f"{env}, the untrained network"),
    ):
        names = list(values)
        ratios, errors = [values[n].ratio for n in names], [values[n].error for n in names]
        bars = place.barh([n.replace("_", " ") for n in names], ratios, xerr=errors, capsize=2,
                          color=[COLORS[n] for n in names], height=0.6)  # fmt: skip
        labels = [uncertain(ratio, error) for ratio, error in zip(ratios, errors, strict=True)]
        place.bar_label(bars, labels, padding=3, fontsize=9, color=INK)
        place.invert_yaxis()
        place.set_xlim(0, 1.3 * max(s + e for s, e in zip(ratios, errors, strict=True)))
        place.set_title(title, loc="left", fontsize=11, color=INK)
        place.set_xlabel("variance of the gradient / variance without a baseline", color=INK)
        place.grid(False, axis="y")
    save(made, run.dir / "variance.png")
