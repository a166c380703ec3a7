"""Pictures of a run: convergence, values with optimal actions, the book's figures, values over beliefs."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from finetune.rl.tabular import mdp as tables
from finetune.rl.tabular import worlds
from finetune.rl.tabular.mdp import MDP, Array
from finetune.rl.tabular.plots import optimal_actions, value_map
from finetune.runs.plots import FAINT, INK, figure, save
from finetune.runs.run import Run

from . import pomdp
from .policy_iteration import improve, policy_iteration
from .value_iteration import in_place, synchronous

Stages = list[pomdp.Stage]
COLORS = {"value_iteration": "#1769aa", "in_place": "#2e7d32", "prioritized": "#b7791f", "modified": "#805ad5",
           "policy_iteration": "#c53030"}  # fmt: skip


def convergence(run: Run, mdp: MDP, evaluation_sweeps: int) -> None:
    """convergence.png: the largest error after each sweep, and by the number of state–action pairs backed up."""
    series = run.metrics.series()
    if not series:
        return
    states, actions = mdp.size
    pairs = dict.fromkeys(COLORS, states * actions)
    pairs["modified"] += states * evaluation_sweeps
    made, axes = figure(11.5, 4.6, 1, 2)
    floor = 1e-12 * max(max(series[f"error_{name}"][1]) for name in COLORS)
    for name, color in COLORS.items():
        errors = series[f"error_{name}"][1]
        y = np.maximum(errors, floor)
        until = int(np.argmax(y <= floor)) + 1 if (y <= floor).any() else len(y)
        x = np.arange(1, len(y) + 1)
        label = name.replace("_", " ")
        mark = {"marker": "o", "markersize": 4} if until < 30 else {}
        axes[0].plot(x[:until], y[:until], color=color, linewidth=1.9, label=label, **mark)
        if name != "policy_iteration":
            axes[1].plot(x[:until] * pairs[name], y[:until], color=color, linewidth=1.9, label=label, **mark)
    axes[0].plot(np.array(series["bound"][0]) + 1, np.maximum(series["bound"][1], floor), color=INK, linestyle="--",
                 linewidth=1.3, label="γᵏ ‖V₀ − V*‖")  # fmt: skip
    for ax, label in zip(axes, ("sweeps", "state–action pairs backed up"), strict=True):
        ax.set_yscale("log")
        ax.set_xscale("log")
        ax.set_xlabel(label, color=INK)
        ax.set_ylabel("largest error of any state", color=INK)
        ax.legend(fontsize=9, frameon=False)
    axes[0].set_title(
        f"{mdp.name}, γ = {mdp.gamma:g}: the bound holds at each sweep", loc="left", fontsize=12, color=INK
    )
    axes[1].set_title("the same by work", loc="left", fontsize=12, color=INK)
    save(made, run.dir / "convergence.png")


def values(run: Run, mdp: MDP, V: Array, name: str = "values") -> None:
    """values.png: a heat map with every optimal action for a grid, otherwise bars colored by the optimal action."""
    if mdp.shape:
        rows, columns = mdp.shape
        width = 12.0 if columns > 2 * rows else 6.8
        made, (ax,) = figure(width, 0.6 + (width - 1.2) * rows / columns)
        heat(made, ax, mdp, V)
        save(made, run.dir / f"{name}.png")
    else:
        bars(run, mdp, V)


def gallery(run: Run, shown: list[tuple[MDP, Array]]) -> None:
    """gallery.png and cliff_walking.png: the other grids."""
    square = [(mdp, V) for mdp, V in shown if mdp.shape and mdp.shape[0] == mdp.shape[1]]
    made, axes = figure(5.6 * len(square), 5.0, 1, len(square))
    for ax, (mdp, V) in zip(axes, square, strict=True):
        heat(made, ax, mdp, V)
    save(made, run.dir / "gallery.png")
    for mdp, V in shown:
        if mdp.shape and mdp.shape[0] != mdp.shape[1]:
            values(run, mdp, V, "cliff_walking")


def heat(made: Any, ax: Any, mdp: MDP, V: Array) -> None:
    digits = 2 if abs(V).max() < 2 else 1
    image = value_map(ax, mdp, V, optimal_actions(mdp, V), f"{mdp.name}, γ = {mdp.gamma:g}", digits)
    made.colorbar(image, ax=ax, shrink=0.7, pad=0.02).outline.set_visible(False)


def bars(run: Run, mdp: MDP, V: Array) -> None:
    made, (ax,) = figure(9.5, 4.2)
    best = optimal_actions(mdp, V).argmax(1)
    palette = ("#1769aa", "#b7791f", "#2e7d32", "#c53030", "#805ad5", "#63b3ed", "#8a6d3b", "#9fb3c8")
    for a, name in enumerate(mdp.actions):
        where = np.flatnonzero((best == a) & ~mdp.terminal)
        if len(where):
            ax.bar(where, V[where], width=1 if len(V) > 60 else 0.8, color=palette[a % len(palette)], label=name)
    ax.set_xlabel("state", color=INK)
    ax.set_ylabel("value", color=INK)
    ax.set_title(
        f"{mdp.name}, γ = {mdp.gamma:g}: values, colored by the optimal action", loc="left", fontsize=12, color=INK
    )
    ax.legend(
        title="action", fontsize=9, title_fontsize=9, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5)
    )
    save(made, run.dir / "values.png")


def evaluation(run: Run, mdp: MDP, sweeps: dict[float, Array]) -> None:
    """policy_evaluation.png, Figure 4.1: values of the random policy after k sweeps, and the greedy policy by them."""
    made, axes = figure(13.5, 5.4, 2, len(sweeps))
    for i, (k, V) in enumerate(sweeps.items()):
        title = "k = ∞" if math.isinf(k) else f"k = {k:g}"
        value_map(axes[i], mdp, V, None, title, 1)
        value_map(axes[len(sweeps) + i], mdp, V, optimal_actions(mdp, V), "greedy" if i else "greedy: all alike", 1)
    made.suptitle("Iterative policy evaluation of the random policy: the greedy policy is optimal from k = 3 on",
                  x=0.01, ha="left", fontsize=12, color=INK)  # fmt: skip
    save(made, run.dir / "policy_evaluation.png")


def car_rental(run: Run) -> None:
    """car_rental.png, Figure 4.2: policy iteration from never moving a car, and the value of the last policy."""
    mdp = worlds.car_rental()
    policy = tables.one_hot(mdp, np.full(mdp.size[0], 5))
    policies = [policy]
    while True:
        V = tables.solve(mdp, policy)
        policy = improve(mdp, policy, V)
        if (policy == policies[-1]).all():
            break
        policies.append(policy)
    made, axes = figure(12.5, 7.6, 2, 3)
    for k, (ax, policy) in enumerate(zip(axes, policies, strict=False)):
        cars = policy.argmax(1).reshape(21, 21) - 5
        image = ax.imshow(cars, origin="lower", cmap="RdBu", vmin=-5.5, vmax=5.5, aspect="equal")
        ax.contour(cars, levels=np.arange(-4.5, 5), colors=INK, linewidths=0.6)
        ax.set_title(f"π{'₀₁₂₃₄₅'[k]}", loc="left", fontsize=12, color=INK)
    made.colorbar(image, ax=axes[2], shrink=0.8, label="cars moved to the second place", ticks=range(-5, 6))
    surface = axes[5].imshow(V.reshape(21, 21), origin="lower", cmap="YlGnBu")
    lines = axes[5].contour(V.reshape(21, 21), levels=8, colors="white", linewidths=0.6)
    axes[5].clabel(lines, fontsize=8, fmt="%.0f")
    made.colorbar(surface, ax=axes[5], shrink=0.8)
    axes[5].set_title("value of the last policy", loc="left", fontsize=12, color=INK)
    for ax in axes:
        ax.grid(False)
        ax.set_xticks(range(0, 21, 5))
        ax.set_yticks(range(0, 21, 5))
        ax.set_xlabel("cars at the second place", fontsize=9, color=INK)
        ax.set_ylabel("cars at the first", fontsize=9, color=INK)
    save(made, run.dir / "car_rental.png")


def gambler(run: Run) -> None:
    """gambler.png, Figure 4.3: values after some sweeps of value iteration, and the optimal stakes."""
    mdp = worlds.gambler()
    made, axes = figure(11.5, 4.4, 1, 2)
    V = np.zeros(mdp.size[0])
    shades = {1: "#bcd4e6", 2: "#7fb0d6", 3: "#3f88c0", 32: "#0b3d66"}
    for sweep in range(1, 33):
        V = in_place(mdp, V)
        if sweep in shades:
            axes[0].plot(range(1, 100), V[1:100], color=shades[sweep], linewidth=1.7, label=f"sweep {sweep}")
    V, _, _ = policy_iteration(mdp)
    axes[0].legend(fontsize=9, frameon=False)
    axes[0].set_title("gambler, heads with 0.4: value estimates", loc="left", fontsize=12, color=INK)
    axes[0].set_ylabel("probability of reaching 100", color=INK)
    capital, stake = np.nonzero(optimal_actions(mdp, V, 1e-9)[1:100])
    axes[1].plot(capital + 1, stake + 1, ".", color="#b7791f", markersize=4, label="every optimal stake")
    smallest = optimal_actions(mdp, V, 1e-9)[1:100].argmax(1) + 1
    axes[1].step(range(1, 100), smallest, where="mid", color="#1769aa", linewidth=1.2, label="the smallest of them")
    axes[1].set_title("stakes", loc="left", fontsize=12, color=INK)
    axes[1].set_ylabel("stake", color=INK)
    axes[1].legend(fontsize=9, frameon=False)
    for ax in axes:
        ax.set_xlabel("capital", color=INK)
    save(made, run.dir / "gambler.png")


def contraction(run: Run, ending: MDP, endless: MDP, measure: Callable[..., Array], rng: np.random.Generator) -> None:
    """contraction.png: one sweep's ratio for many pairs by γ; and the distance of two value functions over sweeps."""
    made, axes = figure(11.5, 4.4, 1, 2)
    gammas = np.linspace(0.05, 1, 20)
    for column, (name, color) in enumerate((("optimality operator", "#1769aa"), ("uniform policy's", "#b7791f"))):
        ratios = np.array([measure(ending.discounted(g), tables.uniform(ending), 40, rng)[:, column] for g in gammas])
        x = np.repeat(gammas, 40) + (0.008 if column else -0.008)
        axes[0].plot(x, ratios.ravel(), ".", color=color, markersize=3, alpha=0.6, label=name)
    axes[0].plot([0, 1], [0, 1], color=INK, linestyle="--", linewidth=1.3, label="γ")
    axes[0].set_xlabel("γ", color=INK)
    axes[0].set_ylabel("‖TV − TW‖ / ‖V − W‖", color=INK)
    axes[0].set_title(f"one sweep of {ending.name}, random pairs", loc="left", fontsize=12, color=INK)
    cases = ((ending, 0.9, "#2e7d32"), (ending, 0.99, "#1769aa"), (ending, 1.0, "#805ad5"), (endless, 1.0, "#c53030"))
    for mdp, gamma, color in cases:
        mdp = mdp.discounted(gamma)
        V, W = np.where(mdp.terminal, 0, rng.standard_normal((2, mdp.size[0])))
        distance = []
        for _ in range(300):
            distance.append(abs(V - W).max())
            V, W = synchronous(mdp, V), synchronous(mdp, W)
        label = f"γ {gamma:g}, {'with' if mdp.terminal.any() else 'without'} an end"
        axes[1].plot(np.array(distance) / distance[0], color=color, linewidth=1.9, label=label)
    axes[1].set_yscale("log")
    axes[1].set_ylim(1e-6, 2)
    axes[1].set_xlabel("sweeps k", color=INK)
    axes[1].set_ylabel("‖TᵏV − TᵏW‖ / ‖V − W‖", color=INK)
    axes[1].set_title("γ = 1 shrinks only where there is an end", loc="left", fontsize=12, color=INK)
    for ax in axes:
        ax.legend(fontsize=9, frameon=False)
    save(made, run.dir / "contraction.png")


def average_reward(
    run: Run,
    mdp: MDP,
    policy: Array,
    gain: float,
    bias: Array,
    bounds: list[tuple[float, float]],
    limit: dict[float, Array],
) -> None:
    """average_reward.png: bounds on the gain by sweep, (1 − γ) V_γ as γ → 1, the optimal policy of the queue."""
    made, axes = figure(14.5, 4.4, 1, 3)
    lower, upper = np.array(bounds).T
    x = np.arange(len(lower))
    axes[0].fill_between(x, lower, upper, color="#cfe1f2", label="min … max of T h − h")
    axes[0].axhline(gain, color="#c53030", linewidth=1.3, label=f"optimal gain {gain:.4f}")
    axes[0].set_xlim(0, 60)
    axes[0].set_xlabel("sweeps of relative value iteration", color=INK)
    axes[0].set_ylabel("reward per step", color=INK)
    axes[0].set_title("the gain lies between two bounds", loc="left", fontsize=12, color=INK)
    rest = np.array([1 - gamma for gamma in limit])
    for s, label, color in ((3, "no server free", "#b7791f"), (mdp.size[0] - 1, "all free", "#1769aa")):
        values = np.array([r * V[s] for r, V in zip(rest, limit.values(), strict=True)])
        axes[1].plot(rest, values, "o", color=color, label=f"(1 − γ) V, {label}")
        axes[1].plot(rest, gain + rest * bias[s], "--", color=color, linewidth=1.2, label="g + (1 − γ) h")
    axes[1].axhline(gain, color="#c53030", linewidth=1.3)
    axes[1].set_xscale("log")
    axes[1].invert_xaxis()
    axes[1].set_xlabel("1 − γ", color=INK)
    axes[1].set_title("discounted values converge to it", loc="left", fontsize=12, color=INK)
    for ax in axes[:2]:
        ax.legend(fontsize=9, frameon=False)
    accepted = policy[:, 1].reshape(-1, 4).T
    axes[2].imshow(accepted, origin="lower", cmap="Blues", vmin=0, vmax=1.6, aspect="auto")
    for (row, column), yes in np.ndenumerate(accepted):
        axes[2].text(column, row, "accept" if yes else "reject", ha="center", va="center", fontsize=7, color=INK)
    axes[2].set_yticks(range(4), [str(2**k) for k in range(4)])
    axes[2].set_xticks(range(accepted.shape[1]))
    axes[2].grid(False)
    axes[2].set_xlabel("free servers", color=INK)
    axes[2].set_ylabel("payment of the customer", color=INK)
    axes[2].set_title("the optimal policy, Figure 10.5", loc="left", fontsize=12, color=INK)
    save(made, run.dir / "average_reward.png")


def tiger(run: Run, world: pomdp.POMDP, stages: Stages, mild: pomdp.POMDP, best: Stages) -> None:
    """tiger.png: value, α-vectors and optimal action by belief, for three steps, for the whole horizon, and for the
    whole horizon with a mild tiger."""
    made, axes = figure(15.0, 4.6, 1, 3)
    right = np.linspace(0, 1, 1001)
    beliefs = np.stack([1 - right, right], 1)
    colors = ("#1769aa", "#2e7d32", "#c53030")
    cases = ((world, stages[min(2, len(stages) - 1)], min(3, len(stages))), (world, stages[-1], len(stages)))
    for ax, (problem, stage, steps) in zip(axes, (*cases, (mild, best[-1], len(best))), strict=True):
        V, actions = pomdp.value(beliefs, stage), pomdp.optimal_action(beliefs, stage)
        spread = np.ptp(V)
        for alpha in stage[0]:
            ax.plot(right, beliefs @ alpha, color=FAINT, linewidth=0.8)
        for a, name in enumerate(problem.mdp.actions):
            ax.plot(right, np.where(actions == a, V, np.nan), color=colors[a], linewidth=3, label=name)
            ax.fill_between(
                right, 0, 1, where=actions == a, color=colors[a], alpha=0.12, transform=ax.get_xaxis_transform()
            )
        if problem is mild:
            promised = pomdp.value(beliefs, pomdp.qmdp(problem, steps))
            ax.set_title(
                f"a mild tiger (−10): QMDP promises {promised.min():.0f} and more", loc="left", fontsize=12, color=INK
            )
        else:
            ax.set_title(f"tiger, {steps} steps to go", loc="left", fontsize=12, color=INK)
        ax.set_ylim(V.min() - 0.5 * spread, V.max() + 0.25 * spread)
        ax.set_xlabel("belief that the tiger is on the right", color=INK)
        ax.set_ylabel("value", color=INK)
        ax.legend(fontsize=9, frameon=False, loc="lower center")
    save(made, run.dir / "tiger.png")
