"""Policy gradients compared: REINFORCE with four baselines, the natural gradient, TRPO, and off-policy weights.

    ∇J = E[ Σ_t γ^t ∇ log π(a_t|s_t) · (G_t − b_t) ]

One file for each: reinforce.py and baselines.py, trpo.py, off_policy.py, and the book's corridor.py. What is known
exactly is in exact_cases.py and variance.py. The README explains every metric.
"""

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from finetune.errors import UserError
from finetune.rl.envs import environments
from finetune.rl.envs.evaluation import returns
from finetune.rl.envs.rollout import episode_seeds
from finetune.rl.statistics import mean_and_error
from finetune.runs import config
from finetune.runs.run import Run

from . import corridor, exact_cases, off_policy, plots, reinforce, trpo, variance

METHODS = ("reinforce", "natural", "trpo")
BEST = 500.0  # return of CartPole-v1: its time limit


@dataclass
class Config(config.Config):
    threads: int = 1  # networks so small are fastest on one
    steps: int = 80  # updates of each method
    checkpoint_every: int = 20
    env: str = "CartPole-v1"  # a gymnasium id, or an environment of your own (actor_critic's README)
    # keyword arguments of --env, such as is_slippery=false; may be given several times
    env_arg: tuple[str, ...] = ()
    methods: str = ",".join(METHODS)  # which to train, separated by commas
    episodes: int = config.bounded(16, at_least=2, at_most=10_000)  # of an update
    # steps after which an episode is truncated if its environment sets no time limit
    max_episode_steps: int = config.bounded(1000, at_least=1, at_most=10**6)
    gamma: float = config.bounded(0.99, at_least=0, at_most=1)
    discount_correction: bool = False  # the factor γ^t of the theorem, which is usually omitted
    entropy: float = config.bounded(0.0, at_least=0, at_most=1000)  # weight of the entropy bonus
    hidden: int = config.bounded(64, at_least=1, at_most=8192)  # width of the two hidden layers of policy and value
    # evaluation episodes before and after training, with actions drawn as in training
    eval_episodes: int = config.bounded(50, at_least=2, at_most=10**5)
    # added to every reward that is learned from, not to those that are reported
    reward_shift: float = config.bounded(0.0, at_least=-1e6, at_most=1e6)
    shuffle_advantages: bool = False  # control: the advantages of a batch are permuted, so there is nothing to learn
    # --- Baseline
    baseline: Literal["none", "mean", "leave_one_out", "learned"] = "learned"
    value_lr: float = config.bounded(0.005, at_least=0, at_most=1000)  # of the learned baseline
    value_epochs: int = config.bounded(20, at_least=0, at_most=10**6)  # its steps an update, on the whole batch
    # --- REINFORCE
    lr: float = config.bounded(0.005, at_least=0, at_most=1000)  # Adam's, falling to a tenth
    reuse: int = config.bounded(1, at_least=1, at_most=10_000)  # steps on one batch
    correction: Literal["none", "step"] = "step"  # of the later steps: the ratio of each action's probabilities
    ratio_bound: float = config.bounded(2.0, above=0, at_most=10**6)  # the largest ratio
    # --- Natural gradient and TRPO
    delta: float = config.bounded(0.02, above=0, at_most=10**6)  # KL of a step, falling to a tenth
    damping: float = config.bounded(0.01, above=0, at_most=10**6)  # added to the Fisher matrix
    iterations: int = config.bounded(10, at_least=1, at_most=10_000)  # of conjugate gradients
    # --- Short corridor
    # updates, but at most five times --steps; 0: without the corridor
    corridor_steps: int = config.bounded(200, at_least=0, at_most=10**6)
    corridor_repeats: int = config.bounded(4, at_least=2, at_most=10_000)  # trainings with each baseline
    corridor_lr: float = config.bounded(2e-3, at_least=0, at_most=1000)  # plain gradient ascent
    # --- Exact cases
    # episodes that the gradient is estimated from where it is compared with the exact one
    score_episodes: int = config.bounded(100_000, at_least=1000, at_most=10**8)
    # updates' worth of episodes for the variance by baseline; 0: without it
    variance_groups: int = config.bounded(100, at_least=0, at_most=10**5)

    @classmethod
    def toy(cls) -> "Config":
        return cls(steps=16, methods="trpo", hidden=32, eval_episodes=20, corridor_repeats=2,
                   corridor_steps=80, score_episodes=20_000, variance_groups=40)  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 < self.variance_groups < 10:
            raise UserError(f"--variance-groups {self.variance_groups} is too small: it must be 0 or at least 10")
        for name in self.methods.split(","):
            if name not in METHODS:
                raise UserError(f"--methods: '{name}' is not one of {', '.join(METHODS)}")


def main(cfg: Config, run: Run) -> dict[str, Any]:
    limit = environments.EpisodeLimit(cfg.max_episode_steps, run.print)
    envs = environments.make(cfg.env, cfg.episodes, episode_limit=limit, args=cfg.env_arg)
    for method in cfg.methods.split(","):
        before = evaluate(cfg, run, reinforce.networks(cfg, run, envs)[0], envs, "before")
        policy = reinforce.train(cfg, run, envs) if method == "reinforce" else trpo.train(cfg, run, envs, method)
        report(cfg, run, method, before, evaluate(cfg, run, policy, envs, "after"))
    plots.learning(run, cfg)
    if cfg.corridor_steps:
        corridor.compare(cfg, run)
    variance.report(cfg, run, envs)
    exact_cases.check(run, cfg.score_episodes)
    off_policy.report(run, cfg.score_episodes)
    return limit.summary()


def evaluate(cfg: Config, run: Run, policy: nn.Module, envs: list[environments.Env], when: str) -> tuple[float, float]:
    """Mean return of fresh episodes and its standard error, actions drawn as in training."""
    seeds = episode_seeds(run, cfg.eval_episodes, "evaluation", when)
    act = reinforce.acting(policy, run.generator("evaluation", when))
    return mean_and_error([returns(envs, act, seeds)])


def report(cfg: Config, run: Run, method: str, before: tuple[float, float], after: tuple[float, float]) -> None:
    """A method's return against the untrained policy's. On CartPole the target is half of the way to the best."""
    run.print(f"{method}: {after[0]:.1f} ± {after[1]:.1f} (standard error, {cfg.eval_episodes} episodes)")
    part = (0.25 if run.toy else 0.5) if cfg.env == "CartPole-v1" else None
    target = None if part is None else before[0] + part * (BEST - before[0])
    run.result(f"return_{method}", after[0], error=after[1], baseline=before[0], target=target)
