"""Pictures of a run: the book's figures with bands of two standard errors over runs."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from finetune.rl.envs.rollout import numpy_generator
from finetune.rl.tabular import worlds
from finetune.rl.tabular.mdp import MDP, Array, one_hot
from finetune.rl.tabular.plots import value_map
from finetune.runs.plots import INK, figure, save
from finetune.runs.run import Run

from . import control, figures_prediction, mountain_car
from .dqn import VARIANTS
from .experiments import Totals
from .figures_control import BAIRD_STEPS, BIAS_KINDS, CAR_ALPHAS, CLIFF_KINDS, LAMBDA, METHODS, N_STEPS
from .figures_prediction import ALPHAS, EPISODES, LAMBDAS, LOOPS, MC_ALPHAS, STEPS, TD_ALPHAS, TRACES

BLUE, GREEN, AMBER, RED, VIOLET = "#1769aa", "#2e7d32", "#b7791f", "#c53030", "#805ad5"
NAMES = {"sarsa": "SARSA", "expected_sarsa": "expected SARSA", "q_learning": "Q-learning", "double_q": "double Q",
         "tree_backup": f"{N_STEPS}-step tree backup, σ = 0", "q_sigma": f"{N_STEPS}-step Q(σ), σ = 0.5",
         "n_step_sarsa": f"{N_STEPS}-step SARSA, σ = 1", "sarsa_lambda": f"SARSA(λ), λ = {LAMBDA:g}",
         "q_lambda": f"Watkins' Q(λ), λ = {LAMBDA:g}"}  # fmt: skip
COLORS = {"sarsa": BLUE, "expected_sarsa": GREEN, "q_learning": RED, "double_q": VIOLET, "tree_backup": GREEN,
           "q_sigma": AMBER, "n_step_sarsa": BLUE, "sarsa_lambda": VIOLET, "q_lambda": RED}  # fmt: skip


def band(ax: Any, x: NDArray[Any], mean: Array, error: Array, color: Any, label: str, **style: Any) -> None:
    ax.plot(x, mean, color=color, label=label, **{"linewidth": 1.7, **style})
    ax.fill_between(x, mean - 2 * error, mean + 2 * error, color=color, alpha=0.18, linewidth=0)


def shades(name: str, count: int) -> list[Any]:
    import matplotlib

    first = 0.0 if name == "viridis" else 0.35
    return [matplotlib.colormaps[name](x) for x in np.linspace(first, 0.95, count)]


def titled(ax: Any, title: str, x: str, y: str) -> None:
    ax.set_title(title, loc="left", fontsize=12, color=INK)
    ax.set_xlabel(x, color=INK)
    ax.set_ylabel(y, color=INK)


def five_states(run: Run, totals: Totals) -> None:
    """random_walk.png, Example 6.2."""
    made, (left, right) = figure(12.5, 4.8, 1, 2)
    x = np.arange(1, 101)
    for name, alphas, cmap in (("td", TD_ALPHAS, "Blues"), ("mc", MC_ALPHAS, "Oranges")):
        mean, error = totals.mean(f"6.2 {name}"), totals.error(f"6.2 {name}")
        for k, color in enumerate(shades(cmap, len(alphas))):
            band(left, x, mean[k], error[k], color, f"{name.upper()}  α = {alphas[k]:g}")
    titled(left, "Example 6.2: TD(0) against constant-α Monte Carlo", "episodes", "RMS error over the five states")
    left.legend(fontsize=8.5, frameon=False, ncols=2)
    left.set_ylim(0, None)
    k = MC_ALPHAS.index(0.02)
    for name, color, label in (("mc", AMBER, "α = 0.02"), ("average", RED, "α = 1/visits")):
        for kind, text, style in (("", "every visit", "-"), ("_first", "first visit", "--")):
            if f"6.2 {name}{kind}" in totals.parts:
                mean, error = totals.mean(f"6.2 {name}{kind}"), totals.error(f"6.2 {name}{kind}")
                row = k if name == "mc" else 0
                band(right, x, mean[row], error[row], color, f"{label}, {text}", linestyle=style)
    titled(right, "Monte Carlo: every visit or the first", "episodes", "RMS error over the five states")
    right.legend(fontsize=9, frameon=False)
    save(made, run.dir / "random_walk.png")


def nineteen_states(run: Run, totals: Totals) -> None:
    """n_step.png, Figure 7.2; lambda.png, Figure 12.6 with the other traces."""
    made, (left, right) = figure(12, 4.8, 1, 2)
    mean, error = totals.mean("7.2"), totals.error("7.2")
    for k, color in enumerate(shades("viridis", len(STEPS))):
        band(left, ALPHAS, mean[k], np.nan_to_num(error[k]), color, f"n = {STEPS[k]}")
    left.set_ylim(0.2, 0.6)
    left.legend(fontsize=8.5, frameon=False, ncols=2)
    titled(left, "Figure 7.2: n-step TD, 19 states, first 10 episodes", "α", "RMS error")
    best = mean.argmin(1)
    rows = np.arange(len(STEPS))
    right.errorbar(STEPS, mean[rows, best], 2 * error[rows, best], color=BLUE, marker="o", linewidth=1.8, capsize=3)
    for n, k, y in zip(STEPS, best, mean[rows, best], strict=True):
        right.annotate(f"α {ALPHAS[k]:g}", (n, y), xytext=(0, 13), textcoords="offset points", ha="center", fontsize=8)
    right.set_xscale("log", base=2)
    right.set_xticks(STEPS, [str(n) for n in STEPS])
    titled(right, "at the best α: between TD(0) and Monte Carlo", "n", "RMS error")
    save(made, run.dir / "n_step.png")

    made, axes = figure(15, 4.6, 1, len(TRACES))
    titles = ("accumulating (Figure 12.6)", "replacing", "dutch", "true online TD(λ)")
    for ax, trace, title in zip(axes, TRACES, titles, strict=True):
        mean, error = totals.mean(f"12.6 {trace}"), totals.error(f"12.6 {trace}")
        for k, color in enumerate(shades("viridis", len(LAMBDAS))):
            shown = mean[k] < 1.5
            band(ax, ALPHAS[shown], mean[k][shown], np.nan_to_num(error[k][shown]), color, f"λ = {LAMBDAS[k]:g}")
        ax.set_ylim(0.2, 0.6)
        titled(ax, title, "α", "RMS error" if ax is axes[0] else "")
    axes[-1].legend(fontsize=8.5, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(made, run.dir / "lambda.png")


def cliff(run: Run, totals: Totals) -> None:
    """cliff.png, Example 6.6: returns while learning; the greedy paths of SARSA and Q-learning."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(15, 8), dpi=120, layout="constrained")
    axes = made.subplot_mosaic([["one", "q_learning"], ["several", "sarsa"]], width_ratios=[1, 1.25])
    mean, error = totals.mean("6.6"), totals.error("6.6")
    titles = {"one": "Example 6.6: cliff walking, ε = 0.1, α = 0.5", "several": "several steps at once, and traces"}
    for name, kinds in (("one", control.KINDS), ("several", CLIFF_KINDS[len(control.KINDS) :])):
        ax = axes[name]
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(True, color="#e4e7eb", linewidth=0.7)
        for kind in kinds:
            k = CLIFF_KINDS.index(kind)
            x, y, e = smooth(np.arange(1.0, len(mean[k]) + 1)), smooth(mean[k]), smooth(error[k])
            band(ax, x, y, e / 3, COLORS[kind], NAMES[kind])  # means of about ten episodes
        ax.set_ylim(-100, -10)
        ax.legend(fontsize=9, frameon=False, loc="lower right")
        titled(ax, titles[name], "episodes", "sum of rewards of an episode")
    world = worlds.world("cliff_walking")
    for kind in ("q_learning", "sarsa"):
        Q = totals.mean("6.6 Q")[control.KINDS.index(kind)]
        greedy = one_hot(world, Q.argmax(1))
        title = f"{NAMES[kind]}: mean of max Q over runs, and where that leads"
        value_map(axes[kind], world, Q.max(1), greedy, title, digits=0)
        axes[kind].plot(*path(world, greedy), color=RED, linewidth=3, alpha=0.55, solid_capstyle="round")
    save(made, run.dir / "cliff.png")


def smooth(values: Array, width: int = 10) -> Array:
    """Moving average over `width` neighbors."""
    width = min(width, len(values))
    return np.convolve(values, np.ones(width) / width, mode="valid")


def path(world: MDP, policy: Array) -> tuple[list[int], list[int]]:
    """Columns and rows of the cells from the start to the end, or until a cell recurs."""
    state, seen = int(world.start.argmax()), []
    while state not in seen:
        seen.append(state)
        if world.terminal[state]:
            break
        state = int(world.P[state, policy[state].argmax()].argmax())
    assert world.shape is not None
    columns = world.shape[1]
    return [s % columns for s in seen], [s // columns for s in seen]


def bias(run: Run, totals: Totals) -> None:
    """bias.png, Example 6.7."""
    made, (ax,) = figure(8, 4.6)
    mean, error = 100 * totals.mean("6.7"), 100 * totals.error("6.7")
    for k, kind in enumerate(BIAS_KINDS):
        band(ax, np.arange(1, mean.shape[1] + 1), mean[k], error[k], COLORS[kind], NAMES[kind])
    ax.axhline(5, color=INK, linestyle="--", linewidth=1.2, label="optimal: ε/2")
    ax.set_ylim(0, 100)
    ax.legend(fontsize=9, frameon=False)
    titled(ax, "Example 6.7: the maximum of noisy estimates is too high", "episodes", "% left, the worse action")
    save(made, run.dir / "bias.png")


def car(run: Run, totals: Totals) -> None:
    """mountain_car.png: Figures 10.1 and 10.2."""
    made, (left, right) = figure(12, 4.8, 1, 2)
    mean, error = totals.mean("car"), totals.error("car")
    for k, color in enumerate((RED, AMBER, BLUE)):
        band(left, np.arange(1, mean.shape[1] + 1), mean[k], error[k], color, f"α = {CAR_ALPHAS[k]:g}/8")
    left.set_yscale("log")
    left.legend(fontsize=9, frameon=False)
    titled(left, "Mountain Car: semi-gradient SARSA, 8 tilings", "episodes", "steps to the goal")
    surface = totals.mean("car surface")
    low, high = mountain_car.LOW, mountain_car.HIGH
    image = right.imshow(
        surface, origin="lower", aspect="auto", cmap="magma", extent=[low[0], high[0], low[1], high[1]]
    )
    right.contour(surface, levels=10, colors="white", linewidths=0.6, alpha=0.7,
                  extent=[low[0], high[0], low[1], high[1]])  # fmt: skip
    right.grid(False)
    made.colorbar(image, ax=right, label="steps to go").outline.set_visible(False)
    titled(right, f"cost to go, −max q, after {mean.shape[1]} episodes", "position", "velocity")
    save(made, run.dir / "mountain_car.png")


def baird(run: Run, totals: Totals) -> None:
    """baird.png, Figures 11.2 and 11.5."""
    made, axes = figure(16.5, 4.4, 1, 4)
    x = np.arange(BAIRD_STEPS + 1)
    titles = {"td": "semi-gradient TD, α = 0.01: diverges", "tdc": "TDC, α = 0.005, β = 0.05", "gtd2": "GTD2, the same"}
    for ax, (method, title) in zip(axes, titles.items(), strict=False):
        mean, error = totals.mean(f"baird {method} weights"), totals.error(f"baird {method} weights")
        for i, color in enumerate([*shades("Blues", 6), AMBER, RED]):
            name = {0: "w₁ … w₆", 6: "w₇", 7: "w₈"}.get(i, "")
            band(ax, x, mean[:, i], error[:, i], color, name, linewidth=1.4)
        titled(ax, title, "steps", "weights")
        ax.legend(fontsize=9, frameon=False)
    for method, color in zip(METHODS, (RED, BLUE, GREEN), strict=True):
        mean, error = totals.mean(f"baird {method} error"), totals.error(f"baird {method} error")
        positive(axes[3], x, mean, error, color, method.upper())
    axes[3].legend(fontsize=9, frameon=False)
    titled(axes[3], "Baird's counterexample", "steps", "RMS Bellman error")
    save(made, run.dir / "baird.png")


def positive(ax: Any, x: NDArray[Any], mean: Array, error: Array, color: Any, label: str) -> None:
    """A band on a logarithmic axis, cut off where it would reach below 0."""
    ax.set_yscale("log")
    ax.plot(x, mean, color=color, linewidth=1.7, label=label)
    ax.fill_between(x, (mean - 2 * error).clip(mean / 20), mean + 2 * error, color=color, alpha=0.18, linewidth=0)


def batch(run: Run, totals: Totals) -> None:
    """batch.png: Figure 6.2 and Example 6.4."""
    made, (left, right) = figure(12, 4.6, 1, 2)
    x = np.arange(1, 101)
    for method, color, label in (("td", BLUE, "batch TD(0)"), ("mc", AMBER, "batch Monte Carlo")):
        band(left, x, totals.mean(f"6.2 batch {method}"), totals.error(f"6.2 batch {method}"), color, label)
    left.set_ylim(0, None)
    left.legend(fontsize=9, frameon=False)
    titled(left, "Figure 6.2: batch training on the random walk", "episodes in the batch", "RMS error")
    for shift, (method, color, label) in ((-0.19, ("td", BLUE, "batch TD(0)")), (0.19, ("mc", AMBER, "Monte Carlo"))):
        values = totals.mean(f"6.4 {method}")[:2]
        bars = right.bar(np.arange(2) + shift, values, 0.36, color=color, label=label)
        right.bar_label(bars, [f"{v:.2f}" for v in values], fontsize=9)
    right.set_xticks([0, 1], ["V(A)", "V(B)"])
    right.set_ylim(0, 1)
    right.grid(False, axis="x")
    right.legend(fontsize=9, frameon=False, loc="upper left")
    titled(right, "Example 6.4: A was seen once, and returned 0", "", "value")
    save(made, run.dir / "batch.png")


def importance(run: Run, totals: Totals) -> None:
    """importance.png: Figures 5.3 and 5.4, and weights of each decision."""
    made, (left, middle, right) = figure(16, 4.6, 1, 3)
    shown = {"ordinary": GREEN, "weighted": RED, "per_decision": BLUE}
    for ax, key in ((left, "5.3"), (right, "5.9")):
        for name, color in shown.items():
            if f"{key} {name}" in totals.parts:
                mean, error = totals.mean(f"{key} {name}"), totals.error(f"{key} {name}")
                positive(ax, EPISODES[: len(mean)], mean, error, color, name.replace("_", " "))
        ax.set_xscale("log")
        ax.legend(fontsize=9, frameon=False)
    titled(left, "Figure 5.3: the value of a blackjack state", "episodes", "mean squared error")
    titled(right, "rewards at every step: a ratio for each", "episodes", "mean squared error")
    for name, paths in figures_prediction.loop_paths(numpy_generator(run, "paths")).items():
        for k, path in enumerate(paths):
            middle.plot(LOOPS, path, color=shown[name], linewidth=1.3, label="" if k else name, alpha=0.8)
    middle.set_xscale("log")
    middle.set_ylim(0, 3)
    middle.legend(fontsize=9, frameon=False)
    titled(middle, "Figure 5.4: infinite variance, ten runs", "episodes", "estimate; the value is 1")
    save(made, run.dir / "importance.png")


def dqn_curves(run: Run, curves: dict[str, Tensor], each: int, env: str) -> None:
    """dqn.png: returns of the greedy policies (evaluations, learners) of each variant, their mean with a band, and the
    mean of plain DQN for comparison."""
    names = {"dqn": "DQN", "n_step": f"{VARIANTS['n_step'].n}-step", "all": "all four"}
    colors = dict(zip(VARIANTS, (RED, AMBER, VIOLET, "#4a5568", BLUE, GREEN), strict=True))
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    made, axes = figure(1 + 4.4 * columns, 0.6 + 3.5 * rows, rows, columns)
    first = next(iter(curves))
    for ax, (kind, curve) in zip(axes, curves.items(), strict=False):
        steps, values, label = each * np.arange(1, len(curve) + 1), curve.double().numpy(), names.get(kind, kind)
        error = values.std(1, ddof=1) / np.sqrt(values.shape[1]) if values.shape[1] > 1 else np.zeros(len(values))
        ax.plot(steps, values, color=colors[kind], linewidth=0.8, alpha=0.45)
        band(ax, steps, values.mean(1), error, colors[kind], f"{label}, mean of {values.shape[1]}", linewidth=2.2)
        if kind != first == "dqn":
            ax.plot(
                steps, curves[first].mean(1), color=RED, linewidth=1.2, linestyle="--", label=names.get(first, first)
            )
        if env == "CartPole-v1":
            ax.set_ylim(0, 510)
        ax.legend(fontsize=8.5, frameon=True, framealpha=0.85, edgecolor="none", loc="lower right")
        titled(ax, f"{env.removesuffix('-v1')}: {label}", "steps of each learner", "return of the greedy policy")
    for ax in axes[len(curves) :]:
        ax.set_visible(False)
    save(made, run.dir / "dqn.png")
