"""Pictures of the advantage module: bias and noise, error over samples, gradient variance, rescaling, tokens."""

from __future__ import annotations

import numpy as np

from finetune.runs.display import uncertain
from finetune.runs.plots import INK, figure, save
from finetune.runs.run import Run

COLORS = (
    "#1769aa",
    "#c53030",
    "#2e7d32",
    "#805ad5",
    "#b7791f",
    "#8a8f98",
    "#0e7c86",
    "#d53f8c",
    "#5a4632",
    "#00a676",
    "#1f2933",
)


def estimators(run: Run, found: dict[str, dict[str, float]]) -> None:
    """estimators.png: bias ± standard error over the standard deviation of one estimate, half-learned critic."""
    made, [axes] = figure(8.6, 4.8)
    for (name, f), color in zip(found.items(), COLORS, strict=True):
        around = [[f["bias"] - f["low"]], [f["high"] - f["bias"]]]
        within = f["low"] == 0
        axes.errorbar(f["std"], f["bias"], around, fmt="o", color=color, markersize=8, linewidth=1.4, capsize=3,
                      markerfacecolor="white" if within else color, label=name.replace("_", " "))  # fmt: skip
    axes.set_title(
        "half-learned critic: bias ± standard error over noise (hollow: within its noise of zero)",
        loc="left", fontsize=11, color=INK,
    )  # fmt: skip
    axes.set_xlabel("standard deviation of one estimate", color=INK)
    axes.set_ylabel("bias that the gradient sees", color=INK)
    axes.margins(x=0.12, y=0.12)
    axes.set_xscale("log")
    axes.legend(fontsize=9, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    save(made, run.dir / "estimators.png")


def errors(run: Run, per_step: int, names: list[str]) -> None:
    """error_over_samples.png: the error of the mean of n estimates, which falls as 1/√n down to the bias."""
    series = run.metrics.series()
    made, [axes] = figure(8.6, 4.8)
    for name, color in zip(names, COLORS, strict=True):
        xs, ys = series[f"error_{name}"]
        axes.plot((np.array(xs) + 1) * per_step, ys, color=color, linewidth=1.8, label=name.replace("_", " "))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_title("error of the mean of n estimates, half-learned critic", loc="left", fontsize=11, color=INK)
    axes.set_xlabel("n: rollouts from each state", color=INK)
    axes.set_ylabel("root mean square error", color=INK)
    axes.legend(fontsize=9, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    save(made, run.dir / "error_over_samples.png")


def gradient_variance(run: Run, spread: dict[str, tuple[float, float]]) -> None:
    """gradient_variance.png: variance of the sampled gradient by factor ± standard error, reward-to-go = 1."""
    made, [axes] = figure(7.6, 4.2)
    names = sorted(spread, key=lambda name: -spread[name][0])
    values, errors = zip(*(spread[name] for name in names), strict=True)
    axes.barh(range(len(names)), values, xerr=errors, color="#1769aa", height=0.6, capsize=2)
    for i, (value, error) in enumerate(zip(values, errors, strict=True)):
        axes.text((value + error) * 1.06, i, uncertain(value, error), va="center", fontsize=9, color=INK)
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.margins(x=0.3)
    axes.set_title(
        "variance of the policy gradient by its factor (reward-to-go = 1)", loc="left", fontsize=11, color=INK
    )
    save(made, run.dir / "gradient_variance.png")


def rescaling(
    run: Run, sizes: tuple[int, ...], angles: dict[str, list[float]], lengths: dict[str, list[float]]
) -> None:
    """rescaling.png: direction and length of the mean gradient over the size of the batch or group."""
    made, (left, right) = figure(10.4, 4.2, 1, 2)
    for axes, found, title, unit in (
        (left, angles, "direction: angle to ∇J", "degrees"),
        (right, lengths, "length: |E[ĝ]| / |∇J|", "of the exact gradient's"),
    ):
        for (name, ys), color, marker in zip(found.items(), COLORS, "os^vD", strict=False):
            axes.plot(sizes, ys, color=color, marker=marker, linewidth=1.8, markersize=6, label=name.replace("_", " "))
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(n) for n in sizes])
        axes.minorticks_off()
        axes.set_title(title, loc="left", fontsize=11, color=INK)
        axes.set_xlabel("n: draws in the batch (group forms: in the group)", color=INK)
        axes.set_ylabel(unit, color=INK)
        axes.set_ylim(bottom=0 if axes is right else None)
    right.legend(fontsize=9, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    save(made, run.dir / "rescaling.png")


def token_credit(
    run: Run, tokens: list[str], truth: np.ndarray, found: dict[str, np.ndarray], by_place: dict[str, list[float]]
) -> None:
    """token_credit.png: the credit of one answer's tokens by estimator; the error over the place of the token."""
    made, (left, right) = figure(12.5, 4.6, 1, 2)
    places = np.arange(len(tokens))
    left.bar(places, truth, color="#d5dbe1", width=0.7, label="exact A")
    shown = ("gae_rough", "td_rough", "discounted", "leave_one_out", "group_normalized")
    for name, marker in zip(shown, "os^vD", strict=True):
        left.plot(places, found[name], marker=marker, markersize=6, linewidth=1.2, color=TOKEN_COLORS[name],
                  label=name.replace("_", " "))  # fmt: skip
    left.legend(fontsize=8.5, frameon=False)
    left.axhline(0, color=INK, linewidth=0.8)
    left.set_xticks(places, tokens)
    left.set_title("one answer: how much credit each token gets", loc="left", fontsize=11, color=INK)
    left.set_xlabel("token; the second and the last but one decide the score", color=INK)
    left.set_ylabel("advantage", color=INK)
    for name, errors in by_place.items():
        right.plot(places + 1, errors, marker="o", markersize=4, linewidth=1.8, color=TOKEN_COLORS[name],
                   label=name.replace("_", " "))  # fmt: skip
    right.set_xticks(places + 1)
    right.set_ylim(bottom=0)
    right.set_title("error against the exact advantage, by place", loc="left", fontsize=11, color=INK)
    right.set_xlabel("place of the token in the answer", color=INK)
    right.set_ylabel("root mean square error", color=INK)
    right.legend(fontsize=9, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    save(made, run.dir / "token_credit.png")


TOKEN_COLORS = {
    "td": "#2e7d32",
    "gae": "#1769aa",
    "mc": "#8a8f98",
    "td_rough": "#b7791f",
    "gae_rough": "#0e7c86",
    "discounted": "#d53f8c",
    "leave_one_out": "#805ad5",
    "group_normalized": "#c53030",
}
