"""The module's own pictures: bias against deviation, errors over samples, variance of the gradient by its factor."""

import numpy as np

from finetune.plots import INK, figure, save

COLOURS = (
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


def estimators(run, found: dict[str, float], names: tuple[str, ...]) -> None:
    """estimators.png: bias and deviation of each with the half-learnt critic."""
    made, [axes] = figure(8.6, 4.8)
    for name, colour in zip(names, COLOURS, strict=True):
        x, y = found[f"deviation_{name}"], found[f"bias_{name}"]
        axes.plot(x, y, "o", color=colour, markersize=9, label=name.replace("_", " "))
    axes.set_title("with a half-learnt critic: bias against deviation", loc="left", fontsize=11, color=INK)
    axes.set_xlabel("standard deviation of one estimate", color=INK)
    axes.set_ylabel("bias that the gradient sees", color=INK)
    axes.margins(x=0.12, y=0.12)
    axes.set_xscale("log")
    axes.legend(fontsize=9, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    save(made, run.dir / "estimators.png")


def errors(run, per_step: int, names: tuple[str, ...]) -> None:
    """error_over_samples.png: the error of the mean of n estimates falls as 1/√n down to the bias."""
    series = run.metrics.series()
    made, [axes] = figure(8.6, 4.8)
    for name, colour in zip(names, COLOURS, strict=True):
        xs, ys = series[f"error_{name}"]
        axes.plot((np.array(xs) + 1) * per_step, ys, color=colour, linewidth=1.8, label=name.replace("_", " "))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_title("error of the mean of n estimates, half-learnt critic", loc="left", fontsize=11, color=INK)
    axes.set_xlabel("n: rollouts from each state", color=INK)
    axes.set_ylabel("root mean square error", color=INK)
    axes.legend(fontsize=9, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    save(made, run.dir / "error_over_samples.png")


def gradient_variance(run, spread: dict[str, float]) -> None:
    """gradient_variance.png: the variance of one rollout's gradient, reward-to-go = 1."""
    made, [axes] = figure(7.6, 4.2)
    kept = {name: value for name, value in spread.items() if name != "group_normalised"}  # of another scale
    names = sorted(kept, key=lambda name: -kept[name])
    axes.barh(range(len(names)), [kept[name] for name in names], color="#1769aa", height=0.6)
    for i, name in enumerate(names):
        axes.text(kept[name] * 1.05, i, f"{kept[name]:.3g}", va="center", fontsize=9, color=INK)
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.set_title(
        "variance of the policy gradient by its factor (reward-to-go = 1)", loc="left", fontsize=11, color=INK
    )
    save(made, run.dir / "gradient_variance.png")
