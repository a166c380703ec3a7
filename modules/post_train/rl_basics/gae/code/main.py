"""Generalized advantage estimation: what λ trades, why truncation is not termination, the sum five ways, PPO by λ.

    δ_t = r_t + γ · (1 − terminated_t) · V(next state of t) − V_t        A_t = Σ_k (γλ)^k δ_{t+k}

Schulman et al. 2016 (arXiv:1506.02438). The MDP is small enough to know V and A of the policy exactly. One file a
question: bias_variance.py, time_limits.py, variants.py and ppo.py. The README explains every metric.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune import optim
from finetune.errors import UserError
from finetune.rl.envs import environments
from finetune.rl.envs.rollout import numpy_generator
from finetune.rl.statistics import Moments
from finetune.rl.tabular import mdp as tables
from finetune.rl.tabular.mdp import MDP, evaluate
from finetune.rl.tabular.sample import sample_tabular
from finetune.runs import config
from finetune.runs.run import Run

from . import bias_variance, plots, ppo, variants
from .bias_variance import expected_advantages
from .time_limits import learn, one_batch_error, truncation_as_termination

VALUE_ERRORS = ("value_rmse", "value_rmse_truncation_as_termination")


@dataclass
class Config(config.Config):
    threads: int = 1  # networks so small are fastest on one
    steps: int = 300  # batches of rollouts
    checkpoint_every: int = 100
    shuffle_rewards: bool = False  # control: rewards of a batch (PPO: advantages) are permuted: nothing to learn
    # --- Random MDP
    data: Path | None = None  # an MDP in an npz, as the module mdp reads it; none: a random one from the seed
    states: int = config.bounded(20, at_least=1, at_most=2000)  # in addition to the terminal one
    actions: int = config.bounded(3, at_least=1, at_most=1000)
    branching: int = config.bounded(2, at_least=1, at_most=1000)  # states that a pair may lead to
    # how far a step may go on the ring of states: the smaller, the longer a value matters
    reach: int = config.bounded(3, at_least=1, at_most=1000)
    ending: float = config.bounded(0.02, at_least=0, at_most=1)  # probability that a step ends the episode
    gamma: float = config.bounded(0.95, at_least=0, below=1)  # below 1, as what a time limit cuts off has to fade
    # --- Bias and variance
    lams: str = "0,0.5,0.8,0.9,0.95,0.99,1"  # rising, separated by commas
    length: int = config.bounded(64, at_least=1, at_most=10**6)  # steps of a rollout
    # rollouts a batch from each pair of state and action
    samples: int = config.bounded(32, at_least=1, at_most=10**6)
    # the half-learned critic: this many sweeps of policy evaluation from zero
    sweeps: int = config.bounded(2, at_least=0, at_most=10**6)
    # --- Time limits
    rows: int = config.bounded(64, at_least=1, at_most=10**6)  # rollouts a batch that the critics learn from
    limit: int = config.bounded(10, at_least=1, at_most=10**6)  # time limit of their episodes
    lam: float = config.bounded(0.9, at_least=0, at_most=1)  # of the critics' targets, the λ-returns
    lr: float = config.bounded(1.0, at_least=0, at_most=1)  # of the critics at the start; a cosine falls to a tenth
    # --- PPO
    ppo_updates: int = config.bounded(40, at_least=0, at_most=10**6)  # of a training, but at most --steps
    ppo_lams: str = "0,0.5,0.95,1"  # separated by commas
    ppo_repeats: int = config.bounded(5, at_least=0, at_most=1000)  # trainings with each λ; 0: none
    ppo_env: str = "CartPole-v1"  # a gymnasium id, or an environment of your own (actor_critic's README)
    # keyword arguments of --ppo-env, such as is_slippery=false; may be given several times
    env_arg: tuple[str, ...] = ()
    ppo_envs: int = config.bounded(8, at_least=1, at_most=1000)  # environments in parallel
    # steps after which an episode is truncated if its environment sets no time limit
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
    # --- Variants
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


def main(cfg: Config, run: Run) -> dict[str, Any]:
    mdp = load(cfg, run)
    policy = tables.uniform(mdp)
    exact = tables.solve(mdp, policy)
    critics = {"exact": exact, "half_learned": evaluate(mdp, policy, np.zeros(len(exact)), cfg.sweeps)}
    counted = mdp.allowed & ~mdp.terminal[:, None]  # (S, A)
    pairs = np.argwhere(counted)  # (P, 2)
    inner = torch.from_numpy(~mdp.terminal)
    learned = {name: torch.zeros(len(exact), dtype=torch.float64) for name in VALUE_ERRORS}
    moments = Moments(len(critics) * len(cfg.lambdas), counted.size)
    expected = {
        name: np.stack([expected_advantages(mdp, policy, V, lam, cfg.length).ravel() for lam in cfg.lambdas])
        for name, V in critics.items()
    }  # (λ, S·A)

    def rmse(V: Tensor) -> float:
        return float((V - torch.from_numpy(exact))[inner].square().mean().sqrt())

    for step in run.steps(cfg.steps, {"critics": learned, "moments": moments}):
        rng = numpy_generator(run, "rollout", step)
        starts = rng.choice(len(exact), cfg.rows, p=mdp.start)
        rollout = sample_tabular(mdp, policy, cfg.length, starts, rng, limit=cfg.limit)
        if cfg.shuffle_rewards:
            rollout.rewards = rollout.rewards.flatten()[torch.from_numpy(rng.permutation(rollout.rewards.numel()))]
            rollout.rewards = rollout.rewards.view(rollout.terminated.shape)
        lr = optim.cosine(step, cfg.steps, 0, cfg.lr, cfg.lr / 10)
        for name, seen in zip(VALUE_ERRORS, (rollout, truncation_as_termination(rollout)), strict=True):
            learn(learned[name], seen, cfg.gamma, cfg.lam, lr)

        first = np.tile(pairs, (cfg.samples, 1))  # exploring starts: every pair begins equally many rollouts
        rollout = sample_tabular(mdp, policy, cfg.length, first[:, 0], rng, actions=first[:, 1])
        A = bias_variance.estimates(rollout, list(critics.values()), cfg)
        moments.add(torch.from_numpy(first @ [counted.shape[1], 1]), A)
        means = moments.mean().reshape(len(critics), -1, counted.size)[:, 0]  # of each critic, at the first λ
        bias = np.sqrt(((means - expected["exact"][0])[:, counted.ravel()] ** 2).mean(-1))
        errors = {name: rmse(V) for name, V in learned.items()}
        run.log(step, **errors, lr=lr, bias_exact_v=bias[0], bias_half_learned_v=bias[1])

    right, wrong = (rmse(learned[name]) for name in VALUE_ERRORS)
    random = cfg.data is None
    bar = one_batch_error(cfg, mdp, policy, exact, numpy_generator(run, "visits")) if random else None
    run.result(VALUE_ERRORS[0], right, baseline=float(exact[~mdp.terminal].std()), target=bar, higher=False)
    run.result(VALUE_ERRORS[1], wrong, baseline=right, target=3 * right if random else None)
    if cfg.steps:
        bias_variance.report(cfg, run, policy, counted, moments, expected, float(abs(exact).max()))
        plots.time_limits(cfg, run, exact[~mdp.terminal], {n: V[inner].numpy() for n, V in learned.items()})
    variants.report(cfg, run)
    if not cfg.ppo_repeats:
        return {}
    limit = environments.EpisodeLimit(cfg.max_episode_steps, run.print)
    trained = ppo.compare(cfg, run, limit)
    if min(cfg.steps, cfg.ppo_updates):
        plots.ppo_lambda(cfg, run, trained, cfg.ppo_horizon * cfg.ppo_envs, ppo.SOLVED)
    return limit.summary()


def load(cfg: Config, run: Run) -> MDP:
    if cfg.data is not None:
        return tables.load(cfg.data, cfg.gamma, run.print)
    rng = np.random.default_rng(run.generator("mdp").initial_seed())
    return tables.garnet(
        cfg.states, cfg.actions, cfg.branching, rng, cfg.gamma, reach=cfg.reach, mean=1.0, ending=cfg.ending
    )
