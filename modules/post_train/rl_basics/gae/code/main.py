"""Generalized advantage estimation: what λ trades, why a time limit is not an ending, and the same sum five ways.

    δ_t = r_t + γ · (1 − terminated_t) · V(next state of t) − V_t        A_t = Σ_k (γλ)^k δ_{t+k}

Schulman et al. 2016 (arXiv:1506.02438). The MDP is small enough to know V and A of the policy exactly, so that bias and
variance are measured and not argued; what λ is worth to a learner, PPO shows (ppo.py). The README explains every metric
and every choice.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune import ops, optim
from finetune.errors import UserError
from finetune.rl.envs import environments
from finetune.rl.envs.rollout import Rollout, numpy_generator
from finetune.rl.statistics import Moments, chi_square_z, critical_z, gradient_bias, gradient_bias_interval
from finetune.rl.tabular import mdp as tables
from finetune.rl.tabular.mdp import MDP, evaluate
from finetune.rl.tabular.sample import sample_tabular
from finetune.runs import config

from . import plots, ppo
from .variants import VARIANTS


@dataclass
class Config(config.Config):
    threads: int = 1  # networks so small are fastest on one
    steps: int = 300  # batches of rollouts
    checkpoint_every: int = 100
    data: Path | None = None  # an MDP in an npz, as the module mdp reads it; none: a random one that the seed gives
    states: int = config.bounded(20, at_least=1, at_most=2000)  # of the random MDP, besides the terminal one
    actions: int = config.bounded(3, at_least=1, at_most=1000)
    branching: int = config.bounded(2, at_least=1, at_most=1000)  # states that a pair may lead to
    # how far a step may go on the ring of states: the smaller, the longer a value matters
    reach: int = config.bounded(3, at_least=1, at_most=1000)
    ending: float = config.bounded(0.02, at_least=0, at_most=1)  # probability that a step ends the episode
    gamma: float = config.bounded(0.95, at_least=0, below=1)  # below 1, as what a time limit cuts off has to fade
    lams: str = "0,0.5,0.8,0.9,0.95,0.99,1"  # rising, separated by commas
    length: int = config.bounded(64, at_least=1, at_most=10**6)  # steps of a rollout
    # rollouts a batch from each pair of state and action, for bias and variance
    samples: int = config.bounded(32, at_least=1, at_most=10**6)
    # the half-learned critic: so many sweeps of policy evaluation from zero
    sweeps: int = config.bounded(2, at_least=0, at_most=10**6)
    rows: int = config.bounded(64, at_least=1, at_most=10**6)  # rollouts a batch that the critics learn from
    limit: int = config.bounded(10, at_least=1, at_most=10**6)  # time limit of their episodes
    lam: float = config.bounded(0.9, at_least=0, at_most=1)  # of the critics' targets, the λ-returns
    lr: float = config.bounded(1.0, at_least=0, at_most=1)  # of the critics at the start; a cosine falls to a tenth
    shuffle_rewards: bool = False  # control: rewards of a batch (ppo: advantages) are dealt out anew: nothing to learn
    ppo_updates: int = config.bounded(40, at_least=0, at_most=10**6)  # of a PPO training, but at most --steps
    ppo_lams: str = "0,0.5,0.95,1"  # that PPO is trained with, separated by commas
    ppo_repeats: int = config.bounded(5, at_least=0, at_most=1000)  # trainings with each λ; 0: none
    ppo_env: str = "CartPole-v1"  # a gymnasium id with vectors for observations
    ppo_envs: int = config.bounded(8, at_least=1, at_most=1000)  # side by side
    # an episode is cut off there if its environment has no time limit of its own
    max_episode_steps: int = config.bounded(1000, at_least=1, at_most=10**6)
    ppo_horizon: int = config.bounded(128, at_least=1, at_most=10**6)  # steps of each environment in an update
    ppo_epochs: int = config.bounded(5, at_least=1, at_most=1000)  # passes over them
    ppo_minibatches: int = config.bounded(8, at_least=1, at_most=10**6)  # of a pass
    ppo_gamma: float = config.bounded(0.98, at_least=0, at_most=1)
    ppo_lr: float = config.bounded(2e-3, at_least=0, at_most=10)  # Adam's, falling to 0
    ppo_clip: float = config.bounded(0.2, above=0, at_most=10**6)  # of the ratios
    ppo_value_weight: float = config.bounded(0.5, at_least=0, at_most=10**6)  # of the critic's loss
    ppo_entropy: float = config.bounded(0.0, at_least=0, at_most=10**6)  # weight of the entropy bonus
    ppo_max_norm: float = config.bounded(0.5, above=0, at_most=10**6)  # of the gradient
    ppo_hidden: int = config.bounded(64, at_least=1, at_most=8192)  # width of the two hidden layers
    # size at which the op and the loop in Python are timed
    bench_steps: int = config.bounded(2048, at_least=1, at_most=10**7)
    bench_rows: int = config.bounded(64, at_least=1, at_most=10**6)

    @classmethod
    def toy(cls) -> "Config":
        return cls(steps=60, samples=16, lams="0,0.5,0.9,1", bench_steps=256, bench_rows=16, ppo_updates=20,
                   ppo_lams="0,0.95", ppo_repeats=1)  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        found = self.lambdas
        if len(found) < 2 or sorted(set(found)) != found or not (found[0] >= 0 and found[-1] <= 1):
            raise UserError(f"--lams {self.lams}: at least two numbers from 0 to 1 are needed, rising")
        if not all(0 <= lam <= 1 for lam in self.ppo_lambdas):
            raise UserError(f"--ppo-lams {self.ppo_lams}: numbers from 0 to 1 are needed")

    @property
    def lambdas(self) -> list[float]:
        return numbers("lams", self.lams)

    @property
    def ppo_lambdas(self) -> list[float]:
        return numbers("ppo-lams", self.ppo_lams)


def numbers(key: str, words: str) -> list[float]:
    try:
        return [float(word) for word in words.split(",")]
    except ValueError:
        raise UserError(f"--{key} {words}: numbers separated by commas are needed") from None


def main(cfg: Config, run) -> dict[str, Any]:
    mdp = load(cfg, run)
    policy = tables.uniform(mdp)
    exact = tables.solve(mdp, policy)
    critics = {"exact": exact, "half_learned": evaluate(mdp, policy, np.zeros(len(exact)), cfg.sweeps)}
    counted = mdp.allowed & ~mdp.terminal[:, None]  # (S, A)
    pairs = np.argwhere(counted)  # (P, 2)
    inner = torch.from_numpy(~mdp.terminal)
    names = ("value_error", "value_error_limits_as_ends")
    learned = {name: torch.zeros(len(exact), dtype=torch.float64) for name in names}
    moments = Moments(len(critics) * len(cfg.lambdas), counted.size)
    expected = {
        name: np.stack([expected_advantages(mdp, policy, V, lam, cfg.length).ravel() for lam in cfg.lambdas])
        for name, V in critics.items()
    }  # (λ, S·A)

    def error(V: Tensor) -> float:
        return float((V - torch.from_numpy(exact))[inner].square().mean().sqrt())

    for step in run.steps(cfg.steps, {"critics": learned, "moments": moments}):
        draw = numpy_generator(run, "rollout", step)
        starts = draw.choice(len(exact), cfg.rows, p=mdp.start)
        rollout = sample_tabular(mdp, policy, cfg.length, starts, draw, limit=cfg.limit)
        if cfg.shuffle_rewards:
            rollout.rewards = rollout.rewards.flatten()[torch.from_numpy(draw.permutation(rollout.rewards.numel()))]
            rollout.rewards = rollout.rewards.view(rollout.terminated.shape)
        lr = optim.cosine(step, cfg.steps, 0, cfg.lr, cfg.lr / 10)
        learn(learned["value_error"], rollout, cfg.gamma, cfg.lam, lr)
        wrong = Rollout(**vars(rollout) | {"terminated": rollout.ends, "truncated": torch.zeros_like(rollout.ends)})
        learn(learned["value_error_limits_as_ends"], wrong, cfg.gamma, cfg.lam, lr)

        first = np.tile(pairs, (cfg.samples, 1))
        rollout = sample_tabular(mdp, policy, cfg.length, first[:, 0], draw, actions=first[:, 1])
        moments.add(torch.from_numpy(first @ [counted.shape[1], 1]), estimates(rollout, list(critics.values()), cfg))
        off = (moments.mean().reshape(len(critics), -1, counted.size)[:, 0] - expected["exact"][0])[:, counted.ravel()]
        biases = np.sqrt((off**2).mean(-1))  # of each critic, at the first λ
        run.log(
            step,
            **{name: error(V) for name, V in learned.items()},
            lr=lr,
            bias_exact_v=biases[0],
            bias_half_learned_v=biases[1],
        )

    spread, reached = float(exact[~mdp.terminal].std()), error(learned["value_error"])
    wrong, drawn = error(learned["value_error_limits_as_ends"]), cfg.data is None
    once = one_batch_error(cfg, mdp, policy, exact, numpy_generator(run, "visits")) if drawn else None
    run.result("value_error", reached, baseline=spread, target=once, higher=False)
    run.result("value_error_limits_as_ends", wrong, baseline=reached, target=3 * reached if drawn else None)
    found: dict[str, Any] = {}
    if cfg.steps:
        judge_lambda(cfg, run, policy, counted, moments, expected, float(abs(exact).max()))
        plots.time_limits(run, exact[~mdp.terminal], {n: V[inner].numpy() for n, V in learned.items()})
    judge_ways(cfg, run)
    if cfg.ppo_repeats:
        cut = environments.EpisodeLimit(cfg.max_episode_steps, run.print)
        trained = ppo.race(cfg, run, cut)
        found |= cut.summary()
        if min(cfg.steps, cfg.ppo_updates):
            plots.ppo_lambda(run, trained, cfg.ppo_horizon * cfg.ppo_envs, ppo.SOLVED)
    return found


# --- The two experiments


def learn(V: Tensor, rollout: Rollout, gamma: float, lam: float, lr: float) -> None:
    """V moves to the mean λ-return of each state that was seen: V(s) += lr · (mean − V(s))."""
    states, after = rollout.observations, rollout.next_observations
    _, returns = ops.gae(
        rollout.rewards, V[states], V[after], rollout.terminated, rollout.truncated, gamma=gamma, lam=lam
    )
    seen = torch.bincount(states.flatten(), minlength=len(V))
    total = torch.zeros_like(V).index_add_(0, states.flatten(), returns.flatten())
    V += torch.where(seen > 0, lr * (total / seen.clamp(min=1) - V), 0.0)


def one_batch_error(cfg: Config, mdp: MDP, policy: np.ndarray, V: np.ndarray, draw: np.random.Generator) -> float:
    """Root mean square over the states of the standard error that the mean return has after a single batch, if every
    return were complete and independent: √(σ²(s) / visits). What a critic that learns from many batches has to beat.

    σ² = E[(r + γ V(s') − V(s))²] + γ² E[σ²(s')]: the variance of a return (Sobel 1982).
    """
    P, _ = tables.under(mdp, policy)
    surprise = (mdp.rewards + mdp.gamma * V - V[:, None, None]) ** 2
    one_step = (policy[:, :, None] * mdp.P * surprise).sum((1, 2)) * ~mdp.terminal
    variance = np.linalg.solve(np.eye(len(V)) - mdp.gamma**2 * P * ~mdp.terminal[:, None], one_step)
    starts = draw.choice(len(V), cfg.rows, p=mdp.start)
    seen = sample_tabular(mdp, policy, cfg.length, starts, draw, limit=cfg.limit).observations.flatten()
    visits = np.bincount(seen.numpy(), minlength=len(V)).clip(1)
    return float(np.sqrt((variance / visits)[~mdp.terminal].mean()))


def estimates(rollout: Rollout, critics: list[np.ndarray], cfg: Config) -> Tensor:
    """Â_0 of each row with each critic and λ: (critics · λ, N)."""
    found = []
    for V in map(torch.from_numpy, critics):
        given = (rollout.rewards, V[rollout.observations], V[rollout.next_observations])
        for lam in cfg.lambdas:
            advantages, _ = ops.gae(*given, rollout.terminated, rollout.truncated, gamma=cfg.gamma, lam=lam)
            found.append(advantages[0])
    return torch.stack(found)


def expected_advantages(mdp: MDP, policy: np.ndarray, V: np.ndarray, lam: float, steps: int) -> np.ndarray:
    """E[Â_0 | s, a] (S, A) of GAE over `steps` steps with the critic V, by dynamic programming: no sampling.

    A(s, a) = δ(s, a) + γλ Σ_s' P(s'|s, a) Σ_a' π(a'|s') A'(s', a') with A' over one step less, and none over no step.
    """
    deltas = mdp.R + mdp.gamma * mdp.P @ V - V[:, None]
    advantages = np.zeros_like(deltas)
    for _ in range(steps):
        advantages = deltas + mdp.gamma * lam * mdp.P @ (policy * advantages).sum(1)
    return advantages


# --- What is shown


def judge_lambda(
    cfg: Config, run, policy: np.ndarray, counted: np.ndarray, moments: Moments, expected: dict[str, np.ndarray],
    size: float,
) -> None:  # fmt: skip
    """Bias and variance of both critics over λ; the bias is the part that a policy gradient sees."""
    truth = expected["exact"]

    def split(values: np.ndarray) -> dict[str, np.ndarray]:  # (critics · λ, S·A) → name: (λ, S·A)
        return dict(zip(expected, values.reshape(len(expected), -1, values.shape[1]), strict=True))

    mean, chance = map(split, (moments.mean(), moments.variance_of_mean()))
    z = {name: chi_square_z(mean[name] - expected[name], chance[name], size).max() for name in expected}
    confused = chi_square_z(mean["half_learned"] - truth, chance["half_learned"], size).max()
    bar = critical_z(2 * len(cfg.lambdas))  # two critics at every λ
    run.result("exact_v_bias_z", z["exact"], baseline=confused, target=bar, higher=False)
    run.result("half_learned_v_expectation_z", z["half_learned"], target=bar, higher=False)
    bias = gradient_bias(expected["half_learned"] - truth, policy, counted)  # (λ,)
    measured = {n: gradient_bias_interval(mean[n] - truth, policy, counted, chance[n]) for n in expected}
    noise, noise_error = (
        dict(zip(expected, x.reshape(len(expected), -1), strict=True))
        for x in moments.average_variance(counted.ravel())
    )  # (λ,)
    drawn = cfg.data is None  # in a world of one's own neither has to hold
    falls, rises = growth(bias), growth(noise["half_learned"])
    run.result("bias_falls", falls.max(), target=1.0 if drawn else None, higher=False)
    run.result("variance_rises", rises.min(), target=1.0 if drawn else None)
    for which, k in (("first", 0), ("last", -1)):
        run.result(f"bias_at_the_{which}_lambda", bias[k])
        run.result(f"variance_at_the_{which}_lambda", noise["half_learned"][k], error=noise_error["half_learned"][k])
    plots.bias_variance(run, cfg.lambdas, bias, measured, noise)


def growth(values: np.ndarray) -> np.ndarray:
    """Each over the one before it; 1 where that is 0, as in a world without chance."""
    return np.divide(values[1:], values[:-1], out=np.ones(len(values) - 1), where=values[:-1] > 0)


def judge_ways(cfg: Config, run) -> None:
    """The sum five ways on random numbers with ends: that they agree, and how long the op and the loop take."""
    g = run.generator("ways")

    def numbers(steps: int, rows: int, dtype: torch.dtype) -> list[Tensor]:
        floats = [torch.randn(steps, rows, generator=g, dtype=dtype) for _ in range(3)]
        return [*floats, *(torch.rand(steps, rows, generator=g) < 0.03 for _ in range(2))]

    given = numbers(97, 5, torch.float64)
    want, _ = ops.gae(*given, gamma=cfg.gamma, lam=cfg.lam)
    differences = {name: float((way(*given, cfg.gamma, cfg.lam) - want).abs().max()) for name, way in VARIANTS.items()}
    scale = max(1.0, float(want.abs().max()))
    run.result("largest_difference", max(differences.values()) / scale, target=1e-12, higher=False)
    given = numbers(cfg.bench_steps, cfg.bench_rows, torch.float32)
    ways = {
        "op": lambda: ops.gae(*given, gamma=cfg.gamma, lam=cfg.lam),
        "recursion": lambda: VARIANTS["recursion"](*given, cfg.gamma, cfg.lam),
        "scan": lambda: VARIANTS["scan"](*given, cfg.gamma, cfg.lam),
    }
    took = dict.fromkeys(ways, math.inf)
    for _ in range(20):  # in turn, so that a busy machine is busy for all of them
        for name, way in ways.items():
            began = perf_counter()
            way()
            took[name] = min(took[name], perf_counter() - began)
    run.result("op_faster_than_recursion", took["recursion"] / took["op"], baseline=1.0)
    run.table(
        f"the same sum, five ways; times at {cfg.bench_steps} × {cfg.bench_rows} in fp32, of the op's",
        [
            {
                "way": name,
                "largest difference": f"{differences[name]:.1e}" if name in differences else "–",
                "time": f"{took[name] / took['op']:.0f} ×" if name in took else "–",
            }
            for name in ["op", *VARIANTS]
        ],
    )


def load(cfg: Config, run) -> MDP:
    if cfg.data is not None:
        return tables.load(cfg.data, cfg.gamma, run.print)
    draw = np.random.default_rng(run.generator("mdp").initial_seed())
    return tables.garnet(
        cfg.states, cfg.actions, cfg.branching, draw, cfg.gamma, reach=cfg.reach, mean=1.0, ending=cfg.ending
    )
