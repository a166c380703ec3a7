"""Conservative Q-learning: can a policy be learned from logged steps alone, and what does the learner believe of it?

    loss = TD + α · E_data[ log Σ_a exp Q(s, a) − Q(s, a_data) ]       Kumar et al. 2020, arXiv:2006.04779

Compares CQL with behavior cloning and naive Q-learning on the same batches, then evaluates all three in the
environment. The algorithms are in `cql_discrete.py` and `cql_continuous.py`.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from finetune.errors import UserError, nearest
from finetune.rl.agents import log_alone
from finetune.rl.agents.offline import normalized_score
from finetune.rl.envs import environments, offline_files
from finetune.rl.statistics import mean_and_error, standard_error
from finetune.runs import config
from finetune.runs.config import bounded
from finetune.runs.display import uncertain
from finetune.runs.run import Run

from . import cql_continuous, cql_discrete, plots
from .data import SETS, Task, prepare
from .evaluation import Estimate, Judged, estimate, judge

# Mean returns of the random and of the expert policy: scores of 0 and 100.
SCORE_RANGE = {"CartPole-v1": (22.0, 500.0), "Pendulum-v1": (-1200.0, -150.0)}


@dataclass
class Config(config.Config):
    steps: int = 60  # steps on each data set; one is `updates` updates of every learner
    checkpoint_every: int = 10
    threads: int = 1  # networks so small are fastest on one
    # --- data
    sets: str = "expert,random,mixed,pendulum_mixed"  # to learn from, separated by commas
    # your own steps instead: an npz, or what Minari, D4RL, CORL and d3rlpy write (README: your own log)
    data: Path | None = None
    data_format: str = "auto"  # of --data; auto: by the names in the file
    # with --data: the environment of the steps, in which the policies are evaluated; none: learn from the log alone
    env: str = "CartPole-v1"
    # keyword arguments of --env, such as is_slippery=false; may be given several times
    env_arg: tuple[str, ...] = ()
    data_steps: int = bounded(50_000, at_least=100, at_most=10**7)  # of a generated set; an expert's has 1/25 of it
    shuffle_actions: bool = False  # control: actions are permuted over the set, so there is nothing to learn
    # --- a log alone (--data FILE --env none)
    # share of the episodes that is not learned from: fitted Q evaluation judges by it
    held_out: float = bounded(0.3, above=0, below=1)
    # number of states of integer observations; 0: up to the largest in the data
    states: int = bounded(0, at_least=0, at_most=100_000)
    # bounds of continuous actions, one number or one for each component, separated by commas; none: the logged range
    action_low: str = ""
    action_high: str = ""
    # --- all learners
    updates: int = bounded(100, at_least=1, at_most=10**6)  # updates of each learner in a step
    hidden: int = bounded(64, at_least=1, at_most=8192)  # width of the two hidden layers of every network
    lr: float = bounded(1e-3, at_least=0, at_most=10)  # Adam's, decays linearly to 0
    tau: float = bounded(0.01, at_least=0, at_most=1)  # how far the target network moves in an update (Polyak)
    # --- CQL, any actions
    # learn α so that the gap approaches this (CQL-Lagrange)
    threshold: float | None = bounded(None, at_least=-(10**6), at_most=10**6)
    rho: bool = False  # CQL(ρ), with the policy for ρ, instead of CQL(H)
    # --- CQL, discrete actions
    # weight of the conservative term (the min-Q weight); 0 is the naive learner
    alpha: float = bounded(0.5, at_least=0, at_most=10**6)
    gamma: float = bounded(0.98, at_least=0, below=1)  # discount
    batch: int = bounded(256, at_least=2, at_most=10**6)  # rows of an update
    # rewards are scaled so that the largest of the data is this: α and the learning rate then fit rewards of any unit
    reward_scale: float = bounded(1.0, above=0, at_most=10**6)
    # --- CQL, continuous actions (with SAC)
    alpha_continuous: float = bounded(0.2, at_least=0, at_most=10**6)  # weight of the conservative term
    gamma_continuous: float = bounded(0.9, at_least=0, below=1)  # discount
    batch_continuous: int = bounded(64, at_least=2, at_most=10**6)  # rows of an update
    reward_scale_continuous: float = bounded(1.6, above=0, at_most=10**6)  # the same as --reward-scale
    samples: int = bounded(5, at_least=1, at_most=1000)  # actions from each of the three proposals of the integral
    backup: Literal["soft", "plain", "max"] = "soft"  # V(s') with entropy, without, the best of `samples` actions
    warm_start: int = bounded(0, at_least=0, at_most=10**9)  # first updates, in which the actor clones the data
    calibrated: bool = False  # Cal-QL: Q is pushed down to the behavior policy's returns at most
    # --- evaluation
    eval_every: int = bounded(10, at_least=1, at_most=10**9)  # steps between two evaluations
    eval_episodes: int = bounded(20, at_least=2, at_most=10_000)  # episodes of an evaluation
    # fitted Q evaluation after training: steps of `updates` updates; 0: omit it
    fqe_steps: int = bounded(30, at_least=0, at_most=10**6)
    # an episode is truncated there if its environment has no time limit
    max_episode_steps: int = bounded(1000, at_least=1, at_most=10**6)
    # ---

    @classmethod
    def toy(cls) -> "Config":
        # A short horizon and a fast target network: values propagate all the way (see `propagated`).
        return cls(steps=24, sets="expert,random", batch=128, gamma=0.9, tau=0.05, alpha=2.0, fqe_steps=4,
                   eval_every=12, eval_episodes=10)  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.sets.split(","):
            if name not in SETS:
                raise UserError(f"--sets: '{name}' is not one of {', '.join(SETS)}{nearest(name, SETS)}")
            if self.sets.split(",").count(name) > 1:
                raise UserError(f"--sets: '{name}' is there twice")
        if self.data is None and self.env != type(self).env:
            raise UserError(f"--env {self.env} says where the steps of --data come from: without it, choose --sets")
        if self.env_arg and (self.data is None or self.env == "none"):
            raise UserError("--env-arg is for the environment of --data's steps: it needs --data and --env")
        offline_files.check_format(self.data_format)
        alone = {"--states": self.states, "--action-low": self.action_low, "--action-high": self.action_high}
        log_alone.check_settings(self.data is not None and self.env == "none", alone, self.fqe_steps)
        if self.threshold is not None and min(self.alpha, self.alpha_continuous) == 0:
            raise UserError("--threshold learns α from where it starts: --alpha must be above 0")


def main(cfg: Config, run: Run) -> dict[str, Any]:
    sets = ["data"] if cfg.data else cfg.sets.split(",")
    found: dict[str, dict[str, Estimate]] = {}
    judged: Judged | None = None
    limit = environments.EpisodeLimit(cfg.max_episode_steps, run.print)
    for name in sets:
        task = prepare(cfg, run, name, limit)
        algorithm = cql_continuous if task.data.continuous else cql_discrete
        learners = algorithm.train(cfg, run, task)
        if task.held:
            judged = judge(cfg, run, task, learners)
            log_alone.report(run, name, lambda key: f"fqe_data_{key}", "cql", task.held, judged.fqe, judged.believed)
            continue
        found[name] = estimate(cfg, run, task, learners)
        show_table(cfg, run, task, found[name])
        report(run, task, found[name])
    if cfg.steps:
        plots.plot_gaps(run, sets)
        if found:
            plots.plot_returns(run, sets)
            plots.plot_values(run, found)
    if judged is not None and task.held:
        plots.plot_judged(run, judged, task.held)
    return limit.summary()


# --- Results


def propagated(cfg: Config, gamma: float) -> float:
    """The share of an endless episode's value that can have reached the starts: an update moves values by `tau` of a
    step."""
    return 1 - gamma ** (cfg.steps * cfg.updates * cfg.tau)


def show_table(cfg: Config, run: Run, task: Task, found: dict[str, Estimate]) -> None:
    """A row for each learner: return, normalized score, its own value of the starts, FQE's, and the true one."""
    env, episodes = task.envs[0].name, task.data.returns()
    rows = []
    for name, e in found.items():
        value, error = mean_and_error([e.episodes])
        score = normalized_score(value, *SCORE_RANGE[env]) if env in SCORE_RANGE else None
        numbers = {"score": score, "believed": e.believed, "FQE": e.fqe}
        shown = {column: "–" if number is None else f"{number:.4g}" for column, number in numbers.items()}
        true = uncertain(e.true, standard_error(e.true_each.tolist()))
        rows.append({"learner": name, "return": uncertain(value, error), **shown, "true": true})
    behavior = f"mean return {fmean(episodes):.1f}" if episodes else "no whole episode"
    share = f"{propagated(cfg, task.gamma):.0%} of an endless episode's can have propagated to the starts"
    run.table(f"{task.name}: {len(task.data)} steps, {behavior}; values are discounted, {share}", rows)


def report(run: Run, task: Task, found: dict[str, Estimate]) -> None:
    """Headline results: CQL's return, and on narrow data its overestimation. Targets are relative to the return of the
    data and to the naive learner's overestimation; data of one's own have none. All other figures are checks."""
    name, episodes = task.name, task.data.returns()
    behavior = fmean(episodes) if episodes else None
    returns = {learner: mean_and_error([e.episodes]) for learner, e in found.items()}
    stitched = 3.0 if run.toy else 5.0  # times the return of the data
    factor = {"expert": 0.5, "random": stitched, "mixed": stitched}.get(name)
    target = None
    if behavior is not None and factor is not None:
        target = factor * behavior
    elif behavior is not None and name.startswith("pendulum"):
        target = behavior + 0.2 * abs(behavior)
    baseline = {"expert": "naive", "data": None}.get(name, "bc")
    value, error = returns["cql"]
    compared = returns[baseline][0] if baseline else None
    run.result(f"return_{name}_cql", value, error=error, target=target, baseline=compared)
    for learner in ("bc", "naive"):
        value, error = returns[learner]
        bound = behavior / 4 if behavior is not None and (name, learner) == ("expert", "naive") else None
        run.check(f"return_{name}_{learner}", value, error=error, at_most=bound)
    if name == "random":
        (ours, error), (theirs, other) = returns["cql"], returns["bc"]
        error = abs(ours / theirs) * math.hypot(error / ours, other / theirs)
        run.check("cql_over_bc_random", ours / theirs, error=error, at_least=stitched)
    if task.comparable:
        report_values(run, name, found)


def report_values(run: Run, name: str, found: dict[str, Estimate]) -> None:
    """believed − true: the naive learner's must be above 0 on `expert`, CQL's below the naive learner's, each by three
    standard errors. CQL's itself need not be below 0: Q of the logged actions is pushed up."""
    naive, error = found["naive"].overestimate()
    run.check(f"overestimate_{name}_naive", naive, error=error, at_least=3 * error if name == "expert" else None)
    value, error = found["cql"].overestimate()
    bound = naive - 3 * found["cql"].overestimate(found["naive"])[1]
    if name == "expert":
        run.result(f"overestimate_{name}_cql", value, error=error, baseline=naive, target=bound, higher=False)
    else:
        run.check(
            f"overestimate_{name}_cql", value, error=error, at_most=bound if name in ("random", "mixed") else None
        )
    for learner, e in found.items():
        if e.fqe_each is not None:
            errors = e.fqe_each - e.true_each
            run.check(f"fqe_error_{name}_{learner}", float(errors.mean()), error=standard_error(errors.tolist()))
