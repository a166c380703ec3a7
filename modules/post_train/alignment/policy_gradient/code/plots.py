"""The module's own pictures: returns by method, and the short corridor by baseline with confidence bands."""

import numpy as np

from finetune.plots import GOOD, GREY, INK, figure, moving_average, save

COLOURS = {"reinforce": "#1769aa", "natural": "#b7791f", "trpo": "#805ad5",
           "none": "#c53030", "mean": "#1769aa", "leave_one_out": "#2e7d32", "learned": "#805ad5"}  # fmt: skip


def learning(run, cfg) -> None:
    """returns.png: mean return of each update's episodes, and the KL of each step."""
    series = run.metrics.series()
    names = [name for name in cfg.methods.split(",") if f"{name}: return" in series]
    if not names:
        return
    made, (left, right) = figure(11.5, 4.4, 1, 2)
    for name in names:
        xs, ys = series[f"{name}: return"]
        left.plot(xs, ys, color=COLOURS[name], linewidth=0.8, alpha=0.35)
        left.plot(xs, moving_average(ys, max(3, len(ys) // 20)), color=COLOURS[name], linewidth=2, label=name)
        right.plot(*series[f"{name}: kl"], color=COLOURS[name], linewidth=1.2, label=name)
    right.axhline(cfg.delta, color=GREY, linestyle="--", linewidth=1.2, label=f"δ = {cfg.delta:g}")
    right.set_yscale("log")
    left.set_title(f"{cfg.env}: mean return of {cfg.episodes} episodes", loc="left", fontsize=11, color=INK)
    right.set_title("KL of the policy before an update from that after it", loc="left", fontsize=11, color=INK)
    for axes in (left, right):
        axes.set_xlabel("update", color=INK)
        axes.legend(fontsize=9, frameon=False)
    save(made, run.dir / "returns.png")


def corridor(run, baselines: tuple[str, ...], best: float) -> None:
    """corridor.png: the value of the start and p(right), with 95 % bands over the repetitions."""
    series = run.metrics.series()
    made, (left, right) = figure(11.5, 4.4, 1, 2)
    for name in baselines:
        xs, values = series[f"corridor_{name}: value"]
        values, half = np.array(values), np.array(series[f"corridor_{name}: half_width"][1])
        left.plot(xs, values, color=COLOURS[name], linewidth=1.8, label=name.replace("_", " "))
        left.fill_between(
            xs, values - half, np.minimum(values + half, -11.6), color=COLOURS[name], alpha=0.15, linewidth=0
        )
        right.plot(*series[f"corridor_{name}: right"], color=COLOURS[name], linewidth=1.8, label=name.replace("_", " "))
    value = (2 * best - 4) / (best * (1 - best))
    left.axhline(value, color=GOOD, linestyle="--", linewidth=1.2, label=f"best {value:.2f}")
    left.set_ylim(-45, -10)
    right.axhline(best, color=GOOD, linestyle="--", linewidth=1.2, label=f"best {best:.3f}")
    left.set_title("short corridor: value of the start", loc="left", fontsize=11, color=INK)
    right.set_title("p(right)", loc="left", fontsize=11, color=INK)
    for axes in (left, right):
        axes.set_xlabel("update (8 episodes)", color=INK)
        axes.legend(fontsize=9, frameon=False, loc="lower right")
    save(made, run.dir / "corridor.png")
