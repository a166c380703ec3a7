"""Actor-critic methods compared: one-step, A2C, AC(λ) and V-trace on CartPole, SAC and TD3 on Pendulum.

    actor   ∇J = E[∇log π(a|s) · A]          A: how much better the action did than the critic expected
    critic  V(s) → r + γ V(s')               learned from its own next estimate

Each algorithm is one file: one_step.py, a2c.py, actor_critic_lambda.py, vtrace.py, sac.py, td3.py. This one trains them
from several seeds, evaluates them, and checks their critics.
"""

from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from finetune import optim
from finetune.errors import UserError
from finetune.rl.envs import environments
from finetune.rl.envs.environments import EpisodeLimit
from finetune.rl.envs.evaluation import returns
from finetune.rl.envs.rollout import episode_seeds
from finetune.rl.envs.vector import VectorEnv
from finetune.rl.statistics import mean_and_error
from finetune.runs import config
from finetune.runs.run import Run

from . import critic_check, plots
from .a2c import A2C
from .actor_critic_lambda import ActorCriticLambda
from .one_step import OneStep
from .sac import SAC
from .td3 import TD3
from .vtrace import VTrace

OnPolicy = OneStep | A2C | ActorCriticLambda | VTrace
Agent = OnPolicy | SAC | TD3
ON_POLICY: dict[str, type[OnPolicy]] = {"one_step": OneStep, "a2c": A2C, "lambda": ActorCriticLambda, "vtrace": VTrace}
OFF_POLICY: dict[str, type[SAC | TD3]] = {"sac": SAC, "td3": TD3}
METHODS = (*ON_POLICY, *OFF_POLICY)

CHUNK = 200  # environment steps in a step of the run
# Returns of random actions and of a good policy. A target is a share of the way from the one to the other.
RETURN_RANGE = {"CartPole-v1": (22.0, 500.0), "Pendulum-v1": (-1200.0, -150.0)}
TARGETS = {"one_step": 0.25, "lambda": 0.25, "vtrace": 0.25, "a2c": 0.5, "sac": 0.6}
TOY_TARGETS = {"a2c": 0.2, "sac": 0.35}  # one training, and a short one
CORRELATION = 0.5  # least correlation of V(s) with returns for the critics below
CRITICS_CHECKED = ("a2c", "lambda", "vtrace")  # SAC's may never have seen the states from which a rare episode fails


@dataclass
class Config(config.Config):
    threads: int = 1  # networks of this size are fastest on one
    steps: int = 500  # of one_step, a2c, lambda and vtrace, each of 200 environment steps
    # of sac and td3, each of 200 environment steps; at most --steps
    continuous_steps: int = config.bounded(50, at_least=0, at_most=10**6)
    methods: str = ",".join(METHODS)  # which to train, separated by commas
    # trainings of each method, with different initial weights and episodes
    repeats: int = config.bounded(3, at_least=1, at_most=1000)
    # of one_step, a2c, lambda and vtrace: a gymnasium id, or an environment of your own (README)
    env: str = "CartPole-v1"
    # keyword arguments of --env, such as is_slippery=false; may be given several times
    env_arg: tuple[str, ...] = ()
    continuous_env: str = "Pendulum-v1"  # of sac and td3: needs a vector of bounded actions
    continuous_env_arg: tuple[str, ...] = ()  # the same of --continuous-env
    # an episode is truncated there if its environment has no time limit
    max_episode_steps: int = config.bounded(1000, at_least=1, at_most=10**6)
    gamma: float = config.bounded(0.99, at_least=0, at_most=1)  # discount factor
    eval_episodes: int = config.bounded(20, at_least=2, at_most=10_000)  # before and after each training
    shuffle: bool = False  # control: advantages (sac, td3: the rewards of a batch) in random order, nothing to learn

    # --- one_step, a2c, lambda, vtrace
    envs: int = config.bounded(8, at_least=1, at_most=1000)  # environments stepped together
    hidden: int = config.bounded(64, at_least=1, at_most=8192)  # width of the two hidden layers
    shared_trunk: bool = False  # policy and value on the features of one network
    entropy: float = config.bounded(0.01, at_least=0, at_most=1000)  # weight of the entropy bonus
    value_weight: float = config.bounded(0.5, at_least=0, at_most=1000)  # weight of the critic's loss
    # V is this times the network's output, so its weights stay small; rewards are divided by the largest
    value_scale: float = config.bounded(10.0, above=0, at_most=10**9)

    # --- one_step, lambda
    online_lr: float = config.bounded(5e-4, at_least=0, at_most=1000)  # Adam's learning rate, falling to a tenth
    lam: float = config.bounded(0.9, at_least=0, at_most=1)  # lambda: decay of the traces in addition to γ

    # --- a2c, vtrace
    horizon: int = config.bounded(16, at_least=1, at_most=10**6)  # steps of each environment in an update
    lr: float = config.bounded(2e-3, at_least=0, at_most=1000)  # Adam's learning rate, falling to a tenth
    critic_rate: float = config.bounded(2.0, at_least=0, at_most=1000)  # the critic's learning rate / the actor's
    clip: float = config.bounded(0.5, above=0, at_most=10**6)  # largest norm of the actor's gradient
    lag: int = config.bounded(4, at_least=0, at_most=1000)  # vtrace: age of the behavior policy in updates
    # vtrace: bound of the ratios that choose which policy V is the value of
    rho_bar: float = config.bounded(1.0, above=0, at_most=10**6)
    c_bar: float = config.bounded(1.0, above=0, at_most=10**6)  # vtrace: bound of the ratios that pass corrections back

    # --- sac, td3
    continuous_lr: float = config.bounded(1e-3, at_least=0, at_most=1000)  # Adam's, of policy, critics and α
    continuous_hidden: int = config.bounded(128, at_least=1, at_most=8192)  # width of the two hidden layers
    batch: int = config.bounded(128, at_least=1, at_most=10**6)  # transitions of an update
    capacity: int = config.bounded(100_000, at_least=1, at_most=10**8)  # transitions in the replay
    warmup: int = config.bounded(500, at_least=1, at_most=10**7)  # steps of uniform actions before the first update
    tau: float = config.bounded(0.01, at_least=0, at_most=1)  # Polyak averaging of the target networks
    critics: int = config.bounded(2, at_least=1, at_most=1000)  # independent critics, of which the least counts
    # sac: weight of the entropy; none: learned, so that the entropy meets its target
    alpha: float | None = config.bounded(None, above=0, at_most=10**6)
    # td3: exploration noise, in half widths of the action bounds
    exploration: float = config.bounded(0.2, at_least=0, at_most=1000)
    target_noise: float = config.bounded(0.2, at_least=0, at_most=1000)  # td3: noise on the target's actions
    noise_clip: float = config.bounded(0.5, at_least=0, at_most=1000)  # td3: bound of that noise
    policy_delay: int = config.bounded(2, at_least=1, at_most=1000)  # td3: critic updates for one of the policy

    # --- critic check
    # steps after which, in a second training, the policy is frozen while its critic keeps learning
    freeze_after: int = config.bounded(50, at_least=0, at_most=10**6)
    # steps of the critic with the frozen policy, before V is compared with returns; 0: no check
    critic_steps: int = config.bounded(200, at_least=0, at_most=10**6)
    critic_states: int = config.bounded(30, at_least=1, at_most=10_000)  # states whose V is compared
    critic_episodes: int = config.bounded(16, at_least=1, at_most=10_000)  # episodes from each of them

    @classmethod
    def toy(cls) -> "Config":
        return cls(steps=300, continuous_steps=30, methods="a2c,sac", repeats=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.methods.split(","):
            if name not in METHODS:
                raise UserError(f"--methods: '{name}' is not one of {', '.join(METHODS)}")


class Envs:
    """The environments of on-policy or of off-policy methods: for training, for evaluation, and for the critic check,
    whose episodes continue until the discounted returns are complete."""

    def __init__(self, cfg: Config, off_policy: bool, limit: EpisodeLimit) -> None:
        self.name, self.limit = cfg.continuous_env if off_policy else cfg.env, limit
        args = cfg.continuous_env_arg if off_policy else cfg.env_arg
        self.training = environments.make(self.name, 1 if off_policy else cfg.envs, episode_limit=limit, args=args)
        if off_policy:
            environments.action_bounds(self.training[0])  # raises if there are none
            environments.refuse_images(self.training[0], "sac, td3", "--methods a2c has convolutions")
        elif "lambda" in cfg.methods.split(","):
            environments.refuse_images(self.training[0], "lambda", "omit it from --methods; a2c has convolutions")
        self.evaluation = environments.make(self.name, cfg.eval_episodes, episode_limit=limit, args=args)
        self.max_steps, self.repeats = self.evaluation[0].limit, self.evaluation[0].repeats
        count, steps = cfg.critic_states * cfg.critic_episodes, self.max_steps + critic_check.steps_for(cfg.gamma)
        self.critic_check = environments.make(self.name, count, steps, args=args) if self.repeats else []


@dataclass
class Training:
    before: list[float]  # returns of the evaluation episodes
    after: list[float]
    pairs: Tensor  # (K, 2) V(s) and returns
    agent: Agent


def main(cfg: Config, run: Run) -> dict[str, Any]:
    methods, limit = cfg.methods.split(","), EpisodeLimit(cfg.max_episode_steps, run.print)
    # Both before anything is trained: a wrong environment is refused now.
    envs_by_kind = {off: Envs(cfg, off, limit) for off in sorted({method in OFF_POLICY for method in methods})}
    trainings: dict[str, list[Training]] = {}
    for method in methods:
        envs = envs_by_kind[method in OFF_POLICY]
        trainings[method] = [train(cfg, run, method, repeat, envs) for repeat in range(cfg.repeats)]
        report(cfg, run, method, envs.name, trainings[method])
    if cfg.steps:
        groups = [(cfg.env, [m for m in methods if m in ON_POLICY])]
        groups += [(cfg.continuous_env, [m for m in methods if m in OFF_POLICY])]
        plots.returns(run, cfg, groups, CHUNK)
        checked = {m: [t.pairs for t in trainings[m]] for m in methods if envs_by_kind[m in OFF_POLICY].repeats}
        if cfg.critic_steps and checked:
            plots.critics(run, checked)
        if "sac" in methods and cfg.alpha is None and isinstance(sac := trainings["sac"][0].agent, SAC):
            plots.temperature(run, cfg, sac.policy.target_entropy, CHUNK)
    return limit.summary()


def new_agent(cfg: Config, run: Run, method: str, repeat: int, envs: Envs) -> Agent:
    run.seed("networks", repeat)  # the same for every method, so that their curves begin alike
    vector = VectorEnv(envs.training, run.generator("environments", method, repeat).initial_seed())
    return (ON_POLICY | OFF_POLICY)[method](cfg, vector)


def train(cfg: Config, run: Run, method: str, repeat: int, envs: Envs) -> Training:
    agent = new_agent(cfg, run, method, repeat, envs)
    total = min(cfg.continuous_steps, cfg.steps) if method in OFF_POLICY else cfg.steps
    before = evaluate(cfg, run, agent, method, repeat, envs)
    for step in run.steps(total, agent.state | {"limit": envs.limit}, phase=f"{method}_{repeat}"):
        lr_scale = optim.cosine(step, total, 0, 1.0, 0.1)
        train_chunk(run, agent, lr_scale, method, repeat, step)
    after = evaluate(cfg, run, agent, method, repeat, envs)
    run.print(f"{method}, training {repeat}: return {fmean(before):.1f} before, {fmean(after):.1f} after")
    pairs = torch.zeros(0, 2)
    if cfg.steps and cfg.critic_steps and envs.repeats:
        checked = agent if method in OFF_POLICY else train_frozen(cfg, run, method, repeat, envs)
        pairs = check_critic(cfg, run, checked, method, repeat, envs)
    return Training(before, after, pairs, agent)


def train_frozen(cfg: Config, run: Run, method: str, repeat: int, envs: Envs) -> OnPolicy:
    """The same training as far as `freeze_after`, where the policy still fails; from there only the critic learns. A
    policy that never fails makes all states equally valuable, and one that changes fast outdates its critic."""
    agent = new_agent(cfg, run, method, repeat, envs)
    assert not isinstance(agent, SAC | TD3)
    freeze, state = min(cfg.freeze_after, cfg.steps), agent.state | {"limit": envs.limit}
    for step in run.steps(freeze + cfg.critic_steps, state, phase=f"{method}_held_{repeat}"):
        if step < freeze:
            lr_scale = optim.cosine(step, cfg.steps, 0, 1.0, 0.1)
        else:
            agent.freeze()
            lr_scale = optim.cosine(step - freeze, cfg.critic_steps, 0, 1.0, 0.1)
        train_chunk(run, agent, lr_scale, method, repeat, step)
    return agent


def train_chunk(run: Run, agent: Agent, lr_scale: float, method: str, repeat: int, step: int) -> None:
    metrics = agent.train_for(CHUNK, lr_scale, run.generator("chunk", method, repeat, step))
    if finished := agent.envs.pop_finished():
        metrics["return"] = fmean(earned for earned, _ in finished)
    run.log(step, **metrics)


def evaluate(cfg: Config, run: Run, agent: Agent, method: str, repeat: int, envs: Envs) -> list[float]:
    """Returns of fresh episodes. On-policy methods sample their actions, as in training: the greedy action of an
    untrained policy is arbitrary, and may happen to balance a pole. SAC and TD3 act greedily."""
    seeds, rng = episode_seeds(run, cfg.eval_episodes, "evaluation", repeat), run.generator("evaluation", repeat)
    policy = agent.greedy if method in OFF_POLICY else lambda obs: agent.act(obs, rng)
    return returns(envs.evaluation, policy, seeds)


def check_critic(cfg: Config, run: Run, agent: Agent, method: str, repeat: int, envs: Envs) -> Tensor:
    """(K, 2): V(s) and the mean return from s."""
    key = ("critic", method, repeat)
    seeds = episode_seeds(run, cfg.critic_states, *key)
    policy, value, bonus = critic_check.parts_of(agent, run.generator(*key))
    rng = run.generator(*key, "states")
    return critic_check.values_and_returns(
        envs.critic_check, policy, value, seeds, cfg.gamma, rng, envs.max_steps, bonus
    )


def report(cfg: Config, run: Run, method: str, env: str, trainings: list[Training]) -> None:
    before, _ = mean_and_error([t.before for t in trainings])
    after, error = mean_and_error([t.after for t in trainings])
    share = (TOY_TARGETS if run.toy else TARGETS).get(method)
    low, high = RETURN_RANGE.get(env, (0.0, 0.0))
    target = None if share is None or env not in RETURN_RANGE else low + share * (high - low)
    run.result(f"return_{method}", after, error=error, baseline=before, target=target)
    if not cfg.steps:
        return
    if cfg.critic_steps and (found := critic_check.Agreement.of(torch.cat([t.pairs for t in trainings]))):
        least = CORRELATION if method in CRITICS_CHECKED and not run.toy else None
        run.check(f"critic_correlation_{method}", found.correlation, error=found.correlation_error, at_least=least)
        run.check(f"critic_bias_{method}", found.bias, error=found.bias_error)
        run.check(f"critic_slope_{method}", found.slope, error=found.slope_error)
    if isinstance(sac := trainings[0].agent, SAC) and cfg.alpha is None:
        series, target = run.metrics.series(), sac.policy.target_entropy
        curves = [series[name][1] for i in range(cfg.repeats) if (name := f"sac_{i}: entropy") in series]
        if curves:
            last, error = mean_and_error([ys[-max(1, len(ys) // 10) :] for ys in curves])
            run.check("entropy_gap_sac", abs(last - target), error=error, at_most=0.3)
