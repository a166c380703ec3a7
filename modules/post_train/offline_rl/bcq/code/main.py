"""Batch-constrained Q-learning: how does a policy become better than the logs without actions that they lack?

    discrete     a = argmax { Q(s, a) : G(a|s) ≥ τ max G(·|s) }                      τ = 0: DQN, τ = 1: cloning
    continuous   a = argmax Q(s, aᵢ + Φ ξ(s, aᵢ)),  aᵢ from a VAE of the data's actions

Fujimoto et al. 2018 and 2019 (arXiv:1812.02900, 1910.01708). Compares BCQ with cloning, naive Q-learning, TD3+BC, IQL
and AWAC on the same logs. The algorithms are in `bcq_discrete.py`, `bcq_continuous.py`, `td3_bc.py`, `iql.py` and
`awac.py`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from finetune.errors import UserError
from finetune.rl.agents import log_alone
from finetune.rl.agents.networks import Deterministic
from finetune.rl.agents.offline import Cloning, OfflineLearner
from finetune.rl.envs import environments, offline_files
from finetune.rl.envs.logged_data import Spaces
from finetune.rl.statistics import standard_error
from finetune.runs import config
from finetune.runs.config import bounded
from finetune.runs.run import Run

from . import bcq_continuous, bcq_discrete, plots
from .awac import AWAC
from .bcq_discrete import DQN, QAndImitator
from .data import Task, generated_task, task_of_file, task_of_log_alone
from .evaluation import evaluate, fitted_q_evaluation
from .iql import IQL
from .td3_bc import TD3, TD3BC

RETURN_RANGE = {"CartPole-v1": 480.0, "Pendulum-v1": 1050.0}  # return of a good policy minus that of random actions
EVALUATED = ("dqn", "td3", "bc", "bcq")  # by fitted Q evaluation
Found = dict[str, dict[str, float]]  # method → what `evaluate` finds after training, and `fqe`


@dataclass
class Config(config.Config):
    steps: int = 3000  # updates of each method
    threads: int = 1  # networks so small are fastest on one
    checkpoint_every: int = 1000
    # --- data
    # one after the other, separated by commas; none, with --data: learn from the log alone
    envs: str = "CartPole-v1,Pendulum-v1"
    # with --data: keyword arguments of --envs, such as is_slippery=false; may be given several times
    env_arg: tuple[str, ...] = ()
    # logged steps of the one environment that --envs names: an npz, or what Minari, D4RL, CORL and d3rlpy write
    # (README: your own log); none: sets are generated
    data: Path | None = None
    data_format: str = "auto"  # of --data; auto: by the names in the file
    rows: int = bounded(10_000, at_least=100, at_most=10**7)  # steps of each generated set
    discrete_sets: str = "expert,random"  # of CartPole, to train on
    continuous_sets: str = "mixed,expert"  # of Pendulum
    shuffle_actions: bool = False  # control: actions are permuted over the set, so there is nothing to learn
    # --- a log alone (--data FILE --envs none)
    # share of the episodes that is not learned from: fitted Q evaluation judges by it
    held_out: float = bounded(0.3, above=0, below=1)
    # number of states of integer observations; 0: up to the largest in the data
    states: int = bounded(0, at_least=0, at_most=100_000)
    # bounds of continuous actions, one number or one for each component, separated by commas; none: the logged range
    action_low: str = ""
    action_high: str = ""
    # --- all methods
    gamma: float = bounded(0.97, at_least=0, at_most=1)  # a horizon that values propagate over within --steps
    hidden: int = bounded(64, at_least=1, at_most=8192)  # width of the two hidden layers of every network
    lr: float = bounded(1e-3, at_least=0, at_most=10)  # Adam's, of every network
    compared: str = "bc,td3,td3_bc,iql,awac"  # with continuous BCQ; td3 is the naive learner
    # --- BCQ, discrete actions
    batch: int = bounded(64, at_least=1, at_most=10**6)  # rows of an update
    # rewards are scaled so that the largest of the data is this: learning rate and temperatures then fit any unit
    reward_scale: float = bounded(1.0, above=0, at_most=10**6)
    # threshold: an action less likely than τ times the likeliest is never taken
    tau: float = bounded(0.3, at_least=0, at_most=1)
    beta: float = bounded(0.01, at_least=0, at_most=10**6)  # penalty on the imitator's squared logits
    shared: bool = True  # Q and imitator share all layers but the last
    target_every: int = bounded(50, at_least=1, at_most=10**9)  # updates between two copies to the target network
    # --- the sweep over thresholds
    sweep_sets: str = "expert,medium,mixed"  # of CartPole; none: omit the sweep
    sweep: str = "0,0.1,0.3,0.6,1"  # thresholds
    sweep_steps: int = bounded(2000, at_least=0, at_most=10**9)  # updates of each, but at most --steps
    # --- BCQ, continuous actions
    continuous_batch: int = bounded(64, at_least=1, at_most=10**6)  # rows of an update
    reward_scale_continuous: float = bounded(1.6, above=0, at_most=10**6)  # the same as --reward-scale
    candidates: int = bounded(10, at_least=1, at_most=10_000)  # actions that the maximum of a target runs over
    act_candidates: int = bounded(100, at_least=1, at_most=10_000)  # the same in acting
    phi: float = bounded(0.05, at_least=0, at_most=2)  # how far an action may be perturbed, of −1 … 1
    # weight of the smaller of two critics; the larger has the rest
    lam: float = bounded(0.75, at_least=0, at_most=1)
    kl: float = bounded(0.5, at_least=0, at_most=10**6)  # weight of the divergence in the VAE's loss
    polyak: float = bounded(0.01, at_least=0, at_most=1)  # how far target networks move in an update
    # --- TD3+BC, IQL, AWAC
    alpha: float = bounded(2.5, at_least=0, at_most=10**6)  # TD3+BC: weight of Q
    expectile: float = bounded(0.7, at_least=0, at_most=1)  # IQL: V is this expectile of Q
    temperature: float = bounded(1.0, at_least=0, at_most=10**6)  # IQL: factor of the advantage in the exponent
    awac_lam: float = bounded(1.0, above=0, at_most=10**6)  # AWAC: divisor of the advantage in the exponent
    # --- evaluation
    fqe_steps: int = bounded(2000, at_least=0, at_most=10**9)  # of fitted Q evaluation, but at most --steps
    fqe_batch: int = bounded(256, at_least=1, at_most=10**6)  # rows of an update
    fqe_polyak: float = bounded(0.05, at_least=0, at_most=1)  # how far its target network moves in an update
    # updates between two points of the curves; each plays --eval-episodes
    eval_every: int = bounded(500, at_least=1, at_most=10**9)
    eval_episodes: int = bounded(20, at_least=2, at_most=10_000)  # episodes of an evaluation
    # an episode is truncated there if its environment has no time limit
    max_episode_steps: int = bounded(1000, at_least=1, at_most=10**6)
    # ---

    @classmethod
    def toy(cls) -> "Config":
        return cls(steps=2500, discrete_sets="expert", continuous_sets="mixed", compared="bc,awac", sweep_sets="medium",
                   sweep="0,0.3,1", sweep_steps=1000, fqe_steps=500, eval_every=500, eval_episodes=10)  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in parts(self.compared):
            if name not in COMPARED:
                raise UserError(f"--compared: '{name}' is not one of {', '.join(COMPARED)}")
        for text in parts(self.sweep):
            try:
                within = 0 <= float(text) <= 1
            except ValueError:
                within = False
            if not within:
                raise UserError(f"--sweep: '{text}' is not a threshold between 0 and 1")
        for key in ("envs", "discrete_sets", "continuous_sets", "sweep_sets", "sweep", "compared"):
            named = parts(getattr(self, key))
            if twice := next((name for name in named if named.count(name) > 1), None):
                raise UserError(f"--{config.dashed(key)}: '{twice}' is there twice")
        if self.env_arg and (self.data is None or self.alone):
            raise UserError("--env-arg is for the environment of --data's steps: it needs --data and --envs")
        offline_files.check_format(self.data_format)
        alone = {"--states": self.states, "--action-low": self.action_low, "--action-high": self.action_high}
        log_alone.check_settings(self.alone, alone, self.fqe_steps)
        if not (parts(self.envs) or self.alone):
            raise UserError("--envs names no environment")
        if self.data is not None and not self.alone and len(parts(self.envs)) != 1:
            raise UserError(
                "--data holds the steps of one environment: name it with --envs, or learn from the log alone with "
                "--envs none"
            )

    @property
    def alone(self) -> bool:
        """Whether a log is learned from without its environment."""
        return self.data is not None and self.envs.strip() == "none"


def parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip() not in ("", "none")]


def continuous_cloning(cfg: Config, obs_dim: int, action_dim: int) -> Cloning:
    high = torch.ones(action_dim)
    return Cloning(Deterministic(obs_dim, [cfg.hidden, cfg.hidden], -high, high), cfg.lr)


# What continuous BCQ is compared with: --compared.
COMPARED: dict[str, Callable[[Config, int, int], OfflineLearner]] = {
    "bc": continuous_cloning, "td3": TD3, "td3_bc": TD3BC, "iql": IQL, "awac": AWAC
}  # fmt: skip


def main(cfg: Config, run: Run) -> dict[str, Any]:
    found: dict[str, Found] = {}
    limit = environments.EpisodeLimit(cfg.max_episode_steps, run.print)
    if cfg.alone:
        task = task_of_log_alone(cfg, run)
        found[task.name] = (compare_continuous if task.data.continuous else compare_discrete)(cfg, run, task)
    for env in parts(cfg.envs):
        envs = environments.make(env, cfg.eval_episodes, episode_limit=limit, args=cfg.env_arg)
        continuous = envs[0].continuous
        if cfg.data:
            tasks = [task_of_file(cfg, run, envs, env)]
        else:
            sets = parts(cfg.continuous_sets if continuous else cfg.discrete_sets)
            tasks = [generated_task(cfg, run, envs, env, quality) for quality in sets]
        for task in tasks:
            found[task.name] = (compare_continuous if continuous else compare_discrete)(cfg, run, task)
            report(cfg, run, task, found[task.name])
        if not (continuous or cfg.data):
            for quality in parts(cfg.sweep_sets):
                sweep(cfg, run, generated_task(cfg, run, envs, env, quality))
    if cfg.steps:
        plots.plot_returns(run)
        plots.plot_values(run)
        plots.plot_evaluations(run, found)
        plots.plot_sweep(run)
    return limit.summary()


# --- Comparisons


def compare_discrete(cfg: Config, run: Run, task: Task) -> Found:
    """DQN, cloning and BCQ, from the same initial weights and on the same batches."""
    separate, networks = (q_and_imitator(cfg, run, task.spaces, shared) for shared in (False, cfg.shared))
    assert isinstance(separate.imitator, type(separate.q))
    learners: dict[str, OfflineLearner] = {
        "dqn": DQN(cfg, separate.q),
        "bc": Cloning(separate.imitator, cfg.lr, cfg.beta),
        "bcq": bcq_discrete.BCQ(cfg, networks, cfg.tau),
    }
    return train_all(cfg, run, task, learners)


def q_and_imitator(cfg: Config, run: Run, spaces: Spaces, shared: bool) -> QAndImitator:
    run.seed("networks")
    return QAndImitator(spaces.observed, spaces.action_dim, cfg.hidden, shared)


def compare_continuous(cfg: Config, run: Run, task: Task) -> Found:
    """BCQ and the methods of --compared, on the same batches."""
    learners: dict[str, OfflineLearner] = {}
    for name in ["bcq", *parts(cfg.compared)]:
        run.seed("networks")
        make = bcq_continuous.BCQ if name == "bcq" else COMPARED[name]
        learners[name] = make(cfg, task.spaces.obs_dim, task.spaces.action_dim)
    found = train_all(cfg, run, task, learners)
    bcq = learners["bcq"]
    assert isinstance(bcq, bcq_continuous.BCQ)
    check_proposals(cfg, run, task, bcq)
    return found


def train_all(cfg: Config, run: Run, task: Task, learners: dict[str, OfflineLearner]) -> Found:
    """One learner after the other, each on the same batches; then fitted Q evaluation of some."""
    train = bcq_continuous.train if task.data.continuous else bcq_discrete.train
    returns = task.data.returns()
    if not task.held:
        run.print(f"{task.name}: {len(task.data):,} steps" + (f", mean return {fmean(returns):.1f}" if returns else ""))
    found: Found = {}
    for name, learner in learners.items():
        found[name] = train(cfg, run, task, name, learner)
        if "return" in found[name]:
            run.print(f"{task.name}_{name}: {found[name]['return']:.1f}")
    estimates: dict[str, torch.Tensor] = {}
    names = [name for name in EVALUATED if name in learners] if cfg.steps and cfg.fqe_steps else []
    if task.held:
        names = [*learners, *([log_alone.BEHAVIOR] if len(task.held.followed) else [])]
    for i in run.steps(len(names), {"estimates": estimates}, phase=f"{task.name}_fqe"):
        estimates[names[i]] = fitted_q_evaluation(cfg, run, task, learners.get(names[i]))
        run.log(i, estimate=estimates[names[i]].mean())
    for name, estimate in estimates.items():
        found.setdefault(name, {})["fqe"] = estimate.mean().item()
    if task.held:
        if task.held.returns:
            found.setdefault(log_alone.BEHAVIOR, {})["true"] = fmean(task.held.returns)
        believed = {name: f["believed"] for name, f in found.items() if "believed" in f}
        log_alone.report(run, task.name, lambda key: f"fqe_{key}_{task.name}", "bcq", task.held, estimates, believed)
    return found


def sweep(cfg: Config, run: Run, task: Task) -> None:
    """Discrete BCQ's return at every threshold. Q and imitator are separate: 0 is then DQN and 1 cloning, bit for bit
    (test_either_end_of_the_threshold_is_dqn_or_cloning_to_the_last_bit)."""
    thresholds = [float(text) for text in parts(cfg.sweep)]
    for i in run.steps(len(thresholds) if cfg.steps else 0, task.limit, phase=f"{task.name}_sweep"):
        learner = bcq_discrete.BCQ(cfg, q_and_imitator(cfg, run, task.spaces, shared=False), thresholds[i])
        for step in range(min(cfg.sweep_steps, cfg.steps)):
            learner.update(task.steps.sample(cfg.batch, run.generator("batch", step)))
        run.log(i, tau=thresholds[i], **{"return": evaluate(cfg, run, task, learner)["return"]})


def check_proposals(cfg: Config, run: Run, task: Task, bcq: bcq_continuous.BCQ) -> None:
    """Mean distance of the VAE's proposals from the logged actions in the same states, and that of uniform actions."""
    rows = torch.randperm(len(task.steps), generator=run.generator("places"))[:2000]
    some, rng = task.steps[rows], run.generator("proposals")
    with torch.no_grad():
        proposed = bcq.cvae.propose(some.observations, 1, rng)[:, 0]
    uniform = 2 * torch.rand(proposed.shape, generator=rng) - 1
    for name, actions in (("proposal", proposed), ("uniform", uniform)):
        distances = (actions - some.actions).abs().flatten().tolist()
        run.check(f"{name}_distance_{task.name}", fmean(distances), error=standard_error(distances))
    if cfg.steps:
        chosen = bcq.act(some.observations, rng)
        plots.plot_candidates(run, task.name, task.scale.original(some.observations), some.actions, proposed, chosen)


# --- Results


def bar(cfg: Config, task: Task, method: str) -> tuple[float | None, bool]:
    """(target, higher) of a method's return on a generated set, relative to the return of the data. On narrow data the
    naive method has to fail. On data of one's own BCQ's target is the return of the data."""
    behavior = task.behavior
    if behavior is None:
        return None, True
    if not cfg.data:
        balance, swing = RETURN_RANGE["CartPole-v1"], RETURN_RANGE["Pendulum-v1"]
        targets = {
            ("cartpole_expert", "dqn"): (behavior - 0.75 * balance, False),
            ("cartpole_expert", "bcq"): (behavior - 0.5 * balance, True),
            ("cartpole_random", "bcq"): (2 * behavior, True),
            ("pendulum_expert", "td3"): (behavior - 0.3 * swing, False),
            ("pendulum_expert", "bcq"): (behavior - 0.25 * swing, True),
            ("pendulum_mixed", "bcq"): (behavior + 0.2 * abs(behavior), True),
        }
        if (task.name, method) in targets:
            return targets[task.name, method]
    return (behavior if method == "bcq" else None), True


def report(cfg: Config, run: Run, task: Task, found: Found) -> None:
    """Headline results: BCQ's return, and on narrow data its overestimation. All other figures are checks.

    BCQ's return is compared with the naive method's on narrow data, else with cloning's (discrete) or the data's."""
    naive = "td3" if task.data.continuous else "dqn"
    narrow = task.name.endswith("_expert") and not cfg.data
    baseline = task.behavior if task.data.continuous else found["dqn" if narrow else "bc"]["return"]
    for method, f in found.items():
        name, value, error = f"return_{method}_{task.name}", f["return"], f["return_error"]
        target, higher = bar(cfg, task, method)
        if method == "bcq":
            run.result(name, value, error=error, baseline=baseline, target=target)
        elif higher:
            run.check(name, value, error=error, at_least=target)
        else:
            run.check(name, value, error=error, at_most=target)
    if task.comparable:
        report_values(run, task.name, found["bcq"], found.get(naive), naive, narrow)


def report_values(
    run: Run, name: str, bcq: dict[str, float], naive: dict[str, float] | None, naive_name: str, narrow: bool
) -> None:
    """believed − true. On narrow data the naive method's has to be above 0 and BCQ's below the naive method's, each by
    three standard errors."""
    value, error = bcq["overestimate"], bcq["overestimate_error"]
    if naive:
        other, other_error = naive["overestimate"], naive["overestimate_error"]
        run.check(
            f"overestimate_{naive_name}_{name}", other, error=other_error, at_least=3 * other_error if narrow else None
        )
    if naive and narrow:
        bound = other - 3 * math.hypot(other_error, error)
        run.result(f"overestimate_bcq_{name}", value, error=error, baseline=other, target=bound, higher=False)
    else:
        run.check(f"overestimate_bcq_{name}", value, error=error)
    run.check(f"true_bcq_{name}", bcq["true"], error=bcq["true_error"])
    if "fqe" in bcq:
        run.check(f"fqe_bcq_{name}", bcq["fqe"])
