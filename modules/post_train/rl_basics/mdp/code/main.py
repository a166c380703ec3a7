"""Markov decision processes: what the best values are when the rules are known, by every classical solver.

    V*(s) = max_a R(s,a) + γ Σ_s' P(s'|s,a) V*(s')          ‖T V − V*‖∞ ≤ γ ‖V − V*‖∞

And what is like it: the average reward in place of the discounted one, and a state that is seen through observations.

Bellman 1957; Sutton & Barto 2018, chapters 3, 4 and 10; Puterman 1994, chapters 4, 6 and 8; Kaelbling et al. 1998.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune.rl.envs.rollout import numpy_generator
from finetune.rl.statistics import critical_z, standard_error
from finetune.rl.tabular import mdp as mdps
from finetune.rl.tabular import planning, worlds
from finetune.rl.tabular.mdp import MDP, Array
from finetune.runs import config
from finetune.runs.checkpoint import atomic_write
from finetune.runs.config import bounded

from . import plots, pomdp

CLOSE = 1e-8  # of max |V*|: how near every solver has to come to V*
ENDLESS = 1500  # sweeps with γ = 1, where there is no bound that says how many are needed
# Of the largest reward: by so much an α-vector has to be the best somewhere. With 1e-10 there are far more of them.
MARGIN = 1e-5
GALLERY = ("frozen_lake", "cliff_walking", "taxi", "gridworld", "small_gridworld", "car_rental", "gambler")


@dataclass
class Config(config.Config):
    threads: int = 1  # the tables are small
    steps: int = 20_000  # sweeps at most; as many are made as γ needs
    checkpoint_every: int = 500
    world: str = "frozen_lake_8x8"  # whose sweeps are recorded: a name in rl/tabular/worlds.py, or a gymnasium id
    data: Path | None = None  # an npz with P (states, actions, states) and R, in place of a world
    gamma: float | None = bounded(None, at_least=0, at_most=1)  # discount; none: the world's own
    # of modified policy iteration, between two improvements
    evaluation_sweeps: int = bounded(5, at_least=1, at_most=10_000)
    rollouts: int = bounded(10_000, at_least=1, at_most=10**6)  # episodes that the best policy is tried in
    # after so many an episode is cut off, and its return compared with the value of as many
    rollout_steps: int = bounded(2000, at_least=1, at_most=10**6)
    pairs: int = bounded(300, at_least=1, at_most=10**6)  # of value functions that the contraction is measured with
    horizon: int = bounded(60, at_least=1, at_most=1000)  # steps of the tiger problem
    gallery: bool = True  # the other worlds and the book's figures too; not with --data

    @classmethod
    def toy(cls) -> "Config":
        return cls(steps=2000, world="frozen_lake", rollouts=2000, pairs=100, horizon=12)


def main(cfg: Config, run) -> dict[str, Any]:
    mdp = mdps.load(cfg.data, cfg.gamma, run.print) if cfg.data else worlds.world(cfg.world, cfg.gamma)
    best, _, improvements = planning.policy_iteration(mdp)
    run.print(
        f"{mdp.name}: {mdp.size[0]} states, {mdp.size[1]} actions, γ = {mdp.gamma:g}; policy iteration took "
        f"{improvements} improvements, its values miss Bellman's equation by {bellman_error(mdp, best):.1e}"
    )
    solvers = Solvers(mdp, cfg.evaluation_sweeps)
    first = solvers.errors(best)
    sweeps = min(cfg.steps, needed(mdp.gamma))
    if mdp.gamma < 1 and mdp.gamma**sweeps > CLOSE:
        run.print(
            f"γ = {mdp.gamma:.12g} needs {needed(mdp.gamma):,} sweeps to be sure of an error below {CLOSE:g} of the "
            f"first; {sweeps:,} are made (--steps), which leave {mdp.gamma**sweeps:.1e} of it at most"
        )
    for step in run.steps(sweeps, {"solvers": solvers}):
        solvers.sweep()
        errors = solvers.errors(best)
        bounds = {name: mdp.gamma ** (step + 1) * first[name] for name in BOUNDED}
        solvers.check(errors, bounds)
        run.log(step, **{f"error_{name}": value for name, value in errors.items()}, bound=bounds["synchronous"])

    judge(run, mdp, solvers, best, first, sweeps)
    judge_rollouts(cfg, run, mdp, solvers)
    judge_contraction(cfg, run, mdp)
    save_values(run, mdp, solvers)
    found = {"improvements": improvements, "states": mdp.size[0]}
    plots.convergence(run, mdp, cfg.evaluation_sweeps)
    plots.values(run, mdp, solvers.values["synchronous"])
    if cfg.gallery and not cfg.data:
        judge_gallery(cfg, run)
        judge_book(cfg, run)
        judge_average(cfg, run)
        judge_tiger(cfg, run)
    return found


def needed(gamma: float) -> int:
    """Sweeps k with γᵏ well below `CLOSE`."""
    if gamma == 1:
        return ENDLESS
    return math.ceil(math.log(CLOSE / 100) / math.log(gamma)) if gamma else 1


# --- The solvers, sweep by sweep

ITERATED = ("synchronous", "in_place", "prioritized", "modified", "policy_iteration")
HEADS = ("sync.", "in place", "priority", "modified")
BOUNDED = (
    "synchronous",
    "in_place",
    "policy_iteration",
)  # a sweep contracts by γ, whatever V it begins with


class Solvers:
    """Every iterative solver side by side, from V = 0; policy iteration from the value of the uniform policy.

    A sweep is S backups; of modified policy iteration, one improvement and its sweeps of evaluation; of policy
    iteration, one improvement and a linear system.
    """

    def __init__(self, mdp: MDP, evaluation_sweeps: int) -> None:
        self.mdp, self.evaluation_sweeps = mdp, evaluation_sweeps
        self.policy = mdps.uniform(mdp)
        self.values: dict[str, Array] = {name: np.zeros(mdp.size[0]) for name in ITERATED}
        self.values["policy_iteration"] = mdps.solve(mdp, self.policy)
        self.queue = planning.Prioritized(mdp, self.values["prioritized"])
        self.share = 0.0  # the largest error over its bound so far

    def sweep(self) -> None:
        mdp, V = self.mdp, self.values
        V["synchronous"] = planning.synchronous(mdp, V["synchronous"])
        V["in_place"] = planning.in_place(mdp, V["in_place"])
        self.queue.backups(mdp.size[0])
        V["prioritized"] = self.queue.V
        V["modified"] = planning.modified(mdp, V["modified"], self.evaluation_sweeps)
        better = planning.improve(mdp, self.policy, V["policy_iteration"])
        if (better != self.policy).any():
            self.policy = better
            V["policy_iteration"] = mdps.solve(mdp, better)

    def check(self, errors: dict[str, float], bounds: dict[str, float]) -> None:
        """Compares with γ^k ‖V_0 − V*‖ and what rounding adds, which a linear system with I − γ P makes larger."""
        sizes = max(abs(V).max() for V in self.values.values())
        floor = np.finfo(np.float64).eps * sizes * min(1e6, 10 / max(1 - self.mdp.gamma, 1e-6))
        if floor:
            self.share = max([self.share, *(float(errors[n] / (bound + floor)) for n, bound in bounds.items())])

    def errors(self, best: Array) -> dict[str, float]:
        return {name: float(abs(V - best).max()) for name, V in self.values.items()}

    def state_dict(self) -> dict[str, Any]:
        arrays = {**self.values, "policy": self.policy, "priority": self.queue.priority}
        return {"share": self.share, **{name: torch.from_numpy(array.copy()) for name, array in arrays.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        arrays = {name: value.numpy().copy() for name, value in state.items() if name != "share"}
        self.share, self.policy, self.queue.priority = state["share"], arrays["policy"], arrays["priority"]
        self.values = {name: arrays[name] for name in ITERATED}
        self.queue.V = arrays["prioritized"]


def bellman_error(mdp: MDP, V: Array) -> float:
    return float(abs(planning.synchronous(mdp, V) - V).max())


# --- What is shown


def judge(run, mdp: MDP, solvers: Solvers, best: Array, first: dict[str, float], sweeps: int) -> None:
    """Each error against `CLOSE` of the largest value, or what so few sweeps promise: γᵏ of the first error and, by any
    method, ‖T V − V‖ / (1 − γ)."""
    scale = float(abs(best).max())
    close, least = CLOSE * scale, 0.0
    for name, error in solvers.errors(best).items():
        target = close
        if sweeps and mdp.gamma < 1:
            promised = mdp.gamma**sweeps * first[name]
            if name not in BOUNDED:
                promised = bellman_error(mdp, solvers.values[name]) / (1 - mdp.gamma)
            target = max(close, promised * (1 + 1e-9))
        least = max(least, target)
        run.result(f"error_{name}", error, baseline=first[name], target=target, higher=False)
    by_program, _, pivots = planning.linear_program(mdp)
    run.result("error_linear_program", abs(by_program - best).max(), target=close, higher=False)
    run.print(f"linear programming took {pivots} pivots")
    run.result("share_of_bound", solvers.share, target=1 + 1e-9, higher=False)
    worth = mdps.performance(mdp, mdps.uniform(mdp))
    reached = float(mdp.start @ solvers.values["synchronous"])
    target = float(mdp.start @ best) - least
    run.result("start_value", reached, baseline=worth, target=target if target > worth or not sweeps else None)


def judge_rollouts(cfg: Config, run, mdp: MDP, solvers: Solvers) -> None:
    """The policy tried out: its mean return against the value of as many steps, in standard errors; what comes after
    them is left out of both, and said."""
    draw = np.random.default_rng(run.generator("rollouts").initial_seed())
    returns = rollouts(mdp, solvers.policy, cfg.rollouts, draw, cfg.rollout_steps)
    V = planning.evaluate(mdp, solvers.policy, np.zeros(mdp.size[0]), cfg.rollout_steps)
    value, scale = float(mdp.start @ V), float(abs(V).max())
    left = abs(mdps.performance(mdp, solvers.policy) - value)
    if left > 1e-6 * scale:
        run.print(f"rollouts stop after {cfg.rollout_steps:,} steps, as V does here: what follows is worth {left:.3g} "
                f"(--rollout-steps; V is {value:.6g})")  # fmt: skip
    error = returns.std(ddof=1) / math.sqrt(len(returns)) if len(returns) > 1 else math.inf
    away = abs(returns.mean() - value)
    if away <= 1e-9 * scale:  # where nothing is random, the error is 0 as well
        away = 0.0
    else:
        away = away / error if error else math.inf
    run.result("rollout_deviation", away, target=critical_z(2), higher=False)  # to either side


def save_values(run, mdp: MDP, solvers: Solvers) -> None:
    """values.npz: the policy, and V (S,), Q (S, A), A (S, A) of it; −inf where an action is not allowed."""
    V = mdps.solve(mdp, solvers.policy)
    Q = mdps.action_values(mdp, V)
    with atomic_write(run.dir / "values.npz") as path:
        np.savez_compressed(path, policy=solvers.policy, V=V, Q=Q, A=Q - V[:, None])


def rollouts(mdp: MDP, policy: Array, count: int, draw: np.random.Generator, longest: int = 2000) -> Array:
    """Discounted returns of `count` episodes side by side, of `longest` steps at most."""
    cumulative = policy.cumsum(1)
    state = mdps.pick(mdp.start.cumsum()[None], draw.random(count))
    total, factor = np.zeros(count), 1.0
    for _ in range(longest):
        going = np.flatnonzero(~mdp.terminal[state])
        if not len(going):
            break
        here = state[going]
        action = mdps.pick(cumulative[here], draw.random(len(going)))
        after = mdps.sample_next(mdp, here, action, draw.random(len(going)))
        total[going] += factor * mdp.rewards[here, action, after]
        state[going] = after
        factor *= mdp.gamma
    return total


def judge_gallery(cfg: Config, run) -> None:
    """The other worlds by every solver: the sweeps that each needs, and the largest distance from V* of any, as a part
    of the largest value."""
    rows, shown, apart = [], [], 0.0
    for name in GALLERY:
        mdp = worlds.world(name)
        best, _, improvements = planning.policy_iteration(mdp)
        solvers, took = Solvers(mdp, cfg.evaluation_sweeps), {}
        scale = abs(best).max()
        for sweeps in range(1, min(cfg.steps, ENDLESS) + 1):
            solvers.sweep()
            errors = solvers.errors(best)
            took = {solver: sweeps for solver in ITERATED if errors[solver] <= CLOSE * scale} | took
            if len(took) == len(ITERATED):
                break
        by_program, _, pivots = planning.linear_program(mdp)
        apart = max([apart, *(e / scale for e in [*solvers.errors(best).values(), abs(by_program - best).max()])])
        rows.append({
            "world": f"{name.replace('_', ' ')}, γ {mdp.gamma:g}", "size": f"{mdp.size[0]} × {mdp.size[1]}",
            "V*(start)": f"{mdp.start @ best:.4f}", "policy it.": improvements, "simplex": pivots,
            **{head: took.get(solver, "–") for solver, head in zip(ITERATED, HEADS, strict=False)},
        })  # fmt: skip
        shown.append((mdp, solvers.values["synchronous"]))
        if name in ("frozen_lake", "taxi"):
            run.result(f"{name}_start", mdp.start @ solvers.values["synchronous"], baseline=0.0,
                      target={"frozen_lake": 0.542026, "taxi": 7.93}[name] - 5e-7)  # fmt: skip
    run.table(f"improvements, pivots and sweeps until every value is within {CLOSE:g} of the largest", rows)
    run.result("gallery_error", apart, target=CLOSE, higher=False)
    plots.gallery(run, shown)


def judge_book(cfg: Config, run) -> None:
    """Sutton & Barto's printed tables, and the pictures of their figures."""
    grid, small = worlds.gridworld(), worlds.small_gridworld()
    most = min(cfg.steps, ENDLESS)
    V = planning.evaluate(grid, mdps.uniform(grid), np.zeros(25), most)
    apart = [abs(V - worlds.EXAMPLE_3_5.ravel()).max()]
    V = np.zeros(25)
    for _ in range(most):
        V = planning.synchronous(grid, V)
    apart.append(abs(V - worlds.EXAMPLE_3_8.ravel()).max())
    sweeps = {0.0: np.zeros(16)}
    for k, table in worlds.FIGURE_4_1.items():
        sweeps[k] = planning.evaluate(small, mdps.uniform(small), np.zeros(16), int(min(k, most)))
        apart.append(abs(sweeps[k] - table.ravel()).max())
    run.result("book_tables_error", max(apart), target=0.0501, higher=False)
    plots.evaluation(run, small, sweeps)
    plots.car_rental(run)
    plots.gambler(run)


# --- Contraction, average reward, a hidden state


def contractions(mdp: MDP, policy: Array, pairs: int, draw: np.random.Generator) -> Array:
    """(pairs, 2): ‖T V − T W‖∞ / ‖V − W‖∞ of the optimality operator and of the policy's. Every other W is V and a
    little more in all states, the pair that shrinks the least."""
    found = np.empty((pairs, 2))
    scale = abs(mdp.R).max() or 1.0
    for i in range(pairs):
        V = scale * draw.standard_normal(mdp.size[0]) * 10 ** draw.uniform(-1, 2)
        W = V + scale * draw.random() if i % 2 else scale * draw.standard_normal(len(V))
        mapped = (
            planning.synchronous(mdp, V) - planning.synchronous(mdp, W),
            planning.evaluate(mdp, policy, V) - planning.evaluate(mdp, policy, W),
        )
        found[i] = [abs(difference).max() / abs(V - W).max() for difference in mapped]
    return found


def judge_contraction(cfg: Config, run, mdp: MDP) -> None:
    draw = numpy_generator(run, "contraction")
    ratios = contractions(mdp, mdps.uniform(mdp), cfg.pairs, draw)
    run.result("contraction", ratios.max(), target=mdp.gamma + 1e-9, higher=False)
    if cfg.gallery and not cfg.data:
        plots.contraction(run, worlds.world("frozen_lake"), worlds.access_control(), contractions, draw)


def judge_average(cfg: Config, run) -> None:
    """The queue of Example 10.2: its gain by policy iteration, between the bounds of every sweep, and as γ → 1."""
    mdp = worlds.access_control()
    always = mdps.one_hot(mdp, mdp.allowed[:, 1].astype(int))
    gain, bias, policy, _ = planning.average_reward_iteration(mdp, always)
    bounds, h = [], np.zeros(mdp.size[0])
    for _ in range(min(cfg.steps, ENDLESS) + 1):  # the bounds belong to the h that a sweep begins with
        h, lower, upper = planning.relative_sweep(mdp, h)
        bounds.append((lower, upper))
        if upper - lower < CLOSE / 10:
            break
    outside = max(max(lower - gain, gain - upper) for lower, upper in bounds)
    run.result("gain", gain, baseline=planning.gain_and_bias(mdp, always)[0])
    run.result("gain_outside_bounds", outside, target=1e-9, higher=False)
    run.result("gain_bounds_apart", upper - lower, target=CLOSE, higher=False)
    limit = {gamma: planning.policy_iteration(mdp.discounted(gamma))[0] for gamma in (0.9, 0.99, 0.999, 0.9999)}
    apart = {gamma: float(abs((1 - gamma) * V - gain).max()) for gamma, V in limit.items()}
    run.result("gain_from_discounted", apart[0.9999], baseline=apart[0.9], target=apart[0.9] / 100, higher=False)
    plots.average_reward(run, mdp, policy, gain, bias, bounds, limit)


def judge_tiger(cfg: Config, run) -> None:
    """Two doors and a tiger: the value over beliefs, tried out; and what the knowledge that is asked for is worth."""
    tiger, start = pomdp.tiger(), np.array([0.5, 0.5])
    stages = pomdp.solve(tiger, cfg.horizon, MARGIN)
    worth = float(pomdp.value(start, stages[-1]))
    run.result("tiger_value", worth)
    grid = np.linspace(0, 1, 1001)
    beliefs = np.stack([grid, 1 - grid], 1)
    bound = pomdp.value(beliefs, pomdp.qmdp(tiger, cfg.horizon))
    run.result("tiger_above_qmdp", (pomdp.value(beliefs, stages[-1]) - bound).max(), target=1e-9, higher=False)
    returns, _ = pomdp.simulate(tiger, stages, cfg.rollouts, numpy_generator(run, "tiger"))
    error = returns.std(ddof=1) / math.sqrt(len(returns)) if len(returns) > 1 else math.inf
    run.result("tiger_deviation", abs(returns.mean() - worth) / error, target=critical_z(2), higher=False)

    mild = pomdp.tiger(penalty=-10.0)  # to open blindly costs nothing on average, to listen does
    fearless = [pomdp.qmdp(mild, h + 1) for h in range(cfg.horizon)]
    best = pomdp.solve(mild, cfg.horizon, MARGIN)
    draws = [numpy_generator(run, "mild tiger", name) for name in ("best", "qmdp")]
    listening, _ = pomdp.simulate(mild, best, cfg.rollouts, draws[0])
    blind, taken = pomdp.simulate(mild, fearless, cfg.rollouts, draws[1])
    error = standard_error(listening.tolist())
    target = 0.9 * pomdp.value(start, best[-1])
    run.result("mild_tiger", listening.mean(), error=error, baseline=blind.mean(), target=target)
    run.result("qmdp_listens", (taken == 0).mean(), target=0.0, higher=False)
    plots.tiger(run, tiger, stages, mild, best)
