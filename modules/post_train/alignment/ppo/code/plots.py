"""Pictures of the ppo module: learning curves, diagnostics of the updates, and what the details are worth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.rl.envs.evaluation import interval
from finetune.runs.plots import GOOD, INK, figure, save
from finetune.runs.run import Run

from . import ppo

if TYPE_CHECKING:
    from .ablation import Row
    from .main import Config

COLORS = {"clip": "#1769aa", "kl": "#c53030"}


def _curves(cfg: Config, run: Run, env: str, objective: str, metric: str) -> tuple[np.ndarray, list[Any]]:
    """Updates that all trainings have, and each training's values there."""
    from .main import label

    series = run.metrics.series()
    keys = [f"{label(env, objective)}_{i}: {metric}" for i in range(cfg.repeats)]
    found = [series[key] for key in keys if key in series]
    if not found:
        return np.empty(0), []
    grid = np.arange(max(xs[0] for xs, _ in found), 1 + min(xs[-1] for xs, _ in found))
    return grid, [np.interp(grid, xs, ys) for xs, ys in found]


def returns(cfg: Config, run: Run, made: dict[str, Any]) -> None:
    """returns.png: the mean return of the last episodes over environment steps, mean and range of the trainings."""
    picture, panels = figure(5.8 * len(made), 4.2, 1, len(made))
    for axes, (env, envs) in zip(panels, made.items(), strict=True):
        size = len(envs) * cfg.horizon
        for objective in dict.fromkeys(cfg.objectives.split(",")):
            grid, rows = _curves(cfg, run, env, objective, "return")
            if not rows:
                continue
            steps, values = size * (grid + 1), np.array(rows)
            axes.plot(steps, values.mean(0), color=COLORS[objective], linewidth=1.8, label=objective)
            axes.fill_between(steps, values.min(0), values.max(0), color=COLORS[objective], alpha=0.15, linewidth=0)
            axes.legend(fontsize=9, frameon=False, loc="lower right")
        if env in ppo.SOLVED:
            axes.axhline(ppo.SOLVED[env], color=GOOD, linestyle="--", linewidth=1)
        axes.set_title(f"{env}: return while training", loc="left", fontsize=11, color=INK)
        axes.set_xlabel("environment steps", color=INK)
    save(picture, run.dir / "returns.png")


def diagnostics(cfg: Config, run: Run, env: str) -> None:
    """diagnostics.png: KL divergence, clip fraction, entropy and explained variance of the first environment."""
    names = {"kl": "KL(π_old ‖ π), nats", "clip_fraction": "clip fraction", "entropy": "entropy, nats",
             "explained_variance": "explained variance of V"}  # fmt: skip
    picture, panels = figure(13.2, 3.4, 1, len(names))
    for axes, (metric, title) in zip(panels, names.items(), strict=True):
        for objective in dict.fromkeys(cfg.objectives.split(",")):
            grid, rows = _curves(cfg, run, env, objective, metric)
            if rows:
                axes.plot(grid, np.mean(rows, 0), color=COLORS[objective], linewidth=1.6, label=objective)
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        axes.set_xlabel("update", color=INK)
    panels[-1].set_ylim(-1, 1.05)  # below, the targets are all but equal and there is nothing to explain
    panels[0].legend(fontsize=9, frameon=False)
    save(picture, run.dir / "diagnostics.png")


def language(cfg: Config, run: Run, baseline: float) -> None:
    """answers.png: score, divergence from the reference with its price, clip fraction and explained variance."""
    series = {name.removeprefix("answers: "): xy for name, xy in run.metrics.series().items()}
    picture, panels = figure(13.2, 3.4, 1, 4)
    titles = {"score": "score of the answers", "answer_kl": "KL(π ‖ π_ref) an answer, nats", "beta": "β, its price",
              "explained_variance": "explained variance of V"}  # fmt: skip
    for axes, (metric, title) in zip(panels, titles.items(), strict=True):
        if metric in series:
            axes.plot(*series[metric], color=COLORS["clip"], linewidth=1.6)
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        axes.set_xlabel("update", color=INK)
    panels[0].axhline(baseline, color=INK, linestyle="--", linewidth=1)
    if cfg.kl_aim is not None:
        panels[1].axhline(cfg.kl_aim, color=GOOD, linestyle="--", linewidth=1)
    panels[3].set_ylim(-1, 1.05)
    save(picture, run.dir / "answers.png")


def ablation(run: Run, env: str, rows: list[Row]) -> None:
    """ablation.png: what each detail is worth, with 95 % intervals over the seeds."""
    full, *others = rows
    others = sorted(others, key=lambda row: row.loss(full)[0])
    picture, (left, right) = figure(12.6, 0.34 * len(rows) + 1.6, 1, 2)
    for y, row in enumerate(others):
        lost, half = row.loss(full)
        color = "#c53030" if lost - half > 0 else GOOD if lost + half < 0 else "#7a8794"
        left.errorbar(lost, y, xerr=half, fmt="o", color=color, markersize=5, capsize=3, linewidth=1.4)
    for y, row in enumerate([*others, full]):
        mean, half = interval(row.after)
        color = "#1769aa" if row is full else "#7a8794"
        right.errorbar(mean, y, xerr=half, fmt="o", color=color, markersize=5, capsize=3, linewidth=1.4)
        right.plot(row.after, [y] * len(row.after), "|", color=color, markersize=7)
    left.axvline(0, color=INK, linewidth=1, linestyle="--")
    left.set_yticks(range(len(others)), [row.name for row in others], fontsize=9)
    right.set_yticks(range(len(rows)), [row.name for row in [*others, full]], fontsize=9)
    left.set_title(f"{env}: mean return lost without it", loc="left", fontsize=11, color=INK)
    right.set_title("return after training; | a training", loc="left", fontsize=11, color=INK)
    save(picture, run.dir / "ablation.png")
