"""Pictures of the gae module: bias and variance over λ, critics with and without bootstrapping at a limit, PPO by λ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from finetune.runs.plots import INK, figure, save
from finetune.runs.run import Run

if TYPE_CHECKING:
    from .main import Config
    from .ppo import Training

COLORS = {"exact": "#1769aa", "half_learned": "#c53030"}
NAMES = {"exact": "exact V", "half_learned": "half-learned V"}


def bias_variance(
    run: Run,
    lambdas: list[float],
    bias: np.ndarray,
    measured: Mapping[str, tuple[np.ndarray, ...]],
    noise: dict[str, np.ndarray],
) -> None:
    """bias_variance.png: bias, standard deviation and error over λ. `bias` is the half-learned critic's, by dynamic
    programming; `measured` holds (bias, low, high), one standard error to either side."""
    made, (left, middle, right) = figure(13.2, 4.2, 1, 3)
    at = np.arange(len(lambdas))
    for axes, title in (
        (left, "bias: the part that the gradient sees"),
        (middle, "standard deviation of one estimate"),
        (right, "error of the mean of n estimates, half-learned V"),
    ):
        axes.set_title(title, loc="left", fontsize=11, color=INK)
        axes.set_xlabel("λ", color=INK)
        axes.set_xticks(at, [f"{lam:g}" for lam in lambdas])
    left.plot(at, bias, color=COLORS["half_learned"], linewidth=1.8, label="half-learned V, by dynamic programming")
    for aside, (name, (values, low, high)) in zip((-0.06, 0.06), measured.items(), strict=True):
        around = np.stack([values - low, high - values])
        left.errorbar(at + aside, values, around, fmt="o", color=COLORS[name], markersize=5, linewidth=1.2, capsize=2,
                      label=f"{NAMES[name]}, measured ± s.e.")  # fmt: skip
        middle.plot(at, np.sqrt(noise[name]), "o-", color=COLORS[name], linewidth=1.8, markersize=5, label=NAMES[name])
    left.set_ylim(bottom=0)
    middle.set_ylim(bottom=0)
    shades = ("#f3c3c3", "#e48f8f", "#c53030", "#7a1c1c")
    for n, color in zip((1, 10, 100, 1000), shades, strict=True):
        error = np.sqrt(bias**2 + noise["half_learned"] / n)
        right.plot(at, error, color=color, linewidth=1.8, label=f"n = {n}")
        best = int(error.argmin())
        right.plot(at[best], error[best], "*", color=color, markersize=12)
    right.set_yscale("log")
    for axes in (left, middle, right):
        axes.legend(fontsize=8.5, frameon=False)
    save(made, run.dir / "bias_variance.png")


def time_limits(cfg: Config, run: Run, exact: np.ndarray, learned: dict[str, np.ndarray]) -> None:
    """time_limits.png: learned against exact values, a point a state."""
    made, [axes] = figure(5.6, 5.2)
    low, high = exact.min(), exact.max()
    axes.plot([low, high], [low, high], color=INK, linewidth=1, linestyle="--", label="exact")
    looks = {
        "value_rmse": ("#1769aa", "o", "truncation bootstraps from the next state"),
        "value_rmse_truncation_as_termination": ("#c53030", "X", "truncation taken for termination"),
    }
    for name, values in learned.items():
        color, marker, label = looks[name]
        axes.plot(exact, values, marker, color=color, markersize=6, label=label)
    axes.set_title(f"two critics, the same episodes of {cfg.limit} steps", loc="left", fontsize=11, color=INK)
    axes.set_xlabel("exact value of a state", color=INK)
    axes.set_ylabel("learned", color=INK)
    axes.legend(fontsize=8.5, frameon=False)
    save(made, run.dir / "time_limits.png")


def ppo_lambda(cfg: Config, run: Run, trained: dict[float, list[Training]], size: int, solved: float) -> None:
    """ppo_lambda.png: learning curves by λ, median and range of the repetitions, and when each was first solved."""
    made, (left, right) = figure(12.0, 4.4, 1, 2)
    shades = ("#c53030", "#b7791f", "#1769aa", "#805ad5", "#2e7d32", "#8a6d3b")
    for i, (lam, trainings) in enumerate(trained.items()):
        color, curves = shades[i % len(shades)], np.array([t.curve for t in trainings])  # (repetitions, updates)
        at = size * np.arange(1, curves.shape[1] + 1)
        left.plot(at, np.median(curves, 0), color=color, linewidth=1.8, label=f"λ = {lam:g}")
        left.fill_between(at, curves.min(0), curves.max(0), color=color, alpha=0.08, linewidth=0)
        for t, x in zip(trainings, i + np.linspace(-0.12, 0.12, len(trainings)), strict=True):
            marker, face = ("o", color) if t.solved else ("^", "white")
            right.plot(x, t.steps, marker, color=color, markerfacecolor=face, markersize=7)
        middle = float(np.median([t.steps for t in trainings]))
        right.plot([i - 0.3, i + 0.3], [middle, middle], color=color, linewidth=2.2)
    if cfg.ppo_env == "CartPole-v1":
        left.axhline(solved, color=INK, linestyle="--", linewidth=1)
        left.set_ylim(0, 1.15 * solved)
    left.legend(fontsize=9, frameon=False, loc="upper left")
    left.set_xlabel("steps of the environments", color=INK)
    right.set_xticks(range(len(trained)), [f"λ = {lam:g}" for lam in trained])
    right.set_xlim(-0.6, len(trained) - 0.4)
    right.set_ylim(0, 1.06 * max(t.steps for trainings in trained.values() for t in trainings))
    left.set_title(f"PPO on {cfg.ppo_env}: mean of the last episodes", loc="left", fontsize=11, color=INK)
    right.set_title(f"steps until it is {solved:g}; △: never, bar: median", loc="left", fontsize=11, color=INK)
    save(made, run.dir / "ppo_lambda.png")
