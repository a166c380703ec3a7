"""Temporal-difference learning: values and policies from experience alone, by the algorithms that the book compares.

    V(S) ← V(S) + α [R + γ V(S') − V(S)]            the target is an estimate itself: bootstrapping

`textbook.py` has the algorithms as plain loops (`--experiment textbook` runs them). This file runs the book's
experiments by the vectorized forms, in batches of independent runs, and trains Q-learning on Taxi and DQN on CartPole.

Sutton 1988; Watkins 1989; Sutton & Barto 2018, chapters 5–7 and 9–12.
"""

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np
import torch

from finetune.errors import UserError, nearest
from finetune.rl.envs import environments
from finetune.rl.envs.environments import EpisodeLimit
from finetune.rl.envs.evaluation import returns
from finetune.rl.envs.rollout import episode_seeds, numpy_generator
from finetune.rl.envs.vector import VectorEnv
from finetune.rl.statistics import standard_error
from finetune.rl.tabular import mdp as tables
from finetune.rl.tabular import worlds
from finetune.runs import config
from finetune.runs.config import bounded
from finetune.runs.display import uncertain
from finetune.runs.run import Run

from . import control, dqn, own_world, plots
from . import figures_control as fc
from . import figures_prediction as fp
from .experiments import Experiment, Totals, estimate, smallest
from .figures_control import truncated_value
from .figures_prediction import FIGURE_12_6, LAMBDAS, MC_ALPHAS, STEPS, TD_ALPHAS
from .published import BEST_MC, PUBLISHED, TD_MEAN, WITHIN
from .textbook_run import run_textbook

MAX_RETURN = 500.0  # of an episode of CartPole-v1
ENVS, EVALUATION_EPISODES = 4, 5  # environments of each DQN learner; episodes of an evaluation at each step
TAXI_LIMIT = 200  # steps after which an episode of Taxi is truncated

EXPERIMENTS = {
    "baird": Experiment(fc.baird, fc.baird_summary, fc.judge_baird, plots.baird),
    "five_states": Experiment(fp.five_states, fp.five_states_summary, fp.judge_five_states, plots.five_states),
    "bias": Experiment(fc.bias, fc.bias_summary, fc.judge_bias, plots.bias),
    "batch": Experiment(fp.batch_updating, fp.batch_summary, fp.judge_batch, plots.batch),
    "importance": Experiment(fp.importance, fp.importance_summary, fp.judge_importance, plots.importance),
    "nineteen_states": Experiment(
        fp.nineteen_states, fp.nineteen_states_summary, fp.judge_nineteen_states, plots.nineteen_states
    ),
    "car": Experiment(fc.car, fc.car_summary, fc.judge_car, plots.car),
    "cliff": Experiment(fc.cliff, fc.cliff_summary, fc.judge_cliff, plots.cliff),
}
Chosen = Literal["all", "textbook", "taxi", "dqn", "baird", "five_states", "bias", "batch", "importance",
                 "nineteen_states", "car", "cliff"]  # fmt: skip


@dataclass
class Config(config.Config):
    threads: int = 1  # networks so small are fastest on one
    steps: int = 40  # each runs a batch of one of the eight experiments, in turn; Taxi and DQN train in every step
    checkpoint_every: int = 1
    # textbook: the book's loops, printed as they learn; all: the vectorized experiments; or one of them
    experiment: Chosen = "all"
    # --- a world, or an environment, of your own, in place of the experiments
    # a name in rl/tabular/worlds.py, or an environment whose observations are finite
    world: str | None = None
    data: Path | None = None  # an npz with P (states, actions, states) and R, in place of a world
    gamma: float | None = bounded(None, at_least=0, at_most=1)  # discount of the world; none: the world's own
    world_runs: int = bounded(4, at_least=1, at_most=10_000)  # independent tables of each algorithm
    world_steps: int = bounded(4000, at_least=1, at_most=10**9)  # of each table in a step
    # steps after which an episode in a world is truncated; values are those of as many steps
    world_limit: int = bounded(200, at_least=1, at_most=10**6)
    # of DQN: a gymnasium id, or an environment of your own (actor_critic's README)
    env: str = "CartPole-v1"
    # keyword arguments of --env or --world, such as is_slippery=false; may be given several times
    env_arg: tuple[str, ...] = ()
    # steps after which an episode of --env is truncated if its environment has no time limit
    max_episode_steps: int = bounded(1000, at_least=1, at_most=10**6)
    # ---
    # multiplies every learning rate; with 0 nothing is learned
    rate: float = bounded(1.0, at_least=0, at_most=1)
    # --- random walks, Baird, importance sampling
    runs: int = bounded(100, at_least=1, at_most=100_000)  # in a batch
    # --- cliff
    cliff_runs: int = bounded(36, at_least=1, at_most=100_000)  # of each algorithm in a batch
    cliff_episodes: int = bounded(500, at_least=1, at_most=10**6)  # of each run
    # --- maximization bias
    bias_runs: int = bounded(1000, at_least=1, at_most=10**6)  # of each algorithm in a batch
    bias_episodes: int = bounded(300, at_least=1, at_most=10**6)  # of each run
    # --- Mountain Car
    car_runs: int = bounded(5, at_least=1, at_most=10_000)  # of each learning rate in a batch
    car_episodes: int = bounded(150, at_least=1, at_most=10**6)  # of each run
    # --- Taxi
    taxi_runs: int = bounded(8, at_least=1, at_most=10_000)  # independent tables
    taxi_steps: int = bounded(6000, at_least=1, at_most=10**9)  # of each run in a step
    # --- DQN
    variants: str = "dqn,double,dueling,prioritized,n_step,all"  # separated by commas; the last one has a target
    dqn_runs: int = bounded(3, at_least=1, at_most=1000)  # learners of each variant
    dqn_steps: int = bounded(1250, at_least=1, at_most=10**9)  # of each learner in a step
    dqn_every: int = bounded(8, at_least=1, at_most=10**6)  # of these steps per update

    @classmethod
    def toy(cls) -> "Config":
        return cls(steps=8, cliff_runs=20, cliff_episodes=300, car_runs=3, car_episodes=100, taxi_runs=4,
                   taxi_steps=9000, variants="all", dqn_steps=2000, dqn_every=4)  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.variants.split(","):
            if name not in dqn.VARIANTS:
                known = ", ".join(dqn.VARIANTS)
                raise UserError(f"--variants: '{name}' is not one of {known}{nearest(name, dqn.VARIANTS)}")
            if self.variants.split(",").count(name) > 1:
                raise UserError(f"--variants: '{name}' is there twice")
        if self.world and self.data:
            raise UserError("--world and --data are two worlds: give one")
        if (self.world or self.data) and self.experiment != "all":
            raise UserError(f"--experiment {self.experiment} has its own world: omit it, or --world and --data")
        if self.gamma is not None and not (self.world or self.data):
            raise UserError("--gamma is that of --world or --data: give one of them")
        if self.data and self.env_arg:
            raise UserError("--env-arg is for an environment, not for --data")

    @property
    def dqn_alone(self) -> bool:
        """Whether --env names another environment than the experiments'."""
        return self.experiment == "dqn" or (self.experiment == "all" and self.env != "CartPole-v1")


def main(cfg: Config, run: Run) -> dict[str, Any]:
    if cfg.experiment == "textbook":
        run_textbook(run, cfg.steps)
        return {}
    if cfg.world or cfg.data:
        own_world.learn(cfg, run)
        return {}
    experiment = "dqn" if cfg.dqn_alone else cfg.experiment
    names = [name for name in EXPERIMENTS if experiment in ("all", name)]
    totals, limit = Totals(), EpisodeLimit(cfg.max_episode_steps, run.print)
    taxi = taxi_learners(cfg, run) if experiment in ("all", "taxi") else None
    poles = dqn_learners(cfg, run, limit) if experiment in ("all", "dqn") else {}
    envs = dqn_envs(cfg, EVALUATION_EPISODES, limit) if poles else []
    seeds = episode_seeds(run, len(envs), "judged")  # the same in every evaluation
    state = {"totals": totals, "limit": limit, **({"taxi": taxi} if taxi else {}), **poles}
    for step in run.steps(cfg.steps, state):
        row: dict[str, float] = {}
        if taxi:
            train_taxi(taxi, cfg.taxi_steps, numpy_generator(run, "drive", step))
            row["taxi"] = float(np.mean(taxi_values(taxi)))
        for kind, learner in poles.items():
            learner.train(cfg.dqn_steps, step / cfg.steps, (step + 1) / cfg.steps, cfg.rate, run.generator(kind, step))
            learner.curve.append(learner.evaluate(envs, seeds))
            row[f"{dqn_name(cfg)}_{kind}"] = learner.curve[-1].mean().item()
        if names:
            name, batch = names[step % len(names)], Totals()
            EXPERIMENTS[name].run(cfg, batch, numpy_generator(run, name, step))
            totals.merge(batch)
            row |= EXPERIMENTS[name].summary(batch)
        run.log(step, **row)

    done = names[: cfg.steps]
    for name in done:
        EXPERIMENTS[name].judge(run, totals)
        EXPERIMENTS[name].picture(run, totals)
    if taxi:
        judge_taxi(run, taxi)
    if poles:
        judge_dqn(cfg, run, poles, limit)
    if experiment == "all":
        run.check("experiments", len(done), at_least=len(EXPERIMENTS))
        if len(done) == len(EXPERIMENTS):
            compare(run, totals)
        else:
            missing = ", ".join(list(EXPERIMENTS)[len(done) :])
            run.print(f"not run: {missing}; --steps {len(EXPERIMENTS)} runs each experiment once")
    if poles and cfg.steps:
        plots.dqn_curves(
            run, {kind: torch.stack(learner.curve) for kind, learner in poles.items()}, cfg.dqn_steps, cfg.env
        )
    return limit.summary()


# --- Taxi: tabular Q-learning


def taxi_learners(cfg: Config, run: Run) -> control.Learners:
    """Q-learning with α = 1: Taxi is deterministic, so that a target has no noise."""
    rng = numpy_generator(run, "taxi")
    return control.Learners(worlds.world("taxi"), ("q_learning",), cfg.taxi_runs, cfg.rate, 0.1, rng, limit=TAXI_LIMIT)


def train_taxi(taxi: control.Learners, steps: int, rng: np.random.Generator) -> None:
    for _ in range(steps):
        taxi.step(rng)


def taxi_values(taxi: control.Learners) -> list[float]:
    """The exact value of each run's greedy policy over TAXI_LIMIT steps."""
    return [truncated_value(taxi.mdp, actions, TAXI_LIMIT) for actions in taxi.greedy()]


def judge_taxi(run: Run, taxi: control.Learners) -> None:
    """The gap to the optimal value, 7.93, has to be at most a hundredth of that of random actions."""
    mdp = taxi.mdp
    random = float(mdp.start @ tables.evaluate(mdp, tables.uniform(mdp), np.zeros(mdp.size[0]), TAXI_LIMIT))
    V = np.zeros(mdp.size[0])
    for _ in range(TAXI_LIMIT):
        V = tables.action_values(mdp, V).max(1)
    optimal = float(mdp.start @ V)
    values = taxi_values(taxi)
    run.result("taxi", fmean(values), error=standard_error(values), baseline=random,
               target=optimal + (random - optimal) / 100)  # fmt: skip
    run.check("taxi_episodes", float(taxi.envs.episode.mean()))


# --- CartPole, or another environment: DQN


def dqn_envs(cfg: Config, each: int, limit: EpisodeLimit) -> list[environments.Env]:
    """`each` environments for every learner. UserError if their actions are continuous."""
    envs = environments.make(cfg.env, each * cfg.dqn_runs, episode_limit=limit, args=cfg.env_arg)
    if envs[0].continuous:
        raise UserError(f"'{cfg.env}' has continuous actions: DQN's are discrete; actor_critic has sac and td3")
    return envs


def dqn_name(cfg: Config) -> str:
    return "cartpole" if cfg.env == "CartPole-v1" else "return"


def dqn_learners(cfg: Config, run: Run, limit: EpisodeLimit) -> dict[str, dqn.DQN]:
    """All variants have the same first episodes and, where they have the same layers, the same initial weights."""
    seed = run.generator("cartpole").initial_seed()
    learners = {}
    for kind in cfg.variants.split(","):
        envs = VectorEnv(dqn_envs(cfg, ENVS, limit), seed)
        run.seed("networks")
        learners[kind] = dqn.DQN(dqn.VARIANTS[kind], envs, cfg.dqn_runs, dqn.Settings(every=cfg.dqn_every))
    return learners


def judge_dqn(cfg: Config, run: Run, poles: dict[str, dqn.DQN], limit: EpisodeLimit) -> None:
    """Mean return of 20 episodes of each learner ± its standard error over the learners. On CartPole the last variant
    has to get half of the way from random actions to 500, the most that there is (toy: a quarter)."""
    envs, name, pole = dqn_envs(cfg, 20, limit), dqn_name(cfg), cfg.env == "CartPole-v1"
    seeds = episode_seeds(run, len(envs), "judged")
    rng = run.generator("random")
    actions = envs[0].action_dim
    random = fmean(returns(envs, lambda x: torch.randint(actions, (len(x),), generator=rng), seeds))
    rows = []
    for kind, learner in poles.items():
        values = learner.evaluate(envs, seeds)
        mean, error, worst = values.mean().item(), standard_error(values.tolist()), values.min().item()
        rows.append({"variant": kind, "return": uncertain(mean, error), "worst learner": f"{worst:.0f}"})
        run.check(f"{name}_{kind}_worst", worst)
        if kind == list(poles)[-1]:
            target = random + (0.25 if run.toy else 0.5) * (MAX_RETURN - random) if pole else None
            run.result(f"{name}_{kind}", mean, error=error, baseline=random, target=target)
        else:
            run.check(f"{name}_{kind}", mean, error=error)
    most = "CartPole: return of the greedy policy, at most 500" if pole else f"{cfg.env}: return of the greedy policy"
    run.table(f"DQN on {most}", rows)


# --- The experiments as simulated by others


def measured(totals: Totals) -> dict[str, tuple[float, float]]:
    """(mean, standard error) under the names of PUBLISHED."""
    found = {}
    for method, alphas in (("td", TD_ALPHAS), ("mc", MC_ALPHAS)):
        for k, alpha in enumerate(alphas):
            name = f"Example 6.2: {method.upper()}, α {alpha:g}, after 100 episodes"
            found[name] = estimate(totals, f"6.2 {method}", k, -1)
    found[TD_MEAN] = estimate(totals, "6.2 td mean", 1)
    found[BEST_MC] = smallest(totals, "6.2 mc mean")
    for key, values, label in (("7.2", STEPS, "Figure 7.2: n"), (FIGURE_12_6, LAMBDAS, "Figure 12.6: λ")):
        for k, value in enumerate(values):
            found[f"{label} = {value:g}, best α"] = smallest(totals, key, k)
    for k, name in enumerate(("SARSA", "expected SARSA", "Q-learning")):
        found[f"Example 6.6: {name}, last 100 episodes"] = estimate(totals, "6.6 last", k)
    return found


def compare(run: Run, totals: Totals) -> None:
    """A table of the means next to the published ones. What three standard errors do not explain of a difference has to
    be below `WITHIN`."""
    found = measured(totals)
    off = {name: abs(found[name][0] / value - 1) for name, value in PUBLISHED.items()}
    noise = {name: 3 * found[name][1] / abs(value) for name, value in PUBLISHED.items()}
    rows = [
        {"experiment": name.replace(", best α", "").replace("episodes", "ep."),
         "here ± s.e.": uncertain(*found[name]), "published": f"{value:g}", "off": f"{off[name]:.1%}"}
        for name, value in PUBLISHED.items()
    ]  # fmt: skip
    run.table("the book's experiments, here and as simulated by others", rows)
    beyond = max(off[name] - noise[name] for name in PUBLISHED)
    run.check("largest_deviation", max(beyond, 0.0), at_most=WITHIN)
