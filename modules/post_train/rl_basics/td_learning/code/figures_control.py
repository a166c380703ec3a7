"""Experiments on control: the cliff, maximization bias, Mountain Car; and Baird's counterexample."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from finetune.rl.tabular import mdp as tables
from finetune.rl.tabular import worlds
from finetune.rl.tabular.mdp import MDP
from finetune.runs.run import Run

from . import control, gradient_td
from .control import run_episodes
from .experiments import Totals, estimate
from .mountain_car import cost_to_go, sarsa_mountain_car
from .n_step_control import SIGMAS, QSigma

if TYPE_CHECKING:
    from .main import Config

N_STEPS = 3  # of n-step SARSA, Q(σ) and tree backup on the cliff
TRACES, LAMBDA = ("sarsa_lambda", "q_lambda"), 0.5  # on the cliff
CLIFF_KINDS = (*control.KINDS, *SIGMAS, *TRACES)  # the rows of Example 6.6
BIAS_KINDS: tuple[control.Kind, ...] = ("q_learning", "double_q", "expected_sarsa")
CAR_ALPHAS = np.array([0.1, 0.2, 0.5])  # over the number of tilings
BAIRD_STEPS = 1000
METHODS: tuple[gradient_td.Method, ...] = ("td", "tdc", "gtd2")

# --- Example 6.6: cliff walking


def cliff(cfg: Config, totals: Totals, rng: np.random.Generator) -> None:
    """Example 6.6: α = 0.5, ε = 0.1; sums of rewards while learning, and those of the greedy policy at the end."""
    runs, episodes, alpha = cfg.cliff_runs, cfg.cliff_episodes, 0.5 * cfg.rate
    mdp = worlds.world("cliff_walking")
    learners = control.Learners(mdp, control.KINDS, runs, alpha, 0.1, rng, limit=300)
    sums = [run_episodes(learners, episodes, rng)]
    for sigma in SIGMAS.values():
        sums.append(run_episodes(QSigma(mdp, N_STEPS, sigma, runs, alpha, 0.1, rng, limit=300), episodes, rng))
    traces = control.TraceLearners(mdp, ("sarsa", "q_learning"), runs, alpha, 0.1, rng, lam=LAMBDA, limit=300)
    sums.append(run_episodes(traces, episodes, rng))
    online = np.concatenate(sums)  # (K, R, E)
    totals.add("6.6", online, axis=1)
    totals.add("6.6 last", online[:, :, -100:].mean(2))
    totals.add("6.6 first", online[:, :, :50].mean(2))
    learned = learners.Q.sum(0).reshape(-1, runs, *mdp.size)
    learned[control.KINDS.index("double_q")] /= 2
    totals.add("6.6 Q", learned, axis=1)
    greedy = learned[control.KINDS.index("q_learning")].argmax(-1)
    totals.add("6.6 path", np.array([truncated_value(mdp, actions, 100) for actions in greedy]))


def truncated_value(mdp: MDP, actions: NDArray[np.intp], steps: int) -> float:
    """Exact expected return of a deterministic policy over a number of steps."""
    return float(mdp.start @ tables.evaluate(mdp, tables.one_hot(mdp, actions), np.zeros(mdp.size[0]), steps))


def cliff_summary(totals: Totals) -> dict[str, float]:
    return {f"cliff_{kind}": value for kind, value in zip(CLIFF_KINDS, totals.mean("6.6 last"), strict=True)}


def judge_cliff(run: Run, totals: Totals) -> None:
    """SARSA, whose values include exploration, has to earn more than Q-learning by three standard errors."""
    last, first = (
        {kind: estimate(totals, f"6.6 {part}", k) for k, kind in enumerate(CLIFF_KINDS)} for part in ("last", "first")
    )
    (sarsa, error), (greedy, other) = last["sarsa"], last["q_learning"]
    target = greedy + 3 * math.hypot(error, other)
    run.result("cliff_sarsa", sarsa, error=error, baseline=greedy, target=target)
    for kind, (mean, error) in last.items():
        if kind != "sarsa":
            run.check(f"cliff_{kind}", mean, error=error)
        run.check(f"cliff_{kind}_first_50", first[kind][0], error=first[kind][1])
    # Q-learning's greedy path: −13 is optimal, and it has to be closer to that than to what it earns while exploring
    path, error = estimate(totals, "6.6 path")
    run.check("cliff_q_learning_greedy", path, error=error, at_least=(greedy - 13) / 2)


# --- Example 6.7: maximization bias


def bias(cfg: Config, totals: Totals, rng: np.random.Generator) -> None:
    """Example 6.7: how often each algorithm goes left, where rewards are N(−0.1, 1); right pays 0."""
    runs, episodes = cfg.bias_runs, cfg.bias_episodes
    mdp = worlds.maximization_bias()
    learners = control.Learners(mdp, BIAS_KINDS, runs, 0.1 * cfg.rate, 0.1, rng, noise=np.array([0.0, 1.0, 0.0]))
    left = np.zeros((len(learners.rows), episodes))
    while (learners.envs.episode < episodes).any():
        episode = learners.envs.episode.copy()
        state, action, _, _ = learners.step(rng)
        rows = np.flatnonzero((state == 0) & (episode < episodes))
        left[rows, episode[rows]] = action[rows] == 0
    by_kind = left.reshape(len(BIAS_KINDS), runs, episodes)
    totals.add("6.7", by_kind, axis=1)
    totals.add("6.7 last", by_kind[:, :, -20:].mean(2))


def bias_summary(totals: Totals) -> dict[str, float]:
    return {f"left_{kind}": value for kind, value in zip(BIAS_KINDS, totals.mean("6.7 last"), strict=True)}


def judge_bias(run: Run, totals: Totals) -> None:
    """Double Q-learning has to choose the worse action less often than Q-learning, by three standard errors."""
    left = {kind: estimate(totals, "6.7 last", k) for k, kind in enumerate(BIAS_KINDS)}
    (single, error), (double, other) = left["q_learning"], left["double_q"]
    run.result("left_double_q", double, error=other, baseline=single, target=single - 3 * math.hypot(error, other),
               higher=False)  # fmt: skip
    run.check("left_q_learning", single, error=error)


# --- Figures 10.1 and 10.2: Mountain Car


def car(cfg: Config, totals: Totals, rng: np.random.Generator) -> None:
    """Mountain Car by semi-gradient SARSA with eight tilings (Figures 10.1 and 10.2)."""
    steps, w, tiles = sarsa_mountain_car(cfg.rate * CAR_ALPHAS, cfg.car_runs, cfg.car_episodes, rng, limit=5000)
    totals.add("car", steps.astype(float), axis=1)
    totals.add("car last", steps[:, :, -50:].mean(2))
    totals.add("car first", steps[:, :, 0].astype(float))
    totals.add("car surface", np.stack([cost_to_go(row, tiles) for row in w[-1]], -1))


def car_summary(totals: Totals) -> dict[str, float]:
    return {"car_steps": totals.mean("car last")[-1]}


def judge_car(run: Run, totals: Totals) -> None:
    first = float(totals.mean("car first")[-1])
    steps, error = estimate(totals, "car last", -1)
    run.check("car_steps_first", first)
    run.check("car_steps", steps, error=error, at_most=first / 4)


# --- Figures 11.2 and 11.5: Baird's counterexample


def baird(cfg: Config, totals: Totals, rng: np.random.Generator) -> None:
    """Figures 11.2 and 11.5: α = 0.01, and 0.005 with β = 0.05 for the gradient methods."""
    for method in METHODS:
        alpha, beta = (0.01, 0.0) if method == "td" else (0.005, 0.05)
        w = gradient_td.baird(method, cfg.runs, BAIRD_STEPS, cfg.rate * alpha, cfg.rate * beta, rng)
        totals.add(f"baird {method} weights", w, axis=1)  # (T, 8)
        totals.add(f"baird {method} error", gradient_td.bellman_error(w))
        totals.add(f"baird {method} growth", np.linalg.norm(w[-1], axis=1) / np.linalg.norm(w[0], axis=1))


def baird_summary(totals: Totals) -> dict[str, float]:
    return {f"baird_{method}_growth": float(totals.mean(f"baird {method} growth")) for method in METHODS}


def judge_baird(run: Run, totals: Totals) -> None:
    """The weights of semi-gradient TD grow without bound; those of TDC and GTD2 do not, and their errors vanish."""
    for method in METHODS:
        growth, error = estimate(totals, f"baird {method} growth")
        if method == "td":
            run.check("baird_td_growth", growth, error=error, at_least=5.0)
            continue
        run.check(f"baird_{method}_growth", growth, error=error, at_most=1.0)
        first = float(totals.mean(f"baird {method} error")[0])
        last, error = estimate(totals, f"baird {method} error", -1)
        run.check(f"baird_{method}_error", last, error=error, at_most=first / 10)
