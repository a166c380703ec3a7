"""Markov decision processes: the optimal values of a world whose rules are known, by every classical solver.

    V*(s) = max_a R(s,a) + γ Σ_s' P(s'|s,a) V*(s')          ‖T V − V*‖∞ ≤ γ ‖V − V*‖∞

Each solver is a file: `value_iteration`, `policy_iteration`, `modified_policy_iteration`, `linear_program`; then
`average_reward` (no discount, no end) and `pomdp` (a hidden state). This file runs them side by side and compares.

Bellman 1957; Sutton & Barto 2018, chapters 3, 4 and 10; Puterman 1994, chapters 4, 6 and 8; Kaelbling et al. 1998.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune.errors import UserError
from finetune.rl.envs import creators
from finetune.rl.envs.rollout import numpy_generator
from finetune.rl.statistics import critical_z
from finetune.rl.tabular import mdp as tables
from finetune.rl.tabular import worlds
from finetune.rl.tabular.mdp import MDP, Array
from finetune.runs import config
from finetune.runs.checkpoint import atomic_write
from finetune.runs.config import bounded
from finetune.runs.run import Run

from . import other_worlds, plots
from .linear_program import linear_program
from .other_worlds import TOLERANCE, UNDISCOUNTED_SWEEPS
from .policy_iteration import policy_iteration
from .solvers import CONTRACTING, Solvers
from .value_iteration import bellman_error, synchronous


@dataclass
class Config(config.Config):
    threads: int = 1  # the tables are small
    steps: int = 20_000  # sweeps at most; the run makes as many as γ needs
    checkpoint_every: int = 500
    # --- the world
    world: str = "frozen_lake_8x8"  # whose sweeps are recorded: a name in rl/tabular/worlds.py, or a gymnasium id
    # keyword arguments of a world that is gymnasium's, such as is_slippery=false; may be given several times
    env_arg: tuple[str, ...] = ()
    data: Path | None = None  # an npz with P (states, actions, states) and R, in place of a world
    gamma: float | None = bounded(None, at_least=0, at_most=1)  # discount; none: the world's own
    gallery: bool = True  # also the other worlds and the book's figures; not with --data
    # --- modified policy iteration
    evaluation_sweeps: int = bounded(5, at_least=1, at_most=10_000)  # between two improvements
    # --- checks
    rollouts: int = bounded(10_000, at_least=1, at_most=10**6)  # episodes sampled under the optimal policy
    # length at which an episode is truncated; its return is compared with the value of as many steps
    rollout_steps: int = bounded(2000, at_least=1, at_most=10**6)
    pairs: int = bounded(300, at_least=1, at_most=10**6)  # of value functions whose contraction is measured
    # --- POMDP
    horizon: int = bounded(60, at_least=1, at_most=1000)  # steps of the tiger problem

    @classmethod
    def toy(cls) -> "Config":
        return cls(steps=2000, world="frozen_lake", rollouts=2000, pairs=100, horizon=12)


def main(cfg: Config, run: Run) -> dict[str, Any]:
    if cfg.data and cfg.env_arg:
        raise UserError("--env-arg is for a --world that is gymnasium's, not for --data")
    args = creators.arguments(cfg.env_arg)
    mdp = tables.load(cfg.data, cfg.gamma, run.print) if cfg.data else worlds.world(cfg.world, cfg.gamma, args)
    optimal, _, improvements = policy_iteration(mdp)
    run.print(
        f"{mdp.name}: {mdp.size[0]} states, {mdp.size[1]} actions, γ = {mdp.gamma:g}; policy iteration made "
        f"{improvements} improvements, the Bellman error of its values is {bellman_error(mdp, optimal):.1e}"
    )
    solvers = Solvers(mdp, cfg.evaluation_sweeps)
    first = solvers.errors(optimal)
    sweeps = min(cfg.steps, sweeps_needed(mdp.gamma))
    if mdp.gamma < 1 and mdp.gamma**sweeps > TOLERANCE:
        run.print(
            f"γ = {mdp.gamma:.12g} needs {sweeps_needed(mdp.gamma):,} sweeps to guarantee an error below {TOLERANCE:g} "
            f"of the first; {sweeps:,} are made (--steps), which leave {mdp.gamma**sweeps:.1e} of it at most"
        )
    for step in run.steps(sweeps, {"solvers": solvers}):
        solvers.sweep()
        errors = solvers.errors(optimal)
        bounds = {name: mdp.gamma ** (step + 1) * first[name] for name in CONTRACTING}
        solvers.compare_with_bound(errors, bounds)
        run.log(step, **{f"error_{name}": e for name, e in errors.items()}, bound=bounds["value_iteration"])

    run.check("states", mdp.size[0])
    run.check("improvements", improvements)
    solver_results(run, mdp, solvers, optimal, first, sweeps)
    check_rollouts(cfg, run, mdp, solvers.policy)
    check_contraction(cfg, run, mdp)
    save_values(run, mdp, solvers.policy)
    plots.convergence(run, mdp, cfg.evaluation_sweeps)
    plots.values(run, mdp, solvers.values["value_iteration"])
    if cfg.gallery and not cfg.data:
        other_worlds.gallery(run, cfg.steps, cfg.evaluation_sweeps)
        other_worlds.check_book_tables(run, cfg.steps)
        other_worlds.average_reward_results(run, cfg.steps)
        other_worlds.pomdp_results(run, cfg.horizon, cfg.rollouts)
    return {}


def sweeps_needed(gamma: float) -> int:
    """The number of sweeps k with γᵏ well below `TOLERANCE`."""
    if gamma == 1:
        return UNDISCOUNTED_SWEEPS
    return math.ceil(math.log(TOLERANCE / 100) / math.log(gamma)) if gamma else 1


def solver_results(run: Run, mdp: MDP, solvers: Solvers, optimal: Array, first: dict[str, float], sweeps: int) -> None:
    """Each solver's error against `TOLERANCE` of the largest value, or what that many sweeps guarantee: γᵏ of the first
    error and, by any method, ‖T V − V‖ / (1 − γ)."""
    tolerance, allowed = TOLERANCE * float(abs(optimal).max()), 0.0
    for name, error in solvers.errors(optimal).items():
        bound = tolerance
        if sweeps and mdp.gamma < 1:
            guaranteed = mdp.gamma**sweeps * first[name]
            if name not in CONTRACTING:
                guaranteed = bellman_error(mdp, solvers.values[name]) / (1 - mdp.gamma)
            bound = max(tolerance, guaranteed * (1 + 1e-9))
        allowed = max(allowed, bound)
        if name == "value_iteration":
            run.result(f"error_{name}", error, baseline=first[name], target=bound, higher=False)
        else:
            run.check(f"error_{name}", error, at_most=bound)
    by_program, _, pivots = linear_program(mdp)
    run.check("error_linear_program", abs(by_program - optimal).max(), at_most=tolerance)
    run.print(f"linear programming made {pivots} pivots")
    run.result("share_of_bound", solvers.share, target=1 + 1e-9, higher=False)
    uniform = tables.performance(mdp, tables.uniform(mdp))
    target = float(mdp.start @ optimal) - allowed
    run.result("start_value", float(mdp.start @ solvers.values["value_iteration"]), baseline=uniform,
               target=target if target > uniform or not sweeps else None)  # fmt: skip


def check_rollouts(cfg: Config, run: Run, mdp: MDP, policy: Array) -> None:
    """The mean return of sampled episodes against the value of as many steps, in standard errors. The value beyond
    those steps is in neither, and is reported."""
    rng = numpy_generator(run, "rollouts")
    returns = rollouts(mdp, policy, cfg.rollouts, rng, cfg.rollout_steps)
    V = tables.evaluate(mdp, policy, np.zeros(mdp.size[0]), cfg.rollout_steps)
    value, scale = float(mdp.start @ V), float(abs(V).max())
    beyond = abs(tables.performance(mdp, policy) - value)
    if beyond > 1e-6 * scale:
        run.print(
            f"rollouts stop after {cfg.rollout_steps:,} steps, as V does here: what follows is worth {beyond:.3g} "
            f"(--rollout-steps; V is {value:.6g})"
        )
    error = returns.std(ddof=1) / math.sqrt(len(returns)) if len(returns) > 1 else math.inf
    deviation = abs(returns.mean() - value)
    if deviation <= 1e-9 * scale:  # where nothing is random, the error is 0 as well
        deviation = 0.0
    else:
        deviation = deviation / error if error else math.inf
    run.check("rollout_deviation", deviation, at_most=critical_z(2))  # to either side


def rollouts(mdp: MDP, policy: Array, count: int, rng: np.random.Generator, max_steps: int = 2000) -> Array:
    """Discounted returns of `count` episodes in lockstep, of `max_steps` steps at most."""
    cumulative = policy.cumsum(1)
    state = tables.pick(mdp.start.cumsum()[None], rng.random(count))
    returns, discount = np.zeros(count), 1.0
    for _ in range(max_steps):
        running = np.flatnonzero(~mdp.terminal[state])
        if not len(running):
            break
        here = state[running]
        action = tables.pick(cumulative[here], rng.random(len(running)))
        next_state = tables.sample_next(mdp, here, action, rng.random(len(running)))
        returns[running] += discount * mdp.rewards[here, action, next_state]
        state[running] = next_state
        discount *= mdp.gamma
    return returns


def contraction_ratios(mdp: MDP, policy: Array, pairs: int, rng: np.random.Generator) -> Array:
    """‖T V − T W‖∞ / ‖V − W‖∞ (pairs, 2) of the optimality operator and of the policy's. Every other W is V + c, the
    pair that shrinks the least."""
    ratios = np.empty((pairs, 2))
    scale = abs(mdp.R).max() or 1.0
    for i in range(pairs):
        V = scale * rng.standard_normal(mdp.size[0]) * 10 ** rng.uniform(-1, 2)
        W = V + scale * rng.random() if i % 2 else scale * rng.standard_normal(len(V))
        mapped = (
            synchronous(mdp, V) - synchronous(mdp, W),
            tables.evaluate(mdp, policy, V) - tables.evaluate(mdp, policy, W),
        )
        ratios[i] = [abs(difference).max() / abs(V - W).max() for difference in mapped]
    return ratios


def check_contraction(cfg: Config, run: Run, mdp: MDP) -> None:
    rng = numpy_generator(run, "contraction")
    ratios = contraction_ratios(mdp, tables.uniform(mdp), cfg.pairs, rng)
    run.check("contraction", ratios.max(), at_most=mdp.gamma + 1e-9)
    if cfg.gallery and not cfg.data:
        plots.contraction(run, worlds.world("frozen_lake"), worlds.access_control(), contraction_ratios, rng)


def save_values(run: Run, mdp: MDP, policy: Array) -> None:
    """values.npz: the policy and its V (S,), Q (S, A), A (S, A); −inf where an action is not allowed."""
    V = tables.solve(mdp, policy)
    Q = tables.action_values(mdp, V)
    with atomic_write(run.dir / "values.npz") as path:
        np.savez_compressed(path, policy=policy, V=V, Q=Q, A=Q - V[:, None])
