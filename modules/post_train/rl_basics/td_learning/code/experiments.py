"""One batch of independent runs of each of the book's experiments; `Totals` averages over batches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from finetune.rl.tabular import mdp as tables
from finetune.rl.tabular import worlds
from finetune.rl.tabular.mdp import MDP, Array

from . import batch, control, linear, off_policy, prediction

TD_ALPHAS, MC_ALPHAS = (0.05, 0.1, 0.15), (0.01, 0.02, 0.03, 0.04)  # of Example 6.2
ALPHAS = np.array([0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
STEPS = 2 ** np.arange(10)  # n of Figure 7.2
LAMBDAS = np.array([0.0, 0.4, 0.8, 0.9, 0.95, 0.975, 0.99, 1.0])
TRACES: tuple[prediction.Trace, ...] = ("accumulating", "replacing", "dutch", "true_online")
BIAS_KINDS: tuple[control.Kind, ...] = ("q_learning", "double_q", "expected_sarsa")
CAR_ALPHAS = np.array([0.1, 0.2, 0.5])  # over the number of tilings
BAIRD_STEPS = 1000
METHODS: tuple[linear.Method, ...] = ("td", "tdc", "gtd2")
SEVERAL = 3  # steps of n-step SARSA, Q(σ) and tree backup on the cliff
SIGMAS = {"tree_backup": 0.0, "q_sigma": 0.5, "n_step_sarsa": 1.0}
TRACED, LAMBDA = ("sarsa_lambda", "q_lambda"), 0.5  # on the cliff
ACTING = (*control.KINDS, *SIGMAS, *TRACED)  # the rows of Example 6.6
EPISODES = np.unique(np.geomspace(1, 10_000, 81).astype(int))  # at which importance sampling is looked at
LOOPS = np.unique(np.geomspace(1, 100_000, 121).astype(int))


class Totals:
    """Sums and squares over runs, by name; what a checkpoint keeps of the batches so far."""

    def __init__(self) -> None:
        self.parts: dict[str, dict[str, Any]] = {}

    def add(self, name: str, values: Array, axis: int = -1) -> None:
        """values with the runs along `axis`."""
        with np.errstate(over="ignore", invalid="ignore"):
            values = np.nan_to_num(np.moveaxis(values, axis, -1), nan=np.inf, posinf=np.inf, neginf=-np.inf)
            new = {"sum": values.sum(-1), "square": (values**2).sum(-1)}
        self._add(name, {"runs": values.shape[-1], **new})

    def merge(self, other: Totals) -> None:
        for name, part in other.parts.items():
            self._add(name, part)

    def _add(self, name: str, new: dict[str, Any]) -> None:
        part = self.parts.get(name, {"runs": 0, "sum": 0.0, "square": 0.0})
        self.parts[name] = {key: part[key] + new[key] for key in part}

    def mean(self, name: str) -> Array:
        return self.parts[name]["sum"] / self.parts[name]["runs"]

    def error(self, name: str) -> Array:
        """Standard error of the mean."""
        n = self.parts[name]["runs"]
        with np.errstate(over="ignore", invalid="ignore"):
            variance = (self.parts[name]["square"] / n - self.mean(name) ** 2).clip(0) * n / max(1, n - 1)
        return np.sqrt(variance / n)

    def state_dict(self) -> dict[str, Any]:
        return {
            name: {"runs": part["runs"], **{key: torch.tensor(part[key]) for key in ("sum", "square")}}
            for name, part in self.parts.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.parts = {
            name: {"runs": part["runs"], **{key: part[key].numpy().copy() for key in ("sum", "square")}}
            for name, part in state.items()
        }


def pairs(first: Iterable[float], second: Iterable[float]) -> list[Array]:
    """All combinations, as two flat arrays."""
    return [x.ravel() for x in np.meshgrid(np.asarray(first), np.asarray(second), indexing="ij")]


def five_states(totals: Totals, runs: int, rate: float, draw: np.random.Generator) -> None:
    """Example 6.2: constant-α TD(0) and Monte Carlo on the 5-state walk, values 0.5 at the start, 100 episodes."""
    walk = worlds.random_walk()
    truth, V0 = tables.solve(walk, tables.uniform(walk)), np.where(walk.terminal, 0.0, 0.5)
    stream = prediction.sample(walk, runs, 100, draw)
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


def nineteen_states(totals: Totals, runs: int, rate: float, draw: np.random.Generator) -> None:
    """Figures 7.2 and 12.6 on the same episodes: RMS error over the first 10, by n and α, and by λ and α."""
    walk = worlds.world("random_walk")
    truth, V0 = tables.solve(walk, tables.uniform(walk)), np.zeros(walk.size[0])
    stream = prediction.sample(walk, runs, 10, draw)
    n, alphas = pairs(STEPS, ALPHAS)
    _, errors = prediction.n_step(walk, stream, V0, n.astype(np.intp), rate * alphas, truth)
    totals.add("7.2", errors.mean(2).reshape(len(STEPS), len(ALPHAS), runs))
    lambdas, alphas = pairs(LAMBDAS, ALPHAS)
    for trace in TRACES:
        _, errors = prediction.td_lambda(walk, stream, V0, lambdas, rate * alphas, truth, trace)
        totals.add(f"12.6 {trace}", errors.mean(2).reshape(len(LAMBDAS), len(ALPHAS), runs))


def cliff(totals: Totals, runs: int, episodes: int, rate: float, draw: np.random.Generator) -> None:
    """Example 6.6: α = 0.5, ε = 0.1; sums of rewards while learning, and those of the greedy policy at the end."""
    mdp = worlds.world("cliff_walking")
    learners = control.Learners(mdp, control.KINDS, runs, 0.5 * rate, 0.1, draw, limit=300)
    sums = control.learn(learners, episodes, draw)
    several = [control.q_sigma(mdp, SEVERAL, sigma, runs, episodes, 0.5 * rate, 0.1, draw, limit=300)[1]
               for sigma in SIGMAS.values()]  # fmt: skip
    traced = control.Learners(mdp, ("sarsa", "q_learning"), runs, 0.5 * rate, 0.1, draw, lam=LAMBDA, limit=300)
    online = np.concatenate([sums, np.stack(several), control.learn(traced, episodes, draw)])  # (K, R, E)
    totals.add("6.6", online, axis=1)
    totals.add("6.6 last", online[:, :, -100:].mean(2))
    totals.add("6.6 first", online[:, :, :50].mean(2))
    tables = learners.Q.sum(0).reshape(-1, runs, *mdp.size)
    tables[control.KINDS.index("double_q")] /= 2
    totals.add("6.6 Q", tables, axis=1)
    greedy = tables[control.KINDS.index("q_learning")].argmax(-1)
    totals.add("6.6 path", np.array([truncated_value(mdp, actions, 100) for actions in greedy]))


def truncated_value(mdp: MDP, actions: Array, steps: int) -> float:
    """Exact mean return of a deterministic policy that is stopped after so many steps; it need not end."""
    return float(mdp.start @ tables.evaluate(mdp, tables.one_hot(mdp, actions), np.zeros(mdp.size[0]), steps))


def bias(totals: Totals, runs: int, episodes: int, rate: float, draw: np.random.Generator) -> None:
    """Example 6.7: how often each goes left, for rewards from N(−0.1, 1), where right pays 0."""
    mdp = worlds.maximization_bias()
    learners = control.Learners(mdp, BIAS_KINDS, runs, 0.1 * rate, 0.1, draw, noise=np.array([0.0, 1.0, 0.0]))
    left = np.zeros((len(learners.rows), episodes))
    while (learners.world.episode < episodes).any():
        episode = learners.world.episode.copy()
        state, action, _, _ = learners.step(draw)
        rows = np.flatnonzero((state == 0) & (episode < episodes))
        left[rows, episode[rows]] = action[rows] == 0
    left = left.reshape(len(BIAS_KINDS), runs, episodes)
    totals.add("6.7", left, axis=1)
    totals.add("6.7 last", left[:, :, -20:].mean(2))


def car(totals: Totals, runs: int, episodes: int, rate: float, draw: np.random.Generator) -> None:
    """Mountain Car by semi-gradient SARSA with eight tilings (Figures 10.1 and 10.2)."""
    steps, w, tiles = linear.sarsa_mountain_car(rate * CAR_ALPHAS, runs, episodes, draw, limit=5000)
    totals.add("car", steps.astype(float), axis=1)
    totals.add("car last", steps[:, :, -50:].mean(2))
    totals.add("car first", steps[:, :, 0].astype(float))
    totals.add("car surface", np.stack([linear.cost_to_go(row, tiles) for row in w[-1]], -1))


def baird(totals: Totals, runs: int, rate: float, draw: np.random.Generator) -> None:
    """Figures 11.2 and 11.5: α = 0.01, and 0.005 with β = 0.05 for the gradient methods."""
    for method in METHODS:
        alpha, beta = (0.01, 0.0) if method == "td" else (0.005, 0.05)
        w = linear.baird(method, runs, BAIRD_STEPS, rate * alpha, rate * beta, draw)
        totals.add(f"baird {method} weights", w, axis=1)  # (T, 8)
        totals.add(f"baird {method} error", linear.bellman_error(w))
        totals.add(f"baird {method} growth", np.linalg.norm(w[-1], axis=1) / np.linalg.norm(w[0], axis=1))


def batch_updating(totals: Totals, runs: int, rate: float, draw: np.random.Generator) -> None:
    """Figure 6.2: after every episode of the 5-state walk, batch TD(0) and batch Monte Carlo to convergence on all
    episodes so far. Example 6.4, and how far TD is from the certainty-equivalence estimate at the end."""
    walk = worlds.random_walk()
    truth, V0 = tables.solve(walk, tables.uniform(walk)), np.where(walk.terminal, 0.0, 0.5)
    stream = prediction.sample(walk, runs, 100, draw)
    G = prediction.returns(stream, walk.gamma)[0]
    counts = batch.Counts.none(runs, walk.size[0])
    V = {method: np.tile(V0, (runs, 1)) for method in batch.METHODS}
    errors: dict[str, list[Array]] = {method: [] for method in V}
    for episode in range(100):
        counts.add(stream, G, episode)
        for method in batch.METHODS:
            V[method] = batch.converge(counts, V[method], walk.gamma, rate, method)
            errors[method].append(np.sqrt(((V[method] - truth)[:, ~walk.terminal] ** 2).mean(1)))
    for method, values in errors.items():
        totals.add(f"6.2 batch {method}", np.array(values))  # (E,)
        totals.add(f"6.2 batch {method} mean", np.mean(values, 0))
    exact = np.stack([batch.certainty_equivalence(counts, run, walk.gamma) for run in range(runs)])
    gap = abs(batch.converge(counts, V["td"], walk.gamma, rate, "td", tolerance=1e-12) - exact)
    totals.add("6.2 batch gap", gap.max(1))
    seen = batch.predictor()
    counts = batch.Counts.none(1, 3)
    for episode in range(8):
        counts.add(seen, prediction.returns(seen, 1.0)[0], episode)
    for method in batch.METHODS:
        totals.add(f"6.4 {method}", batch.converge(counts, np.zeros((1, 3)), 1.0, rate, method, tolerance=1e-12).T)


def importance(totals: Totals, runs: int, rate: float, draw: np.random.Generator) -> None:
    """Figure 5.3: a blackjack state by episodes of random play; Example 5.5, where ordinary importance sampling has
    infinite variance; and, in a random world that pays at every step, weights of each decision."""
    learns = rate > 0  # means over episodes have no rate to be multiplied

    def squared(name: str, estimate: Array, truth: float, at: Array) -> None:
        totals.add(name, (learns * estimate[:, at - 1] - truth) ** 2, axis=0)

    world, target, value = blackjack_state()
    G, rho, _ = off_policy.sample(world, target, tables.uniform(world), runs, EPISODES[-1], draw)
    for name, estimator in off_policy.ESTIMATORS.items():
        estimate = estimator(G, rho)
        squared(f"5.3 {name}", estimate, value, EPISODES)
        totals.add(f"5.3 {name} early", ((learns * estimate[:, :10] - value) ** 2).mean(1))
    for name, paths in loop_paths(draw).items():
        squared(f"5.5 {name}", paths, 1.0, np.arange(1, len(LOOPS) + 1))

    world, target, value = paying_world()
    G, rho, each = off_policy.sample(world, target, tables.uniform(world), runs, 1000, draw)
    few = EPISODES[EPISODES <= 1000]
    for name, estimator in off_policy.ESTIMATORS.items():
        squared(f"5.9 {name}", estimator(G, rho), value, few)
    squared("5.9 per_decision", off_policy.ordinary(each, np.ones_like(each)), value, few)


def blackjack_state() -> tuple[MDP, Array, float]:
    """Example 5.4: from 13 with a usable ace against a two; sticking on 20 and 21; what that is worth."""
    world, sums = worlds.blackjack(), np.arange(203) // 10 % 10 + 12
    world = replace(world, start=np.eye(203)[111])
    target = tables.one_hot(world, np.where(world.terminal | (sums >= 20), 0, 1))
    return world, target, tables.performance(world, target)


def paying_world() -> tuple[MDP, Array, float]:
    """A random world of about four steps an episode, and a target policy that prefers its first action."""
    world = tables.garnet(6, 2, 3, np.random.default_rng(0), 1.0, mean=1.0, ending=0.25)
    target = np.tile([0.75, 0.25], (len(world.terminal), 1))
    return world, target, tables.performance(world, target)


def loop_paths(draw: np.random.Generator, runs: int = 10) -> dict[str, Array]:
    """Figure 5.4: estimates (runs, …) after LOOPS episodes; the value is 1."""
    world = worlds.one_state_loop()
    G, rho, _ = off_policy.sample(world, tables.one_hot(world, [0, 0]), tables.uniform(world), runs, LOOPS[-1], draw)
    return {name: estimator(G, rho)[:, LOOPS - 1] for name, estimator in off_policy.ESTIMATORS.items()}
