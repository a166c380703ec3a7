"""Temporal-difference learning: values and policies from experience alone, by the algorithms that the book compares.

    V(S) ← V(S) + α [R + γ V(S') − V(S)]            the target is an estimate itself: bootstrapping

Sutton 1988; Watkins 1989; Sutton & Barto 2018, chapters 5–7 and 9–12.
"""

import math
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch

from finetune.errors import UserError, nearest
from finetune.rl.envs import environments
from finetune.rl.envs.evaluation import returns
from finetune.rl.envs.rollout import episode_seeds, numpy_generator
from finetune.rl.envs.vector import VectorEnv
from finetune.rl.statistics import standard_error
from finetune.rl.tabular import mdp as tables
from finetune.rl.tabular import worlds
from finetune.runs import config
from finetune.runs.config import bounded
from finetune.runs.display import uncertain

from . import control, dqn, experiments, off_policy, plots
from .dqn import VARIANTS
from .experiments import ACTING, BIAS_KINDS, LAMBDAS, MC_ALPHAS, METHODS, SIGMAS, STEPS, TD_ALPHAS, TRACED, Totals

WITHIN = 0.15  # how far a mean may be from a value below
EXPECTED = {  # the same experiments simulated by others with 100 and more runs, for comparison
    "Example 6.2: TD, α 0.1, after 100 episodes": 0.057,
    "Example 6.2: TD, α 0.05, after 100 episodes": 0.036,
    "Example 6.2: MC, α 0.02, after 100 episodes": 0.082,
    "Example 6.2: MC, α 0.03, after 100 episodes": 0.098,
    "Example 6.2: TD, α 0.1, mean over episodes": 0.0685,
    "Example 6.2: best MC, mean over episodes": 0.122,
    "Figure 7.2: n = 1, best α": 0.348,
    "Figure 7.2: n = 2, best α": 0.284,
    "Figure 7.2: n = 4, best α": 0.261,
    "Figure 7.2: n = 8, best α": 0.273,
    "Figure 7.2: n = 16, best α": 0.322,
    "Figure 12.6: λ = 0, best α": 0.345,
    "Figure 12.6: λ = 0.4, best α": 0.273,
    "Figure 12.6: λ = 0.8, best α": 0.274,
    "Figure 12.6: λ = 0.9, best α": 0.304,
    "Example 6.6: SARSA, last 100 episodes": -26.8,
    "Example 6.6: Q-learning, last 100 episodes": -50.0,
    "Example 6.6: expected SARSA, last 100 episodes": -21.3,
}


LONGEST = 500.0  # return of an episode of CartPole-v1, at most
EACH, JUDGED = 4, 5  # environments of each DQN learner, and episodes by which a step judges it
EXPERIMENTS = ("baird", "five_states", "bias", "batch", "importance", "nineteen_states", "car", "cliff")


@dataclass
class Config(config.Config):
    threads: int = 1  # networks so small are fastest on one
    steps: int = 40  # each is a batch of runs of one of the eight experiments, in turn; Taxi and DQN learn in all
    checkpoint_every: int = 1
    # multiplies every learning rate; with 0 nothing is learned
    rate: float = bounded(1.0, at_least=0, at_most=1)
    # of a batch: the random walks, Baird's counterexample, importance sampling
    runs: int = bounded(100, at_least=1, at_most=100_000)
    cliff_runs: int = bounded(36, at_least=1, at_most=100_000)
    cliff_episodes: int = bounded(500, at_least=1, at_most=10**6)
    bias_runs: int = bounded(1000, at_least=1, at_most=10**6)
    bias_episodes: int = bounded(300, at_least=1, at_most=10**6)
    car_runs: int = bounded(5, at_least=1, at_most=10_000)
    car_episodes: int = bounded(150, at_least=1, at_most=10**6)
    taxi_runs: int = bounded(8, at_least=1, at_most=10_000)
    taxi_steps: int = bounded(6000, at_least=1, at_most=10**9)  # of each Taxi run in a step
    variants: str = "dqn,double,dueling,prioritized,n_step,all"  # of DQN, separated by commas; the last is judged
    dqn_runs: int = bounded(3, at_least=1, at_most=1000)  # learners of each, side by side
    dqn_steps: int = bounded(1250, at_least=1, at_most=10**9)  # of each learner in a step
    dqn_every: int = bounded(8, at_least=1, at_most=10**6)  # of these steps for one update

    @classmethod
    def toy(cls) -> "Config":
        return cls(steps=8, cliff_runs=20, cliff_episodes=300, car_runs=3, car_episodes=100, taxi_runs=4,
                   taxi_steps=9000, variants="all", dqn_steps=2000, dqn_every=4)  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.variants.split(","):
            if name not in VARIANTS:
                raise UserError(f"--variants: '{name}' is not one of {', '.join(VARIANTS)}{nearest(name, VARIANTS)}")
            if self.variants.split(",").count(name) > 1:
                raise UserError(f"--variants: '{name}' is there twice")


def main(cfg: Config, run) -> dict[str, Any]:
    totals, every = Totals(), len(EXPERIMENTS)
    taxi, draw = worlds.world("taxi"), numpy_generator(run, "taxi")
    drivers = control.Learners(taxi, ("q_learning",), cfg.taxi_runs, cfg.rate, 0.1, draw, limit=200)
    poles = {name: learners(cfg, run, name) for name in cfg.variants.split(",")}
    envs = environments.make("CartPole-v1", JUDGED * cfg.dqn_runs)
    seeds = episode_seeds(run, len(envs), "judged")  # the same at all times
    for step in run.steps(cfg.steps, {"totals": totals, "taxi": drivers, **poles}):
        name, batch = EXPERIMENTS[step % every], Totals()
        experiment(cfg, name, batch, numpy_generator(run, name, step))
        totals.merge(batch)
        draw = numpy_generator(run, "drive", step)
        for _ in range(cfg.taxi_steps):
            drivers.step(draw)
        for kind, pole in poles.items():
            pole.learn(cfg.dqn_steps, step / cfg.steps, (step + 1) / cfg.steps, cfg.rate, run.generator(kind, step))
            pole.curve.append(pole.judge(envs, seeds))
        worth = {f"cartpole_{kind}": pole.curve[-1].mean() for kind, pole in poles.items()}
        run.log(step, taxi=np.mean(driven(drivers)), **worth, **in_short(name, batch))

    judge_taxi(run, drivers)
    judge_poles(run, poles)
    done = EXPERIMENTS[: cfg.steps]
    run.result("experiments", len(done), target=every)
    for name, judge in JUDGES.items():
        if name in done:
            judge(run, totals)
    if len(done) == every:
        compare(run, totals)
    else:
        run.print(f"not run: {', '.join(EXPERIMENTS[len(done) :])}; --steps {every} runs each experiment once")
    plots.draw(run, totals, done)
    if done:
        plots.poles(run, {kind: torch.stack(pole.curve) for kind, pole in poles.items()}, cfg.dqn_steps)
    return {"taxi_episodes": float(drivers.world.episode.mean())}


def learners(cfg: Config, run, kind: str) -> dqn.DQN:
    """DQN on CartPole. All kinds have the same first episodes and, where they have the same layers, first weights."""
    seed = run.generator("cartpole").initial_seed()
    envs = VectorEnv(environments.make("CartPole-v1", EACH * cfg.dqn_runs), seed)
    run.seed("networks")
    return dqn.DQN(VARIANTS[kind], envs, cfg.dqn_runs, dqn.Settings(every=cfg.dqn_every))


def experiment(cfg: Config, name: str, totals: Totals, draw: np.random.Generator) -> None:
    if name == "five_states":
        experiments.five_states(totals, 4 * cfg.runs, cfg.rate, draw)  # they are cheap
    elif name == "nineteen_states":
        experiments.nineteen_states(totals, cfg.runs, cfg.rate, draw)
    elif name == "cliff":
        experiments.cliff(totals, cfg.cliff_runs, cfg.cliff_episodes, cfg.rate, draw)
    elif name == "bias":
        experiments.bias(totals, cfg.bias_runs, cfg.bias_episodes, cfg.rate, draw)
    elif name == "car":
        experiments.car(totals, cfg.car_runs, cfg.car_episodes, cfg.rate, draw)
    elif name == "baird":
        experiments.baird(totals, cfg.runs, cfg.rate, draw)
    elif name == "batch":
        experiments.batch_updating(totals, cfg.runs, cfg.rate, draw)
    else:
        experiments.importance(totals, cfg.runs, cfg.rate, draw)


def in_short(name: str, batch: Totals) -> dict[str, float]:
    """What a batch found, for metrics.csv."""
    if name == "five_states":
        return {"five_states_td": batch.mean("6.2 td mean")[1], "five_states_mc": batch.mean("6.2 mc mean").min()}
    if name == "nineteen_states":
        return {"n_step_error": batch.mean("7.2")[STEPS == 4].min(), "td_lambda_error": batch.mean(FIGURE_12_6).min()}
    if name == "cliff":
        return {f"cliff_{kind}": value for kind, value in zip(ACTING, batch.mean("6.6 last"), strict=True)}
    if name == "bias":
        return {f"left_{kind}": value for kind, value in zip(BIAS_KINDS, batch.mean("6.7 last"), strict=True)}
    if name == "car":
        return {"car_steps": batch.mean("car last")[-1]}
    if name == "batch":
        return {f"batch_{method}": batch.mean(f"6.2 batch {method} mean") for method in ("td", "mc")}
    if name == "importance":
        return {f"importance_{name}": batch.mean(f"5.3 {name}")[-1] for name in off_policy.ESTIMATORS}
    return {f"baird_{method}_growth": batch.mean(f"baird {method} growth") for method in METHODS}


# --- What is judged


def judge_taxi(run, drivers: control.Learners) -> None:
    """Q-learning on Taxi: the exact value of the greedy policy, stopped after 200 steps. Target: a hundredth of the way
    from the best, 7.93, to random actions."""
    taxi = drivers.mdp
    random = float(taxi.start @ tables.evaluate(taxi, tables.uniform(taxi), np.zeros(taxi.size[0]), 200))
    V = np.zeros(taxi.size[0])
    for _ in range(200):
        V = tables.action_values(taxi, V).max(1)
    best = float(taxi.start @ V)
    values = driven(drivers)
    run.result(
        "taxi", fmean(values), error=standard_error(values), baseline=random, target=best + (random - best) / 100
    )


def judge_poles(run, poles: dict[str, dqn.DQN]) -> None:
    """DQN on CartPole: mean return of 20 episodes of each learner, of at most 500, ± its standard error over the
    learners. The last kind has to come half of the way from random actions to that (toy: a quarter)."""
    count = next(iter(poles.values())).count
    envs = environments.make("CartPole-v1", 20 * count)
    seeds = episode_seeds(run, len(envs), "judged")
    draw = run.generator("random")
    random = fmean(returns(envs, lambda x: torch.randint(2, (len(x),), generator=draw), seeds))
    worth = {kind: pole.judge(envs, seeds) for kind, pole in poles.items()}
    *_, last = worth
    for kind, values in worth.items():
        target = random + (0.25 if run.toy else 0.5) * (LONGEST - random) if kind == last else None
        error = standard_error(values.tolist())
        run.result(f"cartpole_{kind}", values.mean(), error=error, baseline=random, target=target)
    run.result("cartpole_worst", worth[last].min(), baseline=random)


def driven(drivers: control.Learners) -> list[float]:
    return [experiments.truncated_value(drivers.mdp, actions, 200) for actions in drivers.greedy()]


TD_MEAN, N_4 = "Example 6.2: TD, α 0.1, mean over episodes", "Figure 7.2: n = 4, best α"
BEST_MC, FIGURE_12_6 = "Example 6.2: best MC, mean over episodes", "12.6 accumulating"


def measured(totals: Totals) -> dict[str, tuple[float, float]]:
    """(mean, standard error) under the names of EXPECTED."""
    found: dict[str, tuple[float, float]] = {}

    def note(name: str, mean: Any, error: Any) -> None:
        found[name] = float(mean), float(error)

    for method, alphas in (("td", TD_ALPHAS), ("mc", MC_ALPHAS)):
        mean, error = totals.mean(f"6.2 {method}")[:, -1], totals.error(f"6.2 {method}")[:, -1]
        for k, alpha in enumerate(alphas):
            note(f"Example 6.2: {method.upper()}, α {alpha:g}, after 100 episodes", mean[k], error[k])
    note(TD_MEAN, totals.mean("6.2 td mean")[1], totals.error("6.2 td mean")[1])
    k = int(totals.mean("6.2 mc mean").argmin())
    note(BEST_MC, totals.mean("6.2 mc mean")[k], totals.error("6.2 mc mean")[k])
    for key, values, label in (("7.2", STEPS, "Figure 7.2: n"), (FIGURE_12_6, LAMBDAS, "Figure 12.6: λ")):
        mean, error = totals.mean(key), totals.error(key)
        for value, row, errors in zip(values, mean, error, strict=True):
            k = int(row.argmin())
            note(f"{label} = {value:g}, best α", row[k], errors[k])
    kinds = ("SARSA", "expected SARSA", "Q-learning")
    for name, mean, error in zip(kinds, totals.mean("6.6 last"), totals.error("6.6 last"), strict=False):
        note(f"Example 6.6: {name}, last 100 episodes", mean, error)
    return found


def compare(run, totals: Totals) -> None:
    found = measured(totals)
    off = {name: abs(found[name][0] / value - 1) for name, value in EXPECTED.items()}
    noise = {name: 3 * found[name][1] / abs(value) for name, value in EXPECTED.items()}
    rows = [
        {"experiment": name.replace(", best α", "").replace("episodes", "ep."),
         "here ± s.e.": uncertain(*found[name]), "elsewhere": f"{value:g}", "off": f"{off[name]:.1%}"}
        for name, value in EXPECTED.items()
    ]  # fmt: skip
    run.table("the book's experiments, here and simulated by others", rows)
    beyond = max(off[name] - noise[name] for name in EXPECTED)
    run.result("largest_deviation", max(beyond, 0.0), target=WITHIN, higher=False)


def at(totals: Totals, name: str, *index: int) -> tuple[float, float]:
    """(mean over the runs, its standard error) of one number of what was added as `name`."""
    return float(totals.mean(name)[index]), float(totals.error(name)[index])


def least(totals: Totals, name: str, rows: slice | int = slice(None)) -> tuple[float, float]:
    """The same of the smallest of these rows: of the best learning rate, say."""
    mean, error = (np.ravel(x[rows]) for x in (totals.mean(name), totals.error(name)))
    return float(mean.min()), float(error[mean.argmin()])


def put(run, name: str, found: tuple[float, float], **more: Any) -> None:
    run.result(name, found[0], error=found[1], **more)


def judge_five_states(run, totals: Totals) -> None:
    put(run, "five_states_td", at(totals, "6.2 td mean", 1), baseline=totals.mean("6.2 mc mean").min(),
        target=EXPECTED[TD_MEAN] * (1 + WITHIN), higher=False)  # fmt: skip


def judge_nineteen_states(run, totals: Totals) -> None:
    best = {int(n): least(totals, "7.2", k) for k, n in enumerate(STEPS)}
    put(run, "n_step_error", best[4], baseline=best[1][0], target=EXPECTED[N_4] * (1 + WITHIN), higher=False)
    run.result("best_n", min(best, key=lambda n: best[n][0]))
    side = min(best[1], best[16])
    ratio = side[0] / best[4][0]
    error = ratio * math.hypot(side[1] / side[0], best[4][1] / best[4][0])
    run.result("n_step_u_shape", ratio, error=error, baseline=1.0, target=1 + 2 * error)
    traces = {trace: least(totals, f"12.6 {trace}") for trace in experiments.TRACES}
    td = least(totals, FIGURE_12_6, 0)[0]
    put(run, "td_lambda_error", traces["accumulating"], baseline=td, higher=False)
    put(run, "true_online_error", traces["true_online"], baseline=traces["accumulating"][0], higher=False)


def judge_cliff(run, totals: Totals) -> None:
    last, first = ({kind: at(totals, f"6.6 {part}", k) for k, kind in enumerate(ACTING)} for part in ("last", "first"))
    beside = {"sarsa": "q_learning", "expected_sarsa": "sarsa"}
    for name in ("q_learning", "sarsa", "expected_sarsa", "double_q", *SIGMAS, *TRACED):
        put(run, f"cliff_{name}", last[name], baseline=last[beside[name]][0] if name in beside else None)
    put(run, "early_sarsa_lambda", first["sarsa_lambda"], baseline=first["sarsa"][0])
    put(run, "early_q_lambda", first["q_lambda"], baseline=first["q_learning"][0])
    learning = last["q_learning"][0]  # the greedy path is worth −13 at best, and has to be nearer that than to this
    path = at(totals, "6.6 path")
    put(run, "cliff_q_learning_greedy", path, baseline=learning, target=(learning - 13) / 2)


def judge_bias(run, totals: Totals) -> None:
    left = {kind: at(totals, "6.7 last", k) for k, kind in enumerate(BIAS_KINDS)}
    (single, error), (_, other) = left["q_learning"], left["double_q"]
    put(run, "left_q_learning", left["q_learning"])
    target = single - 3 * math.hypot(error, other)
    put(run, "left_double_q", left["double_q"], baseline=single, target=target, higher=False)


def judge_car(run, totals: Totals) -> None:
    first = totals.mean("car first")[-1]
    put(run, "car_steps", at(totals, "car last", -1), baseline=first, target=first / 4, higher=False)


def judge_baird(run, totals: Totals) -> None:
    """Weights of semi-gradient TD grow without end; those of TDC and GTD2 do not, and their errors go towards 0."""
    td = at(totals, "baird td growth")
    put(run, "baird_td_growth", td, baseline=1.0, target=5.0)
    for method in METHODS[1:]:
        growth = at(totals, f"baird {method} growth")
        put(run, f"baird_{method}_growth", growth, baseline=td[0], target=1.0, higher=False)
        first = totals.mean(f"baird {method} error")[0]
        error = at(totals, f"baird {method} error", -1)
        put(run, f"baird_{method}_error", error, baseline=first, target=first / 10, higher=False)


def judge_batch(run, totals: Totals) -> None:
    td, mc = (at(totals, f"6.2 batch {method} mean") for method in ("td", "mc"))
    put(run, "batch_td", td, baseline=mc[0], higher=False)
    run.result("certainty_gap", totals.mean("6.2 batch gap"), target=1e-8, higher=False)
    td, mc = (totals.mean(f"6.4 {method}")[0] for method in ("td", "mc"))
    run.result("predictor_td", td, baseline=mc, target=0.75 - 1e-8)


def judge_importance(run, totals: Totals) -> None:
    early = {name: at(totals, f"5.3 {name} early") for name in off_policy.ESTIMATORS}
    put(run, "importance_early", early["weighted"], baseline=early["ordinary"][0], higher=False)
    for name, (first, _) in early.items():
        put(run, f"importance_{name}", at(totals, f"5.3 {name}", -1), baseline=first, target=first / 10, higher=False)
    loop = {name: at(totals, f"5.5 {name}", -1) for name in off_policy.ESTIMATORS}
    put(run, "loop_ordinary", loop["ordinary"])
    put(run, "loop_weighted", loop["weighted"], baseline=loop["ordinary"][0], target=1e-12, higher=False)
    ordinary = totals.mean("5.9 ordinary")[-1]
    put(run, "per_decision", at(totals, "5.9 per_decision", -1), baseline=ordinary, higher=False)


JUDGES = {"five_states": judge_five_states, "nineteen_states": judge_nineteen_states, "cliff": judge_cliff,
          "bias": judge_bias, "car": judge_car, "baird": judge_baird, "batch": judge_batch,
          "importance": judge_importance}  # fmt: skip
