"""Actor-critic methods: one-step, A2C, AC(λ) and V-trace on CartPole, SAC and TD3 on Pendulum. Reads top to bottom.

    actor   ∇J = E[ ∇ log π(a|s) · A ],  A = r + γ V(s') − V(s), or n rewards and then the critic
    critic  V(s) towards the same return, bootstrapped from itself

Sutton & Barto 2018, 13.5; Mnih et al. 2016 (arXiv:1602.01783); Espeholt et al. 2018 (arXiv:1802.01561); Haarnoja et
al. 2018 (arXiv:1812.05905); Fujimoto et al. 2018 (arXiv:1802.09477). The README explains every metric and choice.
"""

from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from finetune import optim
from finetune.errors import UserError
from finetune.rl.envs import environments
from finetune.rl.envs.evaluation import returns
from finetune.rl.envs.rollout import episode_seeds
from finetune.rl.envs.vector import VectorEnv
from finetune.rl.statistics import mean_and_error
from finetune.runs import config

from . import critic, offpolicy, onpolicy, plots

METHODS = (*onpolicy.LEARNERS, *offpolicy.LEARNERS)
CHUNK = 200  # steps of the environments in a step of the run
FAITHFUL = ("a2c", "lambda", "vtrace")  # whose critics must know what comes: sac's may never have seen a rare fall
STATES, FORKS = 30, 16  # that a critic is asked about, and how often each is played on from
# Returns of random actions and of a good policy. A target is a part of the way from the one to the other.
SCALE = {"CartPole-v1": (22.0, 500.0), "Pendulum-v1": (-1200.0, -150.0)}
TARGETS = {"one_step": 0.25, "lambda": 0.25, "vtrace": 0.25, "a2c": 0.5, "sac": 0.6}
TOY_TARGETS = {"a2c": 0.2, "sac": 0.35}  # one training, and a short one
KNOWS = 0.5  # correlation of what a critic says with what comes


@dataclass
class Config(config.Config):
    threads: int = 1  # networks so small are fastest on one
    steps: int = 500  # of one_step, a2c, lambda and vtrace, each of 200 steps of the environments
    # of sac and td3, each of 200 steps of the environment; at most --steps
    continuous_steps: int = config.bounded(50, at_least=0, at_most=10**6)
    methods: str = ",".join(METHODS)  # which to train, separated by commas
    # trainings of each method, from other weights and episodes
    repeats: int = config.bounded(3, at_least=1, at_most=1000)
    env: str = "CartPole-v1"  # of one_step, a2c, lambda and vtrace
    continuous_env: str = "Pendulum-v1"  # of sac and td3: its actions are a vector within bounds
    envs: int = config.bounded(8, at_least=1, at_most=1000)  # side by side; sac and td3 have one
    # an episode is cut off there if its environment has no time limit of its own
    max_episode_steps: int = config.bounded(1000, at_least=1, at_most=10**6)
    gamma: float = config.bounded(0.99, at_least=0, at_most=1)
    shuffle: bool = False  # control: advantages (sac, td3: rewards of a batch) are dealt out anew: nothing to learn
    # before and after each training, with the best action of the policy
    eval_episodes: int = config.bounded(20, at_least=2, at_most=10_000)
    # steps after which, in a training of its own, a policy is held while its critic goes on learning
    hold: int = config.bounded(50, at_least=0, at_most=10**6)
    # steps that the critic then has, before it is compared with what came; 0: no comparison
    hold_steps: int = config.bounded(200, at_least=0, at_most=10**6)
    # one_step, a2c, lambda, vtrace
    horizon: int = config.bounded(16, at_least=1, at_most=10**6)  # a2c, vtrace: steps of each environment in an update
    lr: float = config.bounded(2e-3, at_least=0, at_most=1000)  # a2c, vtrace: Adam's, falling to a tenth
    # a2c, vtrace: how many times faster the critic learns
    critic_rate: float = config.bounded(2.0, at_least=0, at_most=1000)
    online_lr: float = config.bounded(5e-4, at_least=0, at_most=1000)  # one_step, lambda
    entropy: float = config.bounded(0.01, at_least=0, at_most=1000)  # weight of the entropy bonus
    value_weight: float = config.bounded(0.5, at_least=0, at_most=1000)  # of the critic's loss
    # a2c, vtrace: of the norm of the actor's gradient; the critic's is not clipped
    clip: float = config.bounded(0.5, above=0, at_most=10**6)
    lam: float = config.bounded(0.9, at_least=0, at_most=1)  # lambda: decay of the traces, besides γ
    lag: int = config.bounded(4, at_least=0, at_most=1000)  # vtrace: updates that the acting policy is behind; 0: none
    # vtrace: bound of the ratios that choose what V is the value of
    rho_bar: float = config.bounded(1.0, above=0, at_most=10**6)
    c_bar: float = config.bounded(1.0, above=0, at_most=10**6)  # vtrace: bound of the ratios that pass corrections back
    hidden: int = config.bounded(64, at_least=1, at_most=8192)  # width of the two hidden layers
    # V is this times the network's output, which so need not grow large; rewards are divided by the largest
    value_scale: float = config.bounded(10.0, above=0, at_most=10**9)
    shared_trunk: bool = False  # policy and value read the same features
    # sac, td3
    continuous_lr: float = config.bounded(1e-3, at_least=0, at_most=1000)  # Adam's, of policy, critics and α
    continuous_hidden: int = config.bounded(128, at_least=1, at_most=8192)  # width of the two hidden layers
    batch: int = config.bounded(128, at_least=1, at_most=10**6)  # transitions of an update
    capacity: int = config.bounded(100_000, at_least=1, at_most=10**8)  # transitions that the replay holds
    warmup: int = config.bounded(500, at_least=1, at_most=10**7)  # steps with actions at random, without updates
    # part of the critics that the slow ones take over in an update
    tau: float = config.bounded(0.01, at_least=0, at_most=1)
    critics: int = config.bounded(2, at_least=1, at_most=1000)  # independent ones, the least of which counts
    # sac: weight of the entropy; none: learned, so that the entropy meets its target
    alpha: float | None = config.bounded(None, above=0, at_most=10**6)
    # td3: noise on the actions tried, in half widths of their bounds
    exploration: float = config.bounded(0.2, at_least=0, at_most=1000)
    target_noise: float = config.bounded(0.2, at_least=0, at_most=1000)  # td3: noise on the actions of the target
    noise_clip: float = config.bounded(0.5, at_least=0, at_most=1000)  # td3: its bound
    policy_delay: int = config.bounded(2, at_least=1, at_most=1000)  # td3: updates of the critics for one of the policy

    @classmethod
    def toy(cls) -> "Config":
        return cls(steps=300, continuous_steps=30, methods="a2c,sac", repeats=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.methods.split(","):
            if name not in METHODS:
                raise UserError(f"--methods: '{name}' is not one of {', '.join(METHODS)}")


def main(cfg: Config, run) -> dict[str, Any]:
    names = cfg.methods.split(",")
    kinds = {name: name in offpolicy.LEARNERS for name in names}
    cut = environments.EpisodeLimit(cfg.max_episode_steps, run.print)
    places = {kind: Place(cfg, kind, cut) for kind in set(kinds.values())}  # refused now, if at all
    trained: dict[str, list[dict[str, Any]]] = {}
    for name in names:
        place = places[kinds[name]]
        trained[name] = [train(cfg, run, name, repeat, place) for repeat in range(cfg.repeats)]
        judge(cfg, run, name, place.env, trained[name])
    if cfg.steps:
        plots.learning(run, cfg, names, CHUNK)
        if cfg.hold_steps:
            plots.critics(run, {name: [t["pairs"] for t in trained[name]] for name in names})
        if "sac" in names and cfg.alpha is None:
            plots.temperature(run, cfg, trained["sac"][0]["learner"].policy.target_entropy, CHUNK)
    return cut.summary()


class Place:
    """The environments of the methods of one kind: those they learn in, those they are tested in, and those their
    critics are, which go on until the returns are complete."""

    def __init__(self, cfg: Config, continuous_actions: bool, cut: environments.EpisodeLimit) -> None:
        self.env, self.episode_limit = cfg.continuous_env if continuous_actions else cfg.env, cut
        self.learning = environments.make(self.env, 1 if continuous_actions else cfg.envs, episode_limit=cut)
        if continuous_actions:
            environments.action_bounds(self.learning[0])
        self.test = environments.make(self.env, cfg.eval_episodes, episode_limit=cut)
        self.limit = self.test[0].limit
        self.long = environments.make(self.env, STATES * FORKS, self.limit + critic.steps_for(cfg.gamma))


def begin(cfg: Config, run, method: str, repeat: int, place: Place) -> Any:
    """A learner, the same each time for the same method and repeat."""
    run.seed("networks", repeat)  # the same for every method, so that their curves begin alike
    vector = VectorEnv(place.learning, run.generator("environments", method, repeat).initial_seed())
    return (onpolicy if method in onpolicy.LEARNERS else offpolicy).LEARNERS[method](cfg, method, vector)


def train(cfg: Config, run, method: str, repeat: int, place: Place) -> dict[str, Any]:
    """One training: its returns before and after, and what the critic said beside what came."""
    on_policy = method in onpolicy.LEARNERS
    learner = begin(cfg, run, method, repeat, place)
    total = cfg.steps if on_policy else min(cfg.continuous_steps, cfg.steps)
    before = evaluate(cfg, run, learner, repeat, place, "before")
    for step in run.steps(total, learner.state() | {"cut": place.episode_limit}, phase=f"{method}_{repeat}"):
        learn(run, step, learner, optim.cosine(step, total, 0, 1.0, 0.1), method, repeat)
    after = evaluate(cfg, run, learner, repeat, place, "after")
    run.print(
        f"{method}, training {repeat}: {fmean(before):.1f} before, {fmean(after):.1f} after "
        f"({cfg.eval_episodes} episodes)"
    )
    pairs = torch.zeros(0, 2)
    if cfg.steps and cfg.hold_steps:
        critic_of = held(cfg, run, method, repeat, place) if on_policy else learner
        key = ("critic", method, repeat)
        seeds = episode_seeds(run, STATES, *key)
        act, generator = critic_of.valued(run.generator(*key)), run.generator(*key, "states")
        pairs = critic.said_and_came(
            place.long, act, critic_of.values, seeds, cfg.gamma, generator, place.limit, critic_of.bonus
        )
    return {"before": before, "after": after, "pairs": pairs, "learner": learner}


def held(cfg: Config, run, method: str, repeat: int, place: Place) -> Any:
    """The same training as far as step `hold`, where the policy still fails; there it stays as it is, and the critic
    goes on. A policy that never fails would make every state worth the same, and one that still changes leaves the
    critic behind."""
    learner = begin(cfg, run, method, repeat, place)
    hold = min(cfg.hold, cfg.steps)
    for step in run.steps(
        hold + cfg.hold_steps, learner.state() | {"cut": place.episode_limit}, phase=f"{method}_held_{repeat}"
    ):
        if step < hold:
            left = optim.cosine(step, cfg.steps, 0, 1.0, 0.1)
        else:
            learner.hold()
            left = optim.cosine(step - hold, cfg.hold_steps, 0, 1.0, 0.1)
        learn(run, step, learner, left, method, repeat)
    return learner


def learn(run, step: int, learner: Any, left: float, method: str, repeat: int) -> None:
    found = learner.chunk(CHUNK, left, run.generator("chunk", method, repeat, step))
    if ended := learner.vector.pop_finished():
        found["return"] = sum(earned for earned, _ in ended) / len(ended)
    run.log(step, **found)


def evaluate(cfg: Config, run, learner: Any, repeat: int, place: Place, when: str) -> list[float]:
    """Returns of fresh episodes. On policy the actions are drawn, as in training: the one that an untrained policy
    holds best is chance, and may be all that a pole needs. sac and td3 act without noise."""
    seeds = episode_seeds(run, cfg.eval_episodes, "evaluation", repeat)
    return returns(place.test, learner.tried(run.generator("evaluation", repeat)), seeds)


def judge(cfg: Config, run, method: str, env: str, trained: list[dict[str, Any]]) -> None:
    before, _ = mean_and_error([t["before"] for t in trained])
    after, error = mean_and_error([t["after"] for t in trained])
    share = (TOY_TARGETS if run.toy else TARGETS).get(method)
    low, high = SCALE.get(env, (0.0, 0.0))
    target = None if share is None or env not in SCALE else low + share * (high - low)
    run.result(f"return_{method}", after, error=error, baseline=before, target=target)
    if not cfg.steps:
        return
    if cfg.hold_steps and (told := critic.Told.of(torch.cat([t["pairs"] for t in trained]))):
        known = KNOWS if method in FAITHFUL and not run.toy else None
        run.result(f"critic_correlation_{method}", told.correlation, error=told.correlation_error, target=known)
        run.result(f"critic_bias_{method}", told.bias, error=told.bias_error)
        run.result(f"critic_slope_{method}", told.slope, error=told.slope_error)
    if method == "sac" and cfg.alpha is None:
        series, target = run.metrics.series(), trained[0]["learner"].policy.target_entropy
        found = [series[f"sac_{i}: entropy"][1] for i in range(cfg.repeats) if f"sac_{i}: entropy" in series]
        if found:
            last, error = mean_and_error([ys[-max(1, len(ys) // 10) :] for ys in found])
            run.result("entropy_gap_sac", abs(last - target), error=error, target=0.3, higher=False)
