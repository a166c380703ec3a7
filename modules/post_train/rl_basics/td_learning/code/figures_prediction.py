"""Experiments on prediction: Example 6.2, Figures 7.2 and 12.6, batch updating, importance sampling."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from finetune.rl.tabular import mdp as tables
from finetune.rl.tabular import worlds
from finetune.rl.tabular.mdp import MDP, Array
from finetune.runs.run import Run

from . import batch, off_policy, prediction
from .experiments import Totals, estimate, pairs, smallest
from .published import N_4, PUBLISHED, TD_MEAN, WITHIN

if TYPE_CHECKING:
    from .main import Config

TD_ALPHAS, MC_ALPHAS = (0.05, 0.1, 0.15), (0.01, 0.02, 0.03, 0.04)  # of Example 6.2
ALPHAS = np.array([0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
STEPS = 2 ** np.arange(10)  # n of Figure 7.2
LAMBDAS = np.array([0.0, 0.4, 0.8, 0.9, 0.95, 0.975, 0.99, 1.0])
TRACES: tuple[prediction.Trace, ...] = ("accumulating", "replacing", "dutch", "true_online")
FIGURE_12_6 = "12.6 accumulating"
EPISODES = np.unique(np.geomspace(1, 10_000, 81).astype(int))  # after which importance sampling is evaluated
LOOPS = np.unique(np.geomspace(1, 100_000, 121).astype(int))

# --- Example 6.2: TD(0) and Monte Carlo


def five_states(cfg: Config, totals: Totals, rng: np.random.Generator) -> None:
    """Example 6.2: constant-α TD(0) and Monte Carlo on the 5-state random walk, from values of 0.5, 100 episodes."""
    runs, rate = 4 * cfg.runs, cfg.rate  # they are cheap
    walk = worlds.random_walk()
    truth, V0 = tables.solve(walk, tables.uniform(walk)), np.where(walk.terminal, 0.0, 0.5)
    stream = prediction.sample(walk, runs, 100, rng)
    ones = np.ones(len(TD_ALPHAS), np.intp)
    _, td = prediction.n_step(walk, stream, V0, ones, rate * np.array(TD_ALPHAS), truth)
    _, mc = prediction.monte_carlo(walk, stream, V0, rate * np.array(MC_ALPHAS), truth)
    _, first = prediction.monte_carlo(walk, stream, V0, rate * np.array(MC_ALPHAS), truth, first_visit=True)
    for name, errors in (("td", td), ("mc", mc), ("mc_first", first)):
        totals.add(f"6.2 {name}", errors, axis=1)  # (K, E)
        totals.add(f"6.2 {name} mean", errors.mean(2))
    if rate:
        for name, once in (("average", False), ("average_first", True)):
            _, errors = prediction.monte_carlo(walk, stream, V0, None, truth, first_visit=once)
            totals.add(f"6.2 {name}", errors, axis=1)


def five_states_summary(totals: Totals) -> dict[str, float]:
    return {"five_states_td": totals.mean("6.2 td mean")[1], "five_states_mc": totals.mean("6.2 mc mean").min()}


def judge_five_states(run: Run, totals: Totals) -> None:
    td, error = estimate(totals, "6.2 td mean", 1)
    mc = totals.mean("6.2 mc mean").min()
    target = PUBLISHED[TD_MEAN] * (1 + WITHIN)
    run.result("five_states_td", td, error=error, baseline=mc, target=target, higher=False)


# --- Figures 7.2 and 12.6: n-step TD and TD(λ)


def nineteen_states(cfg: Config, totals: Totals, rng: np.random.Generator) -> None:
    """Figures 7.2 and 12.6 on the same episodes: RMS error over the first 10, by n and α, and by λ and α."""
    runs, rate = cfg.runs, cfg.rate
    walk = worlds.world("random_walk")
    truth, V0 = tables.solve(walk, tables.uniform(walk)), np.zeros(walk.size[0])
    stream = prediction.sample(walk, runs, 10, rng)
    n, alphas = pairs(STEPS, ALPHAS)
    _, errors = prediction.n_step(walk, stream, V0, n.astype(np.intp), rate * alphas, truth)
    totals.add("7.2", errors.mean(2).reshape(len(STEPS), len(ALPHAS), runs))
    lambdas, alphas = pairs(LAMBDAS, ALPHAS)
    for trace in TRACES:
        _, errors = prediction.td_lambda(walk, stream, V0, lambdas, rate * alphas, truth, trace)
        totals.add(f"12.6 {trace}", errors.mean(2).reshape(len(LAMBDAS), len(ALPHAS), runs))


def nineteen_states_summary(totals: Totals) -> dict[str, float]:
    return {"n_step_error": totals.mean("7.2")[STEPS == 4].min(), "td_lambda_error": totals.mean(FIGURE_12_6).min()}


def judge_nineteen_states(run: Run, totals: Totals) -> None:
    best = {int(n): smallest(totals, "7.2", k) for k, n in enumerate(STEPS)}
    target = PUBLISHED[N_4] * (1 + WITHIN)
    run.result("n_step_error", best[4][0], error=best[4][1], baseline=best[1][0], target=target, higher=False)
    run.check("best_n", min(best, key=lambda n: best[n][0]))
    side = min(best[1], best[16])  # of the U: n = 4 has to be below both by two standard errors
    ratio = side[0] / best[4][0]
    error = ratio * math.hypot(side[1] / side[0], best[4][1] / best[4][0])
    run.check("n_step_u_shape", ratio, error=error, at_least=1 + 2 * error)
    for name, trace in (("td_lambda_error", "accumulating"), ("true_online_error", "true_online")):
        mean, error = smallest(totals, f"12.6 {trace}")
        run.check(name, mean, error=error)


# --- Figure 6.2: batch updating


def batch_updating(cfg: Config, totals: Totals, rng: np.random.Generator) -> None:
    """Figure 6.2: after every episode of the 5-state walk, batch TD(0) and batch Monte Carlo to convergence on all
    episodes so far. Example 6.4, and how far TD is from the certainty-equivalence estimate at the end."""
    runs, rate = cfg.runs, cfg.rate
    walk = worlds.random_walk()
    truth, V0 = tables.solve(walk, tables.uniform(walk)), np.where(walk.terminal, 0.0, 0.5)
    stream = prediction.sample(walk, runs, 100, rng)
    G = prediction.returns(stream, walk.gamma)[0]
    counts = batch.Counts.none(runs, walk.size[0])
    V = {method: np.tile(V0, (runs, 1)) for method in batch.METHODS}
    errors: dict[str, list[Array]] = {method: [] for method in V}
    for episode in range(100):
        counts.add(stream, G, episode)
        for method in batch.METHODS:
            V[method] = batch.converge(counts, V[method], walk.gamma, rate, method)
            errors[method].append(np.sqrt(((V[method] - truth)[:, ~walk.terminal] ** 2).mean(1)))
    for name, values in errors.items():
        totals.add(f"6.2 batch {name}", np.array(values))  # (E,)
        totals.add(f"6.2 batch {name} mean", np.mean(values, 0))
    exact = np.stack([batch.certainty_equivalence(counts, run, walk.gamma) for run in range(runs)])
    gap = abs(batch.converge(counts, V["td"], walk.gamma, rate, "td", tolerance=1e-12) - exact)
    totals.add("6.2 batch gap", gap.max(1))
    seen = batch.predictor()
    counts = batch.Counts.none(1, 3)
    for episode in range(8):
        counts.add(seen, prediction.returns(seen, 1.0)[0], episode)
    for method in batch.METHODS:
        totals.add(f"6.4 {method}", batch.converge(counts, np.zeros((1, 3)), 1.0, rate, method, tolerance=1e-12).T)


def batch_summary(totals: Totals) -> dict[str, float]:
    return {f"batch_{method}": float(totals.mean(f"6.2 batch {method} mean")) for method in batch.METHODS}


def judge_batch(run: Run, totals: Totals) -> None:
    for method in batch.METHODS:
        mean, error = estimate(totals, f"6.2 batch {method} mean")
        run.check(f"batch_{method}", mean, error=error)
        value_of_a = totals.mean(f"6.4 {method}")[0]
        run.check(f"predictor_{method}", value_of_a, at_least=0.75 - 1e-8 if method == "td" else None)
    run.check("certainty_equivalence_gap", float(totals.mean("6.2 batch gap")), at_most=1e-8)


# --- Figure 5.3 and Example 5.5: importance sampling


def importance(cfg: Config, totals: Totals, rng: np.random.Generator) -> None:
    """Figure 5.3: a blackjack state by episodes of random play; Example 5.5, where ordinary importance sampling has
    infinite variance; and, in a random world that pays at every step, weights of each decision."""
    runs, learns = cfg.runs, cfg.rate > 0  # a mean over episodes has no learning rate

    def squared(name: str, estimate: Array, truth: float, at: NDArray[np.intp]) -> None:
        totals.add(name, (learns * estimate[:, at - 1] - truth) ** 2, axis=0)

    world, target, value = blackjack_state()
    G, rho, _ = off_policy.sample(world, target, tables.uniform(world), runs, EPISODES[-1], rng)
    for name, estimator in off_policy.ESTIMATORS.items():
        estimate = estimator(G, rho)
        squared(f"5.3 {name}", estimate, value, EPISODES)
        totals.add(f"5.3 {name} early", ((learns * estimate[:, :10] - value) ** 2).mean(1))
    for name, paths in loop_paths(rng).items():
        squared(f"5.5 {name}", paths, 1.0, np.arange(1, len(LOOPS) + 1))

    world, target, value = paying_world()
    G, rho, each = off_policy.sample(world, target, tables.uniform(world), runs, 1000, rng)
    few = EPISODES[EPISODES <= 1000]
    for name, estimator in off_policy.ESTIMATORS.items():
        squared(f"5.9 {name}", estimator(G, rho), value, few)
    squared("5.9 per_decision", off_policy.ordinary(each, np.ones_like(each)), value, few)


def blackjack_state() -> tuple[MDP, Array, float]:
    """Example 5.4: a sum of 13 with a usable ace against a two, the policy that sticks on 20 and 21, and its value."""
    world, sums = worlds.blackjack(), np.arange(203) // 10 % 10 + 12
    world = replace(world, start=np.eye(203)[111])
    target = tables.one_hot(world, np.where(world.terminal | (sums >= 20), 0, 1))
    return world, target, tables.performance(world, target)


def paying_world() -> tuple[MDP, Array, float]:
    """A random world of about four steps an episode, and a target policy that prefers its first action."""
    world = tables.garnet(6, 2, 3, np.random.default_rng(0), 1.0, mean=1.0, ending=0.25)
    target = np.tile([0.75, 0.25], (len(world.terminal), 1))
    return world, target, tables.performance(world, target)


def loop_paths(rng: np.random.Generator, runs: int = 10) -> dict[str, Array]:
    """Figure 5.4: estimates (runs, …) after LOOPS episodes; the value is 1."""
    world = worlds.one_state_loop()
    G, rho, _ = off_policy.sample(world, tables.one_hot(world, [0, 0]), tables.uniform(world), runs, LOOPS[-1], rng)
    return {name: estimator(G, rho)[:, LOOPS - 1] for name, estimator in off_policy.ESTIMATORS.items()}


def importance_summary(totals: Totals) -> dict[str, float]:
    return {f"importance_{name}": totals.mean(f"5.3 {name}")[-1] for name in off_policy.ESTIMATORS}


def judge_importance(run: Run, totals: Totals) -> None:
    for name in off_policy.ESTIMATORS:
        early, error = estimate(totals, f"5.3 {name} early")
        run.check(f"importance_{name}_early", early, error=error)
        late, error = estimate(totals, f"5.3 {name}", -1)
        run.check(f"importance_{name}", late, error=error, at_most=early / 10)
        loop, error = estimate(totals, f"5.5 {name}", -1)
        run.check(f"loop_{name}", loop, error=error, at_most=1e-12 if name == "weighted" else None)
    for name in ("ordinary", "per_decision"):
        mean, error = estimate(totals, f"5.9 {name}", -1)
        run.check(f"decisions_{name}", mean, error=error)
