"""Actor-critic methods: one-step, A2C, AC(λ) and V-trace on CartPole, SAC and TD3 on Pendulum. Reads top to bottom.

    actor   ∇J = E[ ∇ log π(a|s) · A ],  A = r + γ V(s') − V(s), or n rewards and then the critic
    critic  V(s) towards the same return, bootstrapped from itself

Sutton & Barto 2018, 13.5; Mnih et al. 2016 (arXiv:1602.01783); Espeholt et al. 2018 (arXiv:1802.01561); Haarnoja et
al. 2018 (arXiv:1812.05905); Fujimoto et al. 2018 (arXiv:1802.09477). The README explains every metric and choice.
"""

from dataclasses import dataclass
from typing import Any

import torch

from finetune import config, optim
from finetune.errors import UserError
from finetune.rl import continuous, environments
from finetune.rl.evaluation import returns
from finetune.rl.rollout import episode_seeds
from finetune.rl.vector import Vector

from . import critic, offpolicy, onpolicy, plots

METHODS = (*onpolicy.LEARNERS, *offpolicy.LEARNERS)
CHUNK = 200  # steps of the environments in a step of the run
FAITHFUL = ("a2c", "lambda", "vtrace", "sac")  # whose critics must know what comes
STATES, FORKS = 30, 16  # that a critic is asked about, and how often each is played on from
TARGETS = {(method, "CartPole-v1"): 195.0 for method in onpolicy.LEARNERS} | {
    ("a2c", "CartPole-v1"): 475.0,
    ("sac", "Pendulum-v1"): -200.0,
}
TOY_TARGETS = {("a2c", "CartPole-v1"): 300.0, ("sac", "Pendulum-v1"): -600.0}


@dataclass
class Config(config.Config):
    threads: int = 1  # networks so small are fastest on one
    steps: int = 500  # of one_step, a2c, lambda and vtrace, each of 200 steps of the environments
    continuous_steps: int = 50  # of sac and td3, each of 200 steps of the environment; at most --steps
    methods: str = ",".join(METHODS)  # which to train, separated by commas
    repeats: int = 3  # trainings of each method, from other weights and episodes
    env: str = "CartPole-v1"  # of one_step, a2c, lambda and vtrace
    continuous_env: str = "Pendulum-v1"  # of sac and td3: its actions are a vector within bounds
    envs: int = 8  # side by side; sac and td3 have one
    max_episode_steps: int = 1000  # an episode is cut off there if its environment has no time limit of its own
    gamma: float = 0.99
    shuffle: bool = False  # control: advantages (sac, td3: rewards of a batch) are dealt out anew: nothing to learn
    eval_episodes: int = 20  # before and after each training, with the best action of the policy
    hold: int = 50  # steps after which, in a training of its own, a policy is held while its critic goes on learning
    hold_steps: int = 200  # steps that the critic then has, before it is compared with what came; 0: no comparison
    # one_step, a2c, lambda, vtrace
    horizon: int = 16  # a2c, vtrace: steps of each environment in an update
    lr: float = 2e-3  # a2c, vtrace: Adam's, falling to a tenth
    critic_rate: float = 2.0  # a2c, vtrace: how many times faster the critic learns
    online_lr: float = 5e-4  # one_step, lambda
    entropy: float = 0.01  # weight of the entropy bonus
    value_weight: float = 0.5  # of the critic's loss
    clip: float = 0.5  # a2c, vtrace: of the norm of the actor's gradient; the critic's is not clipped
    lam: float = 0.9  # lambda: decay of the traces, besides γ
    lag: int = 4  # vtrace: updates that the acting policy is behind; 0: none
    rho_bar: float = 1.0  # vtrace: bound of the ratios that choose what V is the value of
    c_bar: float = 1.0  # vtrace: bound of the ratios that pass corrections back
    hidden: int = 64  # width of the two hidden layers
    value_scale: float = 10.0  # V is this times the network's output, which so need not grow large
    shared_trunk: bool = False  # policy and value read the same features
    # sac, td3
    continuous_lr: float = 1e-3  # Adam's, of policy, critics and α
    continuous_hidden: int = 128  # width of the two hidden layers
    batch: int = 128  # transitions of an update
    capacity: int = 100_000  # transitions that the replay holds
    warmup: int = 500  # steps with actions at random, without updates
    tau: float = 0.01  # part of the critics that the slow ones take over in an update
    critics: int = 2  # independent ones, the least of which counts
    alpha: float | None = None  # sac: weight of the entropy; none: learned, so that the entropy meets its target
    exploration: float = 0.2  # td3: noise on the actions tried, in half widths of their bounds
    target_noise: float = 0.2  # td3: noise on the actions of the target
    noise_clip: float = 0.5  # td3: its bound
    policy_delay: int = 2  # td3: updates of the critics for one of the policy

    @classmethod
    def toy(cls) -> "Config":
        return cls(steps=300, continuous_steps=30, methods="a2c,sac", repeats=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"continuous_steps": 0, "repeats": 1, "envs": 1, "eval_episodes": 2, "hold": 0, "hold_steps": 0,
                 "horizon": 1, "lag": 0, "hidden": 1, "continuous_hidden": 1, "batch": 1, "capacity": 1, "warmup": 1,
                 "critics": 1, "policy_delay": 1, "max_episode_steps": 1}  # fmt: skip
        for name, bound in least.items():
            if getattr(self, name) < bound:
                key = config.dashed(name)
                raise UserError(f"--{key} {getattr(self, name)} is too small: it must be at least {bound}")
        for name in ("gamma", "lam", "tau"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name} {getattr(self, name)} is not within 0 and 1")
        for name in ("clip", "rho_bar", "c_bar"):
            if getattr(self, name) <= 0:
                raise UserError(f"--{config.dashed(name)} {getattr(self, name)}: it must be above 0")
        if self.alpha is not None and self.alpha <= 0:
            raise UserError(f"--alpha {self.alpha}: it must be above 0, or none")
        for name in self.methods.split(","):
            if name not in METHODS:
                raise UserError(f"--methods: '{name}' is not one of {', '.join(METHODS)}")


def main(cfg: Config, run) -> dict[str, Any]:
    names = cfg.methods.split(",")
    kinds = {name: name in offpolicy.LEARNERS for name in names}
    cut = environments.Cut(cfg.max_episode_steps, run.say)
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
    return cut.found()


class Place:
    """The environments of the methods of one kind: those they learn in, those they are tested in, and those their
    critics are, which go on until the returns are complete."""

    def __init__(self, cfg: Config, continuous_actions: bool, cut: environments.Cut) -> None:
        self.env, self.cut = cfg.continuous_env if continuous_actions else cfg.env, cut
        self.learning = environments.make(self.env, 1 if continuous_actions else cfg.envs, cut=cut)
        if continuous_actions:
            continuous.bounds(self.learning[0])
        self.test = environments.make(self.env, cfg.eval_episodes, cut=cut)
        self.limit = self.test[0].limit
        self.long = environments.make(self.env, STATES * FORKS, self.limit + critic.steps_for(cfg.gamma))


def begin(cfg: Config, run, method: str, repeat: int, place: Place) -> Any:
    """A learner, the same each time for the same method and repeat."""
    run.seed("networks", repeat)  # the same for every method, so that their curves begin alike
    vector = Vector(place.learning, run.generator("environments", method, repeat).initial_seed())
    return (onpolicy if method in onpolicy.LEARNERS else offpolicy).LEARNERS[method](cfg, method, vector)


def train(cfg: Config, run, method: str, repeat: int, place: Place) -> dict[str, Any]:
    """One training: its returns before and after, and what the critic said beside what came."""
    on_policy = method in onpolicy.LEARNERS
    learner = begin(cfg, run, method, repeat, place)
    total = cfg.steps if on_policy else min(cfg.continuous_steps, cfg.steps)
    before = evaluate(cfg, run, learner, repeat, place)
    for step in run.steps(total, learner.state() | {"cut": place.cut}, phase=f"{method}_{repeat}"):
        learn(run, step, learner, optim.cosine(step, total, 0, 1.0, 0.1), method, repeat)
    after = evaluate(cfg, run, learner, repeat, place)
    run.say(f"{method}, training {repeat}: {before:.1f} before, {after:.1f} after ({cfg.eval_episodes} episodes)")
    pairs = torch.zeros(0, 2)
    if cfg.steps and cfg.hold_steps:
        critic_of = held(cfg, run, method, repeat, place) if on_policy else learner
        key = ("critic", method, repeat)
        seeds = episode_seeds(run, STATES, *key)
        act, generator = critic_of.acting(run.generator(*key)), run.generator(*key, "states")
        pairs = critic.said_and_came(place.long, act, critic_of.values, seeds, cfg.gamma, generator, place.limit)
    return {"before": before, "after": after, "pairs": pairs, "learner": learner}


def held(cfg: Config, run, method: str, repeat: int, place: Place) -> Any:
    """The same training as far as step `hold`, where the policy still fails; there it stays as it is, and the critic
    goes on. A policy that never fails would make every state worth the same, and one that still changes leaves the
    critic behind."""
    learner = begin(cfg, run, method, repeat, place)
    hold = min(cfg.hold, cfg.steps)
    for step in run.steps(hold + cfg.hold_steps, learner.state() | {"cut": place.cut}, phase=f"{method}_held_{repeat}"):
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


def evaluate(cfg: Config, run, learner: Any, repeat: int, place: Place) -> float:
    """Mean return of fresh episodes, each with the action that the policy holds best."""
    seeds = episode_seeds(run, cfg.eval_episodes, "evaluation", repeat)
    found = returns(place.test, learner.best, seeds)
    return sum(found) / len(found)


def judge(cfg: Config, run, method: str, env: str, trained: list[dict[str, Any]]) -> None:
    before, after = (min(t[when] for t in trained) for when in ("before", "after"))
    targets = TOY_TARGETS if run.toy else TARGETS
    run.judge(f"return_{method}", after, baseline=before, target=targets.get((method, env)))
    if not cfg.steps:
        return
    if cfg.hold_steps:
        told = critic.correlation(torch.cat([t["pairs"] for t in trained]))
        run.judge(f"critic_correlation_{method}", told, target=0.9 if method in FAITHFUL and not run.toy else None)
    if method == "sac" and cfg.alpha is None:
        series, target = run.metrics.series(), trained[0]["learner"].policy.target_entropy
        found = [series[f"sac_{i}: entropy"][1] for i in range(cfg.repeats) if f"sac_{i}: entropy" in series]
        if found:
            last = [y for ys in found for y in ys[-max(1, len(ys) // 10) :]]
            run.judge("entropy_gap_sac", abs(sum(last) / len(last) - target), target=0.3, higher=False)
