"""Pictures of the rlhf module: over-optimization of the reward model, and the reward model on held-out pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from finetune.runs.plots import FAINT, GREY, INK, LINE, figure, moving_average, save
from finetune.runs.run import Run

if TYPE_CHECKING:
    from finetune.alignment.rewards import Scale

    from .reward import Quality

GOLD, PROXY = "#b7791f", LINE


def overoptimization(run: Run, of_gold: Scale | None, best: Sequence[tuple[float, float, float]]) -> None:
    """overoptimization.png: proxy and gold reward over the square root of the KL to the SFT model, of each step of the
    policy and of best-of-n (Gao et al. 2022, arXiv:2210.10760, figure 1); both on the scale of the SFT model's answers,
    on which these have mean 0 and deviation 1."""
    series = run.metrics.series()
    if "kl" not in series:
        return
    made, (axes, text) = figure(12.5, 4.8, 1, 2)
    for name, color in (("proxy", PROXY), ("gold", GOLD)):
        if name == "gold" and of_gold is None:
            continue
        for phase, style in (("", "-"), ("beyond: ", "--")):
            if f"{phase}kl" not in series:
                continue
            kls, values = series[f"{phase}kl"][1], series[f"{phase}{name}"][1]
            if name == "gold" and of_gold is not None:
                values = [(v - of_gold.mean) / (of_gold.deviation or 1) for v in values]
            roots = [max(0.0, kl) ** 0.5 for kl in kls]
            axes.plot(roots, values, ".", color=color, alpha=0.3, markersize=5)
            label = f"{name}, {'nothing holds the policy' if phase else 'KL penalty, reward clipped'}"
            axes.plot(*smooth(roots, values), style, color=color, linewidth=2, label=label)
        if best:
            place = 1 if name == "proxy" else 2
            axes.plot([row[0] ** 0.5 for row in best], [row[place] for row in best], ":", color=color, linewidth=2.2,
                      label=f"{name}, best of 1 … {len(best)}")  # fmt: skip
    axes.axhline(0, color=FAINT, linewidth=0.8)
    axes.set_xlabel("√ KL(policy ‖ SFT model), nats an answer", color=INK)
    axes.set_ylabel("reward (deviations of the SFT model's answers)", color=INK)
    axes.set_title("reward over distance from the SFT model", loc="left", fontsize=11, color=INK)
    axes.legend(fontsize=8.5, frameon=False)
    steps(text, series)
    save(made, run.dir / "overoptimization.png")


def smooth(roots: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    """Both in the order of the steps, averaged over neighbors."""
    width = max(3, len(roots) // 6)
    return moving_average(roots, width), moving_average(values, width)


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
