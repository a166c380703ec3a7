"""Conservative Q-learning: what can be learned from logged steps alone. Reads top to bottom.

    loss = TD + α · E_data[ log Σ_a exp Q(s, a) − Q(s, a_data) ]

Kumar et al. 2020 (arXiv:2006.04779), with behavior cloning and Q-learning that is not conservative beside it, on the
same batches, and fitted Q evaluation of what was learned. The README explains every metric and every choice.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor

from finetune.errors import UserError, nearest
from finetune.rl.agents.networks import Deterministic, QNetwork, SquashedGaussian, TwinQ
from finetune.rl.agents.offline import FQE, normalized, paid, possible_returns
from finetune.rl.envs import environments, logged_data
from finetune.rl.envs.environments import action_bounds
from finetune.rl.envs.evaluation import returns, true_returns
from finetune.rl.envs.logged_data import Dataset
from finetune.rl.envs.replay import Transitions
from finetune.rl.envs.rollout import episode_seeds
from finetune.rl.statistics import mean_and_error, standard_error
from finetune.runs import config
from finetune.runs.config import bounded
from finetune.runs.display import uncertain

from . import continuous, discrete, plots

# Name of a set → its environment and quality.
SETS = {
    **{name: ("CartPole-v1", name) for name in ("expert", "random", "medium", "mixed")},
    **{f"pendulum_{name}": ("Pendulum-v1", name) for name in ("expert", "random", "medium", "mixed")},
}
LEARNERS = ("bc", "naive", "cql")
# Mean returns of the random and the expert policy, a score of 0 and of 100.
SCALE = {"CartPole-v1": (22.0, 500.0), "Pendulum-v1": (-1200.0, -150.0)}
TAIL = 150  # states so near a time limit are left out where values are compared with what came after them
FQE_TAU = 0.05


@dataclass
class Config(config.Config):
    steps: int = 60  # of each data set; one is `updates` updates of every learner
    checkpoint_every: int = 10
    threads: int = 1  # networks so small are fastest on one
    updates: int = bounded(100, at_least=1, at_most=10**6)  # of a step
    sets: str = "expert,random,mixed,pendulum_mixed"  # to learn from, separated by commas
    data: Path | None = None  # an npz of your own steps in their place (finetune/rl/envs/logged_data.py has the fields)
    env: str = "CartPole-v1"  # with --data: where they come from, and where what was learned is judged
    data_steps: int = bounded(50_000, at_least=100, at_most=10**7)  # of a set made here; of an expert's a twenty-fifth
    hidden: int = bounded(64, at_least=1, at_most=8192)  # width of the two hidden layers of every network
    batch: int = bounded(256, at_least=2, at_most=10**6)
    batch_continuous: int = bounded(64, at_least=2, at_most=10**6)  # the same for continuous actions
    lr: float = bounded(1e-3, at_least=0, at_most=10)  # Adam's, falling to 0
    gamma: float = bounded(0.98, at_least=0, below=1)
    gamma_continuous: float = bounded(0.9, at_least=0, below=1)  # the same for continuous actions
    tau: float = bounded(0.01, at_least=0, at_most=1)  # how far the target network moves in an update
    # weight of the conservative term (the min-Q weight); 0: as the naive learner
    alpha: float = bounded(0.5, at_least=0, at_most=10**6)
    alpha_continuous: float = bounded(0.2, at_least=0, at_most=10**6)  # the same for continuous actions
    # learn α, so that the gap comes to this (CQL-Lagrange)
    threshold: float | None = bounded(None, at_least=-(10**6), at_most=10**6)
    rho: bool = False  # CQL(ρ) with the policy for ρ in place of CQL(H)
    # continuous: actions of each of the three kinds that stand for the integral
    samples: int = bounded(5, at_least=1, at_most=1000)
    backup: Literal["soft", "plain", "max"] = "soft"  # continuous: V(s') with entropy, without, the best of `samples`
    warm_start: int = bounded(0, at_least=0, at_most=10**9)  # continuous: so many first updates clone the behavior
    calibrated: bool = False  # continuous: Cal-QL, values are pushed down no further than to the behavior's returns
    # what the largest reward of the data counts as in learning, with discrete and with continuous actions: a size of
    # values at which α and the learning rate hold, whatever unit the rewards have
    reward_scale: float = bounded(1.0, above=0, at_most=10**6)
    reward_scale_continuous: float = bounded(1.6, above=0, at_most=10**6)
    # of fitted Q evaluation after each set, again of `updates` updates; 0: without it
    fqe_steps: int = bounded(30, at_least=0, at_most=10**6)
    eval_every: int = bounded(10, at_least=1, at_most=10**9)  # steps between two evaluations
    eval_episodes: int = bounded(20, at_least=2, at_most=10_000)
    # an episode is cut off there if its environment has no time limit of its own
    max_episode_steps: int = bounded(1000, at_least=1, at_most=10**6)
    shuffle_actions: bool = False  # control: the actions of a set are dealt out anew, so there is nothing to learn

    @classmethod
    def toy(cls) -> "Config":
        # A short horizon and a quick target, so that values are handed back as far as they go (see `passed_on`).
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
        if self.threshold is not None and min(self.alpha, self.alpha_continuous) == 0:
            raise UserError("--threshold learns α from where it starts: --alpha must be above 0")


def main(cfg: Config, run) -> dict[str, Any]:
    names = ["data"] if cfg.data else cfg.sets.split(",")
    found: dict[str, dict[str, Estimate]] = {}
    cut = environments.EpisodeLimit(cfg.max_episode_steps, run.print)
    for name in names:
        task = prepare(cfg, run, name, cut)
        learners = learn(cfg, run, task)
        found[name] = estimate(cfg, run, task, learners)
        judge(cfg, run, task, found[name])
    if cfg.steps:
        plots.learning(run, names, LEARNERS)
        plots.gaps(run, names)
        plots.values(run, found)
    return cut.summary()


@dataclass
class Task:
    name: str
    data: Dataset
    steps: Transitions  # what is learned from: the data with rewards in their scale
    scale: float
    gamma: float
    batch: int
    envs: list[Any]  # to judge in, never to learn in
    comparable: bool  # whether the logs pay as these do
    seeds: list[int]  # of the evaluation's episodes: the same for every learner and step


def prepare(cfg: Config, run, name: str, cut: environments.EpisodeLimit) -> Task:
    env, quality = (cfg.env, "") if name == "data" else SETS[name]
    envs = environments.make(env, cfg.eval_episodes, episode_limit=cut)
    if cfg.data:
        data = logged_data.load(cfg.data)
    else:
        count = max(cfg.data_steps // (25 if quality == "expert" else 1), 100)
        data = logged_data.generate(env, quality, count, run.generator("data", name).initial_seed())
    data = data.fit(envs[0])
    if cfg.shuffle_actions:
        data.actions = data.actions[torch.randperm(len(data), generator=run.generator("shuffle", name))]
    largest, gamma, batch = cfg.reward_scale, cfg.gamma, cfg.batch
    if data.continuous:
        largest, gamma, batch = cfg.reward_scale_continuous, cfg.gamma_continuous, cfg.batch_continuous
    scale = largest / data.reward_size
    steps = replace(data.transitions(), rewards=data.rewards * scale)
    seeds = episode_seeds(run, cfg.eval_episodes, "evaluation", name)
    differ = paid(data.transitions(), envs[:5], seeds[:5]) if cfg.data else None
    if differ:
        run.print(f"{cfg.data.name}: {env} pays {differ[0]:.3g} a step where the logs say {differ[1]:.3g}: returns are "
                "the environment's, believed values the logs', and the two are not compared")  # fmt: skip
    return Task(name, data, steps, scale, gamma, batch, envs, differ is None, seeds)


# --- Learning


def learn(cfg: Config, run, task: Task) -> dict[str, Any]:
    """All learners on the same batches, from the same first weights."""
    learners = (continuous_learners if task.data.continuous else discrete_learners)(cfg, run, task.envs[0])
    to_go = task.data.returns_to_go(task.gamma) * task.scale
    state = {f"{key}_{part}": value for key, learner in learners.items() for part, value in learner.state.items()}
    for step in run.steps(cfg.steps, state | {"cut": task.envs[0].episode_limit}, phase=task.name):
        draw = run.generator("batches", task.name, step)
        rows = torch.randint(len(task.steps), (cfg.updates, task.batch), generator=draw)
        sums: dict[str, float] = {}
        for i, chosen in enumerate(rows):
            batch = task.steps[chosen]
            for key, learner in learners.items():
                for optimizer in learner.optimizers:
                    optimizer.param_groups[0]["lr"] = cfg.lr * (1 - (step + i / cfg.updates) / cfg.steps)
                for what, value in learner.update(batch, to_go[chosen], draw).items():
                    sums[f"{what}_{key}"] = sums.get(f"{what}_{key}", 0.0) + value / cfg.updates
        if (step + 1) % cfg.eval_every == 0 or step + 1 == cfg.steps:
            for key, learner in learners.items():
                act = learner.acting(run.generator("evaluation", task.name, step))
                sums[f"return_{key}"] = fmean(returns(task.envs, act, task.seeds))
        run.log(step, **sums)
    return learners


def discrete_learners(cfg: Config, run, env: Any) -> dict[str, Any]:
    observations, actions, _ = environments.sizes(env)

    def network() -> QNetwork:
        run.seed("networks")
        return QNetwork(observations, actions, [cfg.hidden, cfg.hidden])

    common = {"gamma": cfg.gamma, "lr": cfg.lr, "tau": cfg.tau}
    return {
        "bc": discrete.Clone(network(), cfg.lr),
        "naive": discrete.QLearner(network(), alpha=0.0, **common),
        "cql": discrete.QLearner(network(), alpha=cfg.alpha, rho=cfg.rho, threshold=cfg.threshold, **common),
    }


def continuous_learners(cfg: Config, run, env: Any) -> dict[str, Any]:
    observations, actions, _ = environments.sizes(env)
    hidden, limits = [cfg.hidden, cfg.hidden], action_bounds(env)

    def networks() -> tuple[SquashedGaussian, TwinQ]:
        run.seed("networks")
        return SquashedGaussian(observations, hidden, *limits), TwinQ(observations, actions, hidden)

    run.seed("networks")
    clone = continuous.Clone(Deterministic(observations, hidden, *limits), cfg.lr)
    common = {"gamma": cfg.gamma_continuous, "lr": cfg.lr, "tau": cfg.tau}
    cql = continuous.ActorCritic(
        *networks(), alpha=cfg.alpha_continuous, samples=cfg.samples, backup=cfg.backup, rho=cfg.rho,
        threshold=cfg.threshold, calibrated=cfg.calibrated, warm_start=cfg.warm_start, **common,
    )  # fmt: skip
    return {"bc": clone, "naive": continuous.ActorCritic(*networks(), alpha=0.0, **common), "cql": cql}


# --- What was learned, what is believed of it, and what is true


@dataclass
class Estimate:
    """Of one learner. Values are discounted, in the environment's own rewards."""

    episodes: list[float]  # undiscounted returns
    true_each: Tensor  # discounted return of each episode
    believed_each: Tensor | None  # the learner's own value of its start; cloning has none
    fqe_each: Tensor | None  # fitted Q evaluation's
    values: Tensor | None  # the learner's own of states on the way, and
    to_go: Tensor  # what came after them

    @property
    def true(self) -> float:
        return float(self.true_each.mean())

    @property
    def believed(self) -> float | None:
        return None if self.believed_each is None else float(self.believed_each.mean())

    @property
    def fqe(self) -> float | None:
        return None if self.fqe_each is None else float(self.fqe_each.mean())

    def overestimate(self, other: "Estimate | None" = None) -> tuple[float, float]:
        """(mean of believed − true over the episodes, its standard error); with `other` what that is more than the
        other's, from the same starts."""
        assert self.believed_each is not None
        off = self.believed_each - self.true_each
        if other is not None:
            assert other.believed_each is not None
            off = off - (other.believed_each - other.true_each)
        return float(off.mean()), standard_error(off.tolist())


def estimate(cfg: Config, run, task: Task, learners: dict[str, Any]) -> dict[str, Estimate]:
    played = {}
    for key, learner in learners.items():
        act = learner.acting(run.generator("evaluation", task.name))
        played[key] = true_returns(task.envs, act, task.seeds, task.gamma)
    starts = played["bc"][0].observations[0]
    judged = fitted(cfg, run, task, learners, starts) if cfg.fqe_steps else {}
    found = {}
    for key, (rollout, to_go) in played.items():
        left = rollout.first_episode.flip(0).cumsum(0).flip(0)  # steps up to the end
        counted = rollout.first_episode & ((left > TAIL) | rollout.terminated.any(0))
        believed = values = None
        if key != "bc":
            believed = learners[key].value(starts) / task.scale
            values = learners[key].value(rollout.observations[counted]) / task.scale
        episodes = rollout.rewards.sum(0).tolist()
        fqe = judged[key] / task.scale if judged else None
        found[key] = Estimate(episodes, to_go[0], believed, fqe, values, to_go[counted])
    return found


def fitted(cfg: Config, run, task: Task, learners: dict[str, Any], starts: Tensor) -> dict[str, Tensor]:
    """Fitted Q evaluation of every learner's policy from the logged steps: its values of the `starts` (N,)."""
    hidden, judges, limits = [cfg.hidden, cfg.hidden], {}, possible_returns(task.steps.rewards, task.gamma)
    for key, learner in learners.items():
        policy = learner.policy_of(task.steps.next_observations)
        sizes = starts.shape[1], policy.shape[1]
        run.seed("fqe")
        q = TwinQ(*sizes, hidden, 1) if task.data.continuous else QNetwork(*sizes, hidden)
        judges[key] = FQE(q, task.steps, policy, gamma=task.gamma, lr=cfg.lr, tau=FQE_TAU, limits=limits)
    state = {f"{key}_{part}": value for key, judge in judges.items() for part, value in judge.state.items()}
    total = min(cfg.fqe_steps, cfg.steps)
    for step in run.steps(total, state, phase=f"{task.name}_fqe"):
        errors = dict.fromkeys(judges, 0.0)
        draw = run.generator("fqe", task.name, step)
        for i, chosen in enumerate(torch.randint(len(task.steps), (cfg.updates, task.batch), generator=draw)):
            for key, judge in judges.items():
                judge.optimizer.param_groups[0]["lr"] = cfg.lr * (1 - (step + i / cfg.updates) / total)
                errors[key] += judge.update(chosen) / cfg.updates
        run.log(step, **{f"td_error_{key}": value for key, value in errors.items()})
    return {key: judge.value(starts, learners[key].policy_of(starts)) for key, judge in judges.items()}


def passed_on(cfg: Config, gamma: float) -> float:
    """The part of a value without an end that reaches the starts: each update hands on `tau` of a step."""
    return 1 - gamma ** (cfg.steps * cfg.updates * cfg.tau)


def judge(cfg: Config, run, task: Task, found: dict[str, Estimate]) -> None:
    name, env = task.name, task.envs[0].name
    whole = task.data.returns()
    behavior = fmean(whole) if whole else None
    mean = {key: mean_and_error([e.episodes]) for key, e in found.items()}
    rows = []
    for key, e in found.items():
        value, error = mean[key]
        score = normalized(value, *SCALE[env]) if env in SCALE else None
        row = {"score": score, "believed": e.believed, "FQE": e.fqe}
        shown = {what: "–" if number is None else f"{number:.4g}" for what, number in row.items()}
        true = uncertain(e.true, standard_error(e.true_each.tolist()))
        rows.append({"learner": key, "return": uncertain(value, error), **shown, "true": true})
    told = "no whole episode" if behavior is None else f"return {behavior:.1f}"
    title = f"{name}: {len(task.data)} steps of {told}; values are discounted, of one without an end "
    run.table(f"{title}{passed_on(cfg, task.gamma):.0%} can have been handed on to the starts", rows)

    # Bars are relative to what the data earn and to how wrong the naive learner is. Data of one's own have none.
    part = {"expert": 0.5, "random": 3.0 if run.toy else 5.0}.get(name)
    target = None if part is None or behavior is None else part * behavior
    if name.startswith("pendulum") and behavior is not None:
        target = behavior + 0.2 * abs(behavior)
    beside = {"expert": "naive", "data": None}.get(name, "bc")
    bars = {"naive": {"target": behavior / 4 if name == "expert" else None, "higher": name != "expert"},
            "cql": {"target": target, "baseline": mean[beside][0] if beside else None}}  # fmt: skip
    for key, (value, error) in mean.items():
        run.result(f"return_{name}_{key}", value, error=error, **bars.get(key, {}))
    if name == "random":
        (ours, error), (theirs, other) = mean["cql"], mean["bc"]
        ratio = ours / theirs
        error = abs(ratio) * math.hypot(error / ours, other / theirs)
        run.result("cql_over_bc_random", ratio, error=error, target=3.0 if run.toy else 5.0)
    if not task.comparable:
        return
    naive, error = found["naive"].overestimate()
    certain = 3 * error if name == "expert" else None
    run.result(f"overestimate_{name}_naive", naive, error=error, target=certain)
    value, error = found["cql"].overestimate()
    least = None
    if name in ("expert", "random", "mixed"):  # below the naive learner's, by more than the noise of the difference
        least = naive - 3 * found["cql"].overestimate(found["naive"])[1]
    run.result(f"overestimate_{name}_cql", value, error=error, baseline=naive, target=least, higher=False)
    for key, e in found.items():
        if e.fqe_each is not None:
            off = e.fqe_each - e.true_each
            run.result(f"fqe_error_{name}_{key}", float(off.mean()), error=standard_error(off.tolist()))
