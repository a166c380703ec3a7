"""Pictures of the rlhf module: over-optimization of the reward model, and the reward model on held-out pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from finetune.runs.plots import FAINT, GREY, INK, LINE, figure, moving_average, save
from finetune.runs.run import Run

if TYPE_CHECKING:
    from finetune.alignment.rewards import Scale

    from .reward import Quality

GOLD, PROXY = "#b7791f", LINE
TOGETHER = 3  # steps of a mean


def overoptimization(run: Run, of_gold: Scale | None, best: Sequence[tuple[float, float, float]]) -> None:
    """overoptimization.png: proxy and gold reward of each step's answers over the square root of the KL to the SFT
    model (Gao et al. 2022, arXiv:2210.10760, figure 1) and over the steps, with those of best-of-n; both on the scale
    of the SFT model's answers, on which these have mean 0 and deviation 1. Points: steps. Lines: means of neighbors, in
    the order of the KL or of the steps; bands: two standard errors of these means."""
    series = run.metrics.series()
    if "kl" not in series:
        return
    made, (left, middle, right) = figure(15.5, 4.8, 1, 3)
    for name, color in (("proxy", PROXY), ("gold", GOLD)):
        if name == "gold" and of_gold is None:
            continue
        start = 0
        for phase, style in (("", "-"), ("beyond: ", "--")):
            if f"{phase}kl" not in series:
                continue
            values = np.array(series[f"{phase}{name}"][1])
            if name == "gold" and of_gold is not None:
                values = of_gold(torch.from_numpy(values)).numpy()
            label = f"{name}, {'nothing holds the policy' if phase else 'KL penalty, reward clipped'}"
            roots = np.maximum(series[f"{phase}kl"][1], 0) ** 0.5
            for axes, xs in ((left, roots), (middle, start + np.arange(len(values), dtype=float))):
                axes.plot(xs, values, ".", color=color, alpha=0.3, markersize=5)
                places, means, errors = neighbors(xs, values)
                axes.plot(places, means, style, color=color, linewidth=2, label=label)
                axes.fill_between(places, means - 2 * errors, means + 2 * errors, color=color, alpha=0.15, linewidth=0)
            start += len(values)
        if best:
            place = 1 if name == "proxy" else 2
            left.plot([row[0] ** 0.5 for row in best], [row[place] for row in best], ":", color=color, linewidth=2.2,
                      label=f"{name}, best of 1 … {len(best)}")  # fmt: skip
    for axes in (left, middle):
        axes.axhline(0, color=FAINT, linewidth=0.8)
    left.set_xlabel("√ KL(policy ‖ SFT model), nats an answer", color=INK)
    left.set_ylabel("reward (deviations of the SFT model's answers)", color=INK)
    left.set_title("reward over distance from the SFT model", loc="left", fontsize=11, color=INK)
    left.legend(fontsize=8.5, frameon=False)
    middle.set_xlabel("step", color=INK)
    middle.set_title("the same over the steps", loc="left", fontsize=11, color=INK)
    steps(right, series)
    save(made, run.dir / "overoptimization.png")


def neighbors(xs: np.ndarray, ys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means of x and y of about TOGETHER neighbors in x, and the standard errors of those of y (0 of a single one)."""
    order = np.array_split(np.argsort(xs, kind="stable"), max(2, round(len(xs) / TOGETHER)))
    parts = [(xs[some], ys[some]) for some in order if len(some)]
    errors = [y.std(ddof=1) / len(y) ** 0.5 if len(y) > 1 else 0.0 for _, y in parts]
    return np.array([x.mean() for x, _ in parts]), np.array([y.mean() for _, y in parts]), np.array(errors)


def steps(axes: Any, series: dict[str, tuple[list[int], list[float]]]) -> None:
    """KL and length over the steps of both phases."""
    for name, color in (("kl", INK), ("length", GREY)):
        xs, ys = series[name]
        more = series.get(f"beyond: {name}", ([], []))[1]
        axes.plot(xs, ys, color=color, linewidth=1.8, label={"kl": "KL, nats", "length": "tokens"}[name])
        axes.plot(range(len(xs), len(xs) + len(more)), more, "--", color=color, linewidth=1.8)
    axes.set_xlabel("step", color=INK)
    axes.set_title("KL and length of an answer", loc="left", fontsize=11, color=INK)
    axes.legend(fontsize=9, frameon=False)


def reward_model(run: Run, quality: Quality) -> None:
    """reward_model.png: accuracy over training, and calibration on held-out pairs."""
    series = run.metrics.series()
    made, (left, right) = figure(11.5, 4.4, 1, 2)
    if "reward: accuracy" in series:
        xs, ys = series["reward: accuracy"]
        left.plot(xs, ys, color=FAINT, linewidth=0.9, label="each step's pairs")
        left.plot(xs, moving_average(ys, max(3, len(ys) // 6)), color=LINE, linewidth=2, label="moving average")
    left.axhline(quality.accuracy, color=GOLD, linestyle="--", linewidth=1.4, label="held-out pairs, in the end")
    left.set_title("share of pairs that are ordered as by the gold reward", loc="left", fontsize=11, color=INK)
    left.set_xlabel("step", color=INK)
    left.legend(fontsize=9, frameon=False)
    right.plot([0.5, 1], [0.5, 1], color=GREY, linestyle="--", linewidth=1.2, label="calibrated")
    predicted, share, counts = zip(*quality.calibration, strict=True)
    right.scatter(predicted, share, s=[12 + 240 * c / sum(counts) for c in counts], color=LINE, label="pairs in a bin")
    right.set_title("held-out pairs: predicted probability and share right", loc="left", fontsize=11, color=INK)
    right.set_xlabel("σ(|r(a) − r(b)|)", color=INK)
    right.legend(fontsize=9, frameon=False)
    save(made, run.dir / "reward_model.png")
