"""What a run shows besides its own world: all solvers on the gallery, the book's tables, average reward, a POMDP."""

import math

import numpy as np

from finetune.rl.envs.rollout import numpy_generator
from finetune.rl.statistics import critical_z, standard_error
from finetune.rl.tabular import mdp as tables
from finetune.rl.tabular import worlds
from finetune.runs.run import Run

from . import plots, pomdp
from .average_reward import average_reward_iteration, gain_and_bias, relative_sweep
from .linear_program import linear_program
from .policy_iteration import policy_iteration
from .solvers import ITERATIVE, Solvers
from .value_iteration import synchronous

TOLERANCE = 1e-8  # of max |V*|: how close to V* every solver has to come
UNDISCOUNTED_SWEEPS = 1500  # with γ = 1, where no bound says how many are needed
# An α-vector is kept where it is the best by this much of the largest reward. 1e-10 would keep far more of them.
MARGIN = 1e-5
GALLERY = ("frozen_lake", "cliff_walking", "taxi", "gridworld", "small_gridworld", "car_rental", "gambler")
START_VALUES = {"frozen_lake": 0.542026, "taxi": 7.93}  # V*(start), known to this many digits
HEADS = ("value it.", "in place", "priority", "modified")  # columns of the table, in the order of ITERATIVE


def gallery(run: Run, max_sweeps: int, evaluation_sweeps: int) -> None:
    """Every solver on every world: the sweeps that each needs, and the largest relative error of any of them."""
    rows, shown, worst = [], [], 0.0
    for name in GALLERY:
        mdp = worlds.world(name)
        optimal, _, improvements = policy_iteration(mdp)
        solvers = Solvers(mdp, evaluation_sweeps)
        needed: dict[str, int] = {}
        scale = abs(optimal).max()
        for sweeps in range(1, min(max_sweeps, UNDISCOUNTED_SWEEPS) + 1):
            solvers.sweep()
            errors = solvers.errors(optimal)
            needed = {solver: sweeps for solver in ITERATIVE if errors[solver] <= TOLERANCE * scale} | needed
            if len(needed) == len(ITERATIVE):
                break
        by_program, _, pivots = linear_program(mdp)
        worst = max([worst, *(e / scale for e in [*solvers.errors(optimal).values(), abs(by_program - optimal).max()])])
        rows.append({
            "world": f"{name.replace('_', ' ')}, γ {mdp.gamma:g}", "size": f"{mdp.size[0]} × {mdp.size[1]}",
            "V*(start)": f"{mdp.start @ optimal:.4f}", "policy it.": improvements, "simplex": pivots,
            **{head: needed.get(solver, "–") for solver, head in zip(ITERATIVE, HEADS, strict=False)},
        })  # fmt: skip
        shown.append((mdp, solvers.values["value_iteration"]))
        if name in START_VALUES:
            found = float(mdp.start @ solvers.values["value_iteration"])
            run.check(f"{name}_start_value_error", abs(found - START_VALUES[name]), at_most=5e-7)
    run.table(f"improvements, pivots and sweeps until every value is within {TOLERANCE:g} of the largest", rows)
    run.result("gallery_error", worst, target=TOLERANCE, higher=False)
    plots.gallery(run, shown)


def check_book_tables(run: Run, max_sweeps: int) -> None:
    """The tables printed in Sutton & Barto, and pictures of their figures."""
    grid, small = worlds.gridworld(), worlds.small_gridworld()
    most = min(max_sweeps, UNDISCOUNTED_SWEEPS)
    V = tables.evaluate(grid, tables.uniform(grid), np.zeros(25), most)
    differences = [abs(V - worlds.EXAMPLE_3_5.ravel()).max()]
    V = np.zeros(25)
    for _ in range(most):
        V = synchronous(grid, V)
    differences.append(abs(V - worlds.EXAMPLE_3_8.ravel()).max())
    sweeps = {0.0: np.zeros(16)}
    for k, table in worlds.FIGURE_4_1.items():
        sweeps[k] = tables.evaluate(small, tables.uniform(small), np.zeros(16), int(min(k, most)))
        differences.append(abs(sweeps[k] - table.ravel()).max())
    run.check("book_tables_error", max(differences), at_most=0.0501)
    plots.evaluation(run, small, sweeps)
    plots.car_rental(run)
    plots.gambler(run)


def average_reward_results(run: Run, max_sweeps: int) -> None:
    """The queue of Example 10.2: its gain by policy iteration, within the bounds of every sweep, and as γ → 1."""
    mdp = worlds.access_control()
    admit_all = tables.one_hot(mdp, mdp.allowed[:, 1].astype(int))
    gain, bias, policy, _ = average_reward_iteration(mdp, admit_all)
    bounds, h = [], np.zeros(mdp.size[0])
    for _ in range(min(max_sweeps, UNDISCOUNTED_SWEEPS) + 1):  # the bounds belong to the h that a sweep starts from
        h, lower, upper = relative_sweep(mdp, h)
        bounds.append((lower, upper))
        if upper - lower < TOLERANCE / 10:
            break
    run.result("gain", gain, baseline=gain_and_bias(mdp, admit_all)[0], target=lower - 1e-9)
    outside = max(max(lower - gain, gain - upper) for lower, upper in bounds)
    run.check("gain_outside_bounds", outside, at_most=1e-9)
    run.check("gain_bounds_width", upper - lower, at_most=TOLERANCE)
    discounted = {gamma: policy_iteration(mdp.discounted(gamma))[0] for gamma in (0.9, 0.99, 0.999, 0.9999)}
    away = {gamma: float(abs((1 - gamma) * V - gain).max()) for gamma, V in discounted.items()}
    run.check("gain_from_discounted", away[0.9999], at_most=away[0.9] / 100)
    plots.average_reward(run, mdp, policy, gain, bias, bounds, discounted)


def pomdp_results(run: Run, horizon: int, rollouts: int) -> None:
    """The tiger problem: its value over beliefs against simulations, and what gathering information is worth."""
    tiger, start = pomdp.tiger(), np.array([0.5, 0.5])
    stages = pomdp.solve(tiger, horizon, MARGIN)
    value = float(pomdp.value(start, stages[-1]))
    run.check("tiger_value", value)
    grid = np.linspace(0, 1, 1001)
    beliefs = np.stack([grid, 1 - grid], 1)
    bound = pomdp.value(beliefs, pomdp.qmdp(tiger, horizon))
    run.check("tiger_above_qmdp", (pomdp.value(beliefs, stages[-1]) - bound).max(), at_most=1e-9)
    returns, _ = pomdp.simulate(tiger, stages, rollouts, numpy_generator(run, "tiger"))
    error = returns.std(ddof=1) / math.sqrt(len(returns)) if len(returns) > 1 else math.inf
    run.check("tiger_deviation", abs(returns.mean() - value) / error, at_most=critical_z(2))

    mild = pomdp.tiger(penalty=-10.0)  # opening blindly costs nothing on average, listening costs 1
    qmdp = [pomdp.qmdp(mild, h + 1) for h in range(horizon)]
    optimal = pomdp.solve(mild, horizon, MARGIN)
    rngs = [numpy_generator(run, "mild tiger", name) for name in ("best", "qmdp")]
    returns, _ = pomdp.simulate(mild, optimal, rollouts, rngs[0])
    qmdp_returns, actions = pomdp.simulate(mild, qmdp, rollouts, rngs[1])
    run.result("mild_tiger", returns.mean(), error=standard_error(returns.tolist()), baseline=qmdp_returns.mean(),
               target=0.9 * float(pomdp.value(start, optimal[-1])))  # fmt: skip
    run.check("qmdp_listens", (actions == 0).mean(), at_most=0.0)
    plots.tiger(run, tiger, stages, mild, optimal)
