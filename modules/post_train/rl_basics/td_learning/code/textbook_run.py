"""`--experiment textbook`: trains the loops of `textbook.py` and prints what each of them learns.

Prediction: five algorithms see the same episodes of the 5-state random walk, whose values are 1/6 … 5/6. Control: four
algorithms walk along the cliff, each by its own ε-greedy policy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from finetune.rl.envs.rollout import numpy_generator
from finetune.rl.tabular import mdp as tables
from finetune.rl.tabular import worlds
from finetune.rl.tabular.mdp import Array
from finetune.runs.plots import figure, save
from finetune.runs.run import Run

from . import textbook

EPISODES = 5  # of each algorithm in a step
EPSILON = 0.1

# name → how it changes V after an episode (states, rewards); γ = 1
PREDICTION: dict[str, Callable[[Array, list[int], list[float]], None]] = {
    "Monte Carlo": lambda V, s, r: textbook.monte_carlo(V, s, r, 0.02, 1.0, first=False),
    "TD(0)": lambda V, s, r: textbook.td0(V, s, r, 0.05, 1.0),
    "4-step TD": lambda V, s, r: textbook.n_step_td(V, s, r, 4, 0.03, 1.0),
    "TD(λ)": lambda V, s, r: textbook.td_lambda(V, s, r, 0.8, 0.03, 1.0, "accumulating"),
    "true online TD(λ)": lambda V, s, r: textbook.true_online_td_lambda(V, s, r, 0.8, 0.03, 1.0),
}
# name → one episode that changes the tables Q (two of them for double Q-learning)
CONTROL: dict[str, Callable[..., float]] = {
    "SARSA": lambda env, Q, rng: textbook.sarsa(env, Q[0], 0.5, 1.0, EPSILON, rng),
    "expected SARSA": lambda env, Q, rng: textbook.expected_sarsa(env, Q[0], 0.5, 1.0, EPSILON, rng),
    "Q-learning": lambda env, Q, rng: textbook.q_learning(env, Q[0], 0.5, 1.0, EPSILON, rng),
    "double Q-learning": lambda env, Q, rng: textbook.double_q_learning(env, Q[0], Q[1], 0.5, 1.0, EPSILON, rng),
}


def column(name: str) -> str:
    """The name of an algorithm in metrics.csv: `td_0`, `q_learning`, …"""
    letters = name.lower().replace("λ", "lambda").replace("(", "_").replace(")", "")
    return letters.replace("-", "_").replace(" ", "_")


def run_textbook(run: Run, steps: int) -> None:
    walk, cliff = worlds.random_walk(), worlds.world("cliff_walking")
    truth = tables.solve(walk, tables.uniform(walk))
    V = {name: torch.from_numpy(np.where(walk.terminal, 0.0, 0.5)) for name in PREDICTION}
    Q = {name: torch.zeros(2, *cliff.size, dtype=torch.float64) for name in CONTROL}
    first_error = rms_error(V["TD(0)"].numpy(), truth)

    for step in run.steps(steps, {"V": V, "Q": Q}):
        rng, log = numpy_generator(run, "textbook walk", step), {}
        episodes = [walk_episode(textbook.World(walk, rng)) for _ in range(EPISODES)]
        for name, learn in PREDICTION.items():
            for states, rewards in episodes:
                learn(V[name].numpy(), states, rewards)  # shares the memory of the tensor
            log[f"error_{column(name)}"] = rms_error(V[name].numpy(), truth)
        for name, episode in CONTROL.items():
            rng = numpy_generator(run, name, step)
            env = textbook.World(cliff, rng, limit=300)
            returns = [episode(env, Q[name].numpy(), rng) for _ in range(EPISODES)]
            log[f"return_{column(name)}"] = float(np.mean(returns))
        run.log(step, **log)

    series = run.metrics.series()
    print_values(run, series, {name: table.numpy() for name, table in V.items()}, truth)
    print_returns(run, series, {name: table.numpy() for name, table in Q.items()})
    if steps:
        td0 = float(np.mean(series["error_td_0"][1][-10:]))
        run.result("error_td_0", td0, baseline=first_error, target=first_error / 2, higher=False)
        late = {name: float(np.mean(series[f"return_{column(name)}"][1][-10:])) for name in CONTROL}
        for name in ("SARSA", "Q-learning"):
            first = series[f"return_{column(name)}"][1][0]
            run.result(f"return_{column(name)}", late[name], baseline=first, target=first / 2)
        picture(run, series, truth, {name: table.numpy() for name, table in V.items()})


def walk_episode(env: textbook.World) -> tuple[list[int], list[float]]:
    """States [S_0 … S_T] and rewards [R_1 … R_T] of one episode; the walk has a single action."""
    states, rewards, over = [env.reset()], [], False
    while not over:
        state, reward, over = env.step(0)
        states.append(state)
        rewards.append(reward)
    return states, rewards


def rms_error(V: Array, truth: Array) -> float:
    return float(np.sqrt(((V - truth)[1:-1] ** 2).mean()))


def sparkline(values: list[float], width: int = 24) -> str:
    """A curve in one line of text: ▇▅▃▂▁"""
    if not values:
        return ""
    chunks = [float(np.mean(part)) for part in np.array_split(np.array(values), min(width, len(values)))]
    low, high = min(chunks), max(chunks)
    return "".join("▁▂▃▄▅▆▇█"[int(7 * (x - low) / (high - low or 1.0))] for x in chunks)


Series = dict[str, tuple[list[int], list[float]]]  # of run.metrics


def print_values(run: Run, series: Series, V: dict[str, Array], truth: Array) -> None:
    def row(name: str, values: Array, errors: list[float]) -> dict[str, Any]:
        learned = {f"V({s})": f"{values[s]:.3f}" for s in range(1, 6)}
        last = f"{np.mean(errors[-10:]):.3f}" if errors else ""
        return {"algorithm": name, **learned, "RMS error by episode": sparkline(errors), "last": last}

    rows = [row("exact", truth, [])]
    rows += [row(name, values, series.get(f"error_{column(name)}", ([], []))[1]) for name, values in V.items()]
    run.table("prediction: the 5-state random walk", rows)


def print_returns(run: Run, series: Series, Q: dict[str, Array]) -> None:
    rows = []
    for name, table in Q.items():
        returns = series.get(f"return_{column(name)}", ([], []))[1]
        if returns:
            path = greedy_return(table.sum(0))
            rows.append({"algorithm": name, "return by episode": sparkline(returns), "first": f"{returns[0]:.0f}",
                         "last": f"{np.mean(returns[-10:]):.1f}", "greedy path": f"{path:.0f}"})  # fmt: skip
    if rows:
        run.table("control: the cliff, ε = 0.1", rows)


def greedy_return(Q: Array) -> float:
    """The return of the greedy policy on the cliff, up to 100 steps."""
    cliff = worlds.world("cliff_walking")
    policy = tables.one_hot(cliff, Q.argmax(1))
    return float(cliff.start @ tables.evaluate(cliff, policy, np.zeros(cliff.size[0]), 100))


def picture(run: Run, series: Series, truth: Array, V: dict[str, Array]) -> None:
    """textbook.png: values and errors of prediction, returns of control."""
    made, (left, middle, right) = figure(15, 4.4, 1, 3)
    left.plot(range(1, 6), truth[1:-1], color="#1a202c", linewidth=2.5, label="exact")
    for name, values in V.items():
        left.plot(range(1, 6), values[1:-1], "o-", markersize=4, linewidth=1.2, label=name)
        x, y = series[f"error_{column(name)}"]
        middle.plot(EPISODES * (np.array(x) + 1), y, linewidth=1.6, label=name)
    for name in CONTROL:
        x, y = series[f"return_{column(name)}"]
        right.plot(EPISODES * (np.array(x) + 1), y, linewidth=1.6, label=name)
    right.set_ylim(-120, 0)
    for ax, title, label in (
        (left, "random walk: learned values", "state"),
        (middle, "random walk: RMS error", "episodes"),
        (right, "cliff: return while learning", "episodes"),
    ):
        ax.set_title(title, loc="left", fontsize=12)
        ax.set_xlabel(label)
        ax.legend(fontsize=9, frameon=False)
    save(made, run.dir / "textbook.png")
