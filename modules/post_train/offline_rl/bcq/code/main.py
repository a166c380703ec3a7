"""Batch-constrained Q-learning: from logged steps, and only with actions that the logs contain. Reads top to bottom.

    discrete     a = argmax { Q(s, a) : G(a|s) ≥ τ max G(·|s) }                      τ = 0: DQN, τ = 1: cloning
    continuous   a = argmax Q(s, aᵢ + Φ ξ(s, aᵢ)),  aᵢ from a VAE of the data's actions

Fujimoto et al. 2018 and 2019 (arXiv:1812.02900, 1910.01708). The README explains every metric and every choice.
"""

import copy
import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from finetune.errors import UserError
from finetune.rl.agents.offline import paid
from finetune.rl.envs import environments, logged_data
from finetune.rl.envs.environments import action_bounds
from finetune.rl.envs.logged_data import Dataset
from finetune.rl.envs.replay import Transitions
from finetune.rl.envs.rollout import episode_seeds
from finetune.rl.statistics import standard_error
from finetune.runs import config
from finetune.runs.config import bounded

from . import continuous, discrete, plots
from .trial import Found, Scale, a_batch, evaluate, logged, train

SPAN = {"CartPole-v1": 480.0, "Pendulum-v1": 1050.0}  # from random actions to a good policy, in return


@dataclass
class Config(config.Config):
    steps: int = 3000  # updates of each method
    threads: int = 1  # networks so small are fastest on one
    checkpoint_every: int = 1000
    envs: str = "CartPole-v1,Pendulum-v1"  # one after the other, separated by commas
    # an npz of logged steps (README) of the one environment that --envs names; none: sets are made
    data: Path | None = None
    rows: int = bounded(10_000, at_least=100, at_most=10**7)  # of each set that is made
    discrete_sets: str = "expert,random"  # of CartPole, to train on
    continuous_sets: str = "mixed,expert"  # of Pendulum
    sweep_sets: str = "expert,medium,mixed"  # of CartPole, to go through the thresholds on; none: omit it
    sweep: str = "0,0.1,0.3,0.6,1"  # thresholds
    sweep_steps: int = bounded(2000, at_least=0, at_most=10**9)  # updates of each, but at most --steps
    gamma: float = bounded(0.97, at_least=0, at_most=1)  # a horizon that the values reach within --steps
    batch: int = bounded(64, at_least=1, at_most=10**6)  # discrete
    hidden: int = bounded(64, at_least=1, at_most=8192)  # width of the two hidden layers of every network
    lr: float = bounded(1e-3, at_least=0, at_most=10)  # Adam's, of every network
    # threshold of discrete BCQ: what is less likely than τ times the likeliest is never taken
    tau: float = bounded(0.3, at_least=0, at_most=1)
    beta: float = bounded(0.01, at_least=0, at_most=10**6)  # penalty on the imitator's squared logits
    shared: bool = True  # discrete BCQ: Q and imitator share all layers but the last
    target_every: int = bounded(50, at_least=1, at_most=10**9)  # discrete: steps between two copies to the target
    continuous_batch: int = bounded(64, at_least=1, at_most=10**6)
    compared: str = "bc,td3,td3_bc,iql,awac"  # with continuous BCQ; td3 is the naive way
    candidates: int = bounded(10, at_least=1, at_most=10_000)  # actions that the maximum of a target runs over
    act_candidates: int = bounded(100, at_least=1, at_most=10_000)  # the same when it acts
    phi: float = bounded(0.05, at_least=0, at_most=2)  # how far an action may be moved, of −1 … 1
    # weight of the smaller of two critics; the rest is that of the larger
    lam: float = bounded(0.75, at_least=0, at_most=1)
    kl: float = bounded(0.5, at_least=0, at_most=10**6)  # weight of the divergence in the VAE's loss
    polyak: float = bounded(0.01, at_least=0, at_most=1)  # continuous: part of the way that targets follow in a step
    alpha: float = bounded(2.5, at_least=0, at_most=10**6)  # TD3+BC: weight of Q
    expectile: float = bounded(0.7, at_least=0, at_most=1)  # IQL
    temperature: float = bounded(1.0, at_least=0, at_most=10**6)  # IQL: A is multiplied by it
    awac_lam: float = bounded(1.0, above=0, at_most=10**6)  # AWAC: A is divided by it
    # what the largest reward of the data counts as in learning, with discrete and with continuous actions: so the
    # learning rate and the temperatures hold, whatever unit the rewards have
    reward_scale: float = bounded(1.0, above=0, at_most=10**6)
    reward_scale_continuous: float = bounded(1.6, above=0, at_most=10**6)
    shuffle_actions: bool = False  # control: the logged actions are dealt out anew, so there is nothing to learn
    fqe_steps: int = bounded(2000, at_least=0, at_most=10**9)  # of fitted Q evaluation, but at most --steps
    fqe_batch: int = bounded(256, at_least=1, at_most=10**6)
    fqe_polyak: float = bounded(0.05, at_least=0, at_most=1)
    # steps between two points of the curves; each plays --eval-episodes
    eval_every: int = bounded(500, at_least=1, at_most=10**9)
    eval_episodes: int = bounded(20, at_least=2, at_most=10_000)
    # an episode is cut off there if its environment has no time limit of its own
    max_episode_steps: int = bounded(1000, at_least=1, at_most=10**6)

    @classmethod
    def toy(cls) -> "Config":
        return cls(steps=2500, discrete_sets="expert", continuous_sets="mixed", compared="bc,awac", sweep_sets="medium",
                   sweep="0,0.3,1", sweep_steps=1000, fqe_steps=500, eval_every=500, eval_episodes=10)  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in parts(self.compared):
            if name not in continuous.LEARNERS or name == "bcq":
                raise UserError(
                    f"--compared: '{name}' is not one of {', '.join(n for n in continuous.LEARNERS if n != 'bcq')}"
                )
        for text in parts(self.sweep):
            try:
                held = 0 <= float(text) <= 1
            except ValueError:
                held = False
            if not held:
                raise UserError(f"--sweep: '{text}' is no threshold within 0 and 1")
        for key in ("envs", "discrete_sets", "continuous_sets", "sweep_sets", "sweep", "compared"):
            named_ = parts(getattr(self, key))
            if twice := next((name for name in named_ if named_.count(name) > 1), None):
                raise UserError(f"--{config.dashed(key)}: '{twice}' is there twice")
        if not parts(self.envs):
            raise UserError("--envs names no environment")
        if self.data is not None and len(parts(self.envs)) != 1:
            raise UserError("--data holds the steps of one environment: name it with --envs")


def parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip() not in ("", "none")]


def main(cfg: Config, run) -> dict[str, Any]:
    found: dict[str, Found] = {}
    cut = environments.EpisodeLimit(cfg.max_episode_steps, run.print)
    for name in parts(cfg.envs):
        envs = environments.make(name, cfg.eval_episodes, episode_limit=cut)
        is_continuous = environments.sizes(envs[0])[2]
        compare = on_continuous if is_continuous else on_discrete
        sets = parts(cfg.continuous_sets if is_continuous else cfg.discrete_sets)
        for data in [given(cfg, run, name, envs)] if cfg.data else [made(cfg, run, name, quality) for quality in sets]:
            found[data.name] = compare(cfg, run, envs, data)
        if not (is_continuous or cfg.data):
            for quality in parts(cfg.sweep_sets):
                sweep(cfg, run, envs, made(cfg, run, name, quality))
    if cfg.steps:
        plots.returns(run)
        plots.values(run)
        plots.evaluations(run, found)
        plots.sweep(run)
    return cut.summary()


def made(cfg: Config, run, env: str, quality: str) -> Dataset:
    seed = run.generator("data", env, quality).initial_seed() % 2**31
    return named(logged_data.generate(env, quality, cfg.rows, seed), env)


def given(cfg: Config, run, name: str, envs: list[Any]) -> Dataset:
    data = logged_data.load(cfg.data).fit(envs[0])
    if differ := paid(data.transitions(), envs[:5], episode_seeds(run, len(envs[:5]), "paid")):
        run.print(
            f"{cfg.data.name}: {name} pays {differ[0]:.3g} a step where the logs say {differ[1]:.3g}: returns are "
            "the environment's, believed values the logs', and the two are not compared"
        )
        data = dataclasses.replace(data, comparable=False)
    return named(data, name)


def named(data: Dataset, env: str) -> Dataset:
    """CartPole-v1, expert → cartpole_expert; mine:My-World-v0, a log → my_world_a_log: phases, files and results begin
    so, whatever characters the names have."""
    words = [re.sub(r"[^a-z0-9]+", "_", part.lower()).strip("_") for part in (short(env), data.name)]
    return dataclasses.replace(data, name="_".join(words))


def short(env: str) -> str:
    """Without the module before the colon, the namespace and the version."""
    return re.sub(r"-v\d+$", "", env.split(":")[-1].split("/")[-1])


# --- Discrete actions


def on_discrete(cfg: Config, run, envs: list[Any], data: Dataset) -> Found:
    """DQN, cloning and BCQ, from the same weights and the same batches."""
    apart, networks = (discrete_networks(cfg, run, envs[0], shared) for shared in (False, cfg.shared))
    learners = {
        "dqn": discrete.DQN(cfg, apart.q),
        "bc": discrete.Cloning(cfg, apart.imitator),
        "bcq": discrete.BCQ(cfg, networks, cfg.tau),
    }
    scale = Scale(rewards=cfg.reward_scale / data.reward_size)
    behavior, found = train(cfg, run, envs, data, learners, scale, cfg.batch)
    for name in ("dqn", "bc"):
        judge(cfg, run, data, name, found, behavior)
    naive = found["dqn" if data.name == "cartpole_expert" else "bc"]["return"]
    judge(cfg, run, data, "bcq", found, behavior, baseline=naive)
    judge_values(cfg, run, data, found, "dqn")
    return found


def discrete_networks(cfg: Config, run, env: Any, shared: bool) -> discrete.Networks:
    run.seed("networks")
    return discrete.Networks(*environments.sizes(env)[:2], cfg.hidden, shared)


def sweep(cfg: Config, run, envs: list[Any], data: Dataset) -> None:
    """BCQ at every threshold, with Q and imitator apart: so its ends are DQN and cloning, to the last bit."""
    scale = Scale(rewards=cfg.reward_scale / data.reward_size)
    steps, taus = logged(cfg, run, data, scale), [float(text) for text in parts(cfg.sweep)]
    apart: dict[str, float] = {}
    for i in run.steps(
        len(taus) if cfg.steps else 0, {"apart": apart, "cut": envs[0].episode_limit}, phase=f"{data.name}_sweep"
    ):
        networks = discrete_networks(cfg, run, envs[0], shared=False)
        others = {
            0.0: discrete.DQN(cfg, copy.deepcopy(networks.q)),
            1.0: discrete.Cloning(cfg, copy.deepcopy(networks.imitator)),
        }
        learner, other = discrete.BCQ(cfg, networks, taus[i]), others.get(taus[i])
        for step in range(min(cfg.sweep_steps, cfg.steps)):
            batch = a_batch(run, steps, cfg.batch, step)
            learner.update(*batch)
            if other:
                other.update(*batch)
        run.log(i, tau=taus[i], **{"return": evaluate(cfg, run, envs, learner, scale)["return"]})
        if other:
            ours = networks.q if taus[i] == 0 else networks.imitator
            difference = ours(steps.observations) - other.networks(steps.observations)
            apart[f"{taus[i]:g}"] = difference.abs().max().item()
    for tau, other in (("0", "dqn"), ("1", "bc")):
        if tau in apart:
            run.result(f"tau_{tau}_from_{other}_{data.name}", apart[tau], target=0, higher=False)


# --- Continuous actions


def on_continuous(cfg: Config, run, envs: list[Any], data: Dataset) -> Found:
    scale = Scale.of(data, *action_bounds(envs[0]), cfg.reward_scale_continuous / data.reward_size)
    learners = {}
    for name in ["bcq", *parts(cfg.compared)]:
        run.seed("networks")
        learners[name] = continuous.LEARNERS[name](cfg, *environments.sizes(envs[0])[:2])
    behavior, found = train(cfg, run, envs, data, learners, scale, cfg.continuous_batch)
    judge(cfg, run, data, "bcq", found, behavior, baseline=behavior)
    for name in parts(cfg.compared):
        judge(cfg, run, data, name, found, behavior)
    proposals(cfg, run, learners["bcq"], logged(cfg, run, data, scale), data)
    judge_values(cfg, run, data, found, "td3")
    return found


def proposals(cfg: Config, run, learner: continuous.BCQ, steps: Transitions, data: Dataset) -> None:
    """What the VAE proposes where the data have been: how far from the logged action; baseline: uniform actions."""
    rows = torch.randperm(len(steps), generator=run.generator("places"))[:2000]
    some, generator = steps[rows], run.generator("proposals")
    with torch.no_grad():
        proposed = learner.cvae.propose(some.observations, 1, generator)[:, 0]
    uniform = 2 * torch.rand(proposed.shape, generator=generator) - 1
    near, far = ((actions - some.actions).abs().flatten().tolist() for actions in (proposed, uniform))
    run.result(f"proposal_distance_{data.name}", fmean(near), error=standard_error(near), baseline=fmean(far),
              higher=False)  # fmt: skip
    if cfg.steps:
        chosen = learner.act(some.observations, generator)
        plots.candidates(run, data.name, data.observations[rows], some.actions, proposed, chosen)


# --- What is judged


def bar(cfg: Config, name: str, method: str, behavior: float | None) -> tuple[float | None, bool]:
    """(target, higher) of a method's return on a set that is made here, relative to what the data earn. On narrow data
    the naive method has to fail. Of data of one's own only BCQ has a target: what they earn."""
    if behavior is None:
        return None, True
    if cfg.data:
        return behavior if method == "bcq" else None, True
    balance, swing = SPAN["CartPole-v1"], SPAN["Pendulum-v1"]
    return {
        ("cartpole_expert", "dqn"): (behavior - 0.75 * balance, False),
        ("cartpole_expert", "bcq"): (behavior - 0.5 * balance, True),
        ("cartpole_random", "bcq"): (2 * behavior, True),
        ("pendulum_expert", "td3"): (behavior - 0.3 * swing, False),
        ("pendulum_expert", "bcq"): (behavior - 0.25 * swing, True),
        ("pendulum_mixed", "bcq"): (behavior + 0.2 * abs(behavior), True),
    }.get((name, method), (behavior if method == "bcq" else None, True))


def judge(
    cfg: Config, run, data: Dataset, method: str, found: Found, behavior: float | None, baseline: float | None = None
) -> None:
    f, (target, higher) = found[method], bar(cfg, data.name, method, behavior)
    run.result(f"return_{method}_{data.name}", f["return"], error=f["return_error"], baseline=baseline, target=target,
              higher=higher)  # fmt: skip


def judge_values(cfg: Config, run, data: Dataset, found: Found, naive: str) -> None:
    """How much more than it then earns each believes in, and what fitted Q evaluation says of BCQ. On an expert's data
    the naive method's excess has to be above 0, and BCQ's below that one, by three standard errors."""
    if not data.comparable:
        return
    narrow = data.name.endswith("_expert") and not cfg.data
    ours, theirs = found["bcq"], found.get(naive)
    if theirs:
        least = 3 * theirs["excess_error"] if narrow else None
        run.result(f"excess_{naive}_{data.name}", theirs["excess"], error=theirs["excess_error"], target=least)
    most = (
        theirs["excess"] - 3 * math.hypot(theirs["excess_error"], ours["excess_error"]) if theirs and narrow else None
    )
    run.result(f"excess_bcq_{data.name}", ours["excess"], error=ours["excess_error"],
              baseline=theirs["excess"] if theirs else None, target=most, higher=False)  # fmt: skip
    run.result(f"true_bcq_{data.name}", ours["true"], error=ours["true_error"])
    if "fqe" in ours:
        run.result(f"fqe_bcq_{data.name}", ours["fqe"])
