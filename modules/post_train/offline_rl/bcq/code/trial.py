"""What every learner here goes through: training on logged steps, playing, and fitted Q evaluation."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.rl.agents.networks import QNetwork, TwinQ
from finetune.rl.agents.offline import FQE
from finetune.rl.envs import environments
from finetune.rl.envs.evaluation import true_returns
from finetune.rl.envs.logged_data import Dataset
from finetune.rl.envs.replay import Transitions
from finetune.rl.envs.rollout import episode_seeds
from finetune.rl.statistics import standard_error

LOG_EVERY = 10
LOGGED = ("return", "true", "believed")  # of what `evaluate` finds
EVALUATED = ("dqn", "td3", "bc", "bcq")  # by fitted Q evaluation too
Found = dict[str, dict[str, float]]  # method → what `train` finds of it


@dataclass
class Scale:
    """Between the environment's numbers and the learners'. With discrete actions they are the same; else observations
    have mean 0 and deviation 1 over the data, actions lie within −1 and 1, and rewards are smaller."""

    low: Tensor | None = None  # None: actions are discrete
    high: Tensor | None = None
    rewards: float = 1.0
    mean: Tensor | float = 0.0
    deviation: Tensor | float = 1.0

    @classmethod
    def of(cls, data: Dataset, low: Tensor, high: Tensor, rewards: float) -> "Scale":
        mean, deviation = data.observations.mean(0), data.observations.std(0)
        constant = ~(deviation > 1e-6 * mean.abs())
        return cls(low, high, rewards, mean, deviation.masked_fill(constant, 1.0))

    def seen(self, observations: Tensor) -> Tensor:
        return (observations - self.mean) / self.deviation

    def to_learner(self, actions: Tensor) -> Tensor:
        if self.low is None or self.high is None:
            return actions
        return (2 * (actions - self.low) / (self.high - self.low) - 1).clamp(-1, 1)

    def to_env(self, actions: Tensor) -> Tensor:
        if self.low is None or self.high is None:
            return actions
        return self.low + (actions + 1) / 2 * (self.high - self.low)


def logged(cfg, run, data: Dataset, scale: Scale) -> Transitions:
    """The steps as the learners see them."""
    steps = data.transitions()
    steps.observations, steps.next_observations = scale.seen(steps.observations), scale.seen(steps.next_observations)
    steps.actions, steps.rewards = scale.to_learner(steps.actions), scale.rewards * steps.rewards
    if cfg.shuffle_actions:
        steps.actions = steps.actions[torch.randperm(len(steps), generator=run.generator("shuffle", data.name))]
    return steps


def a_batch(run, steps: Transitions, size: int, step: int) -> tuple[Transitions, int, torch.Generator]:
    """What `update` takes; the same at the same step for every learner."""
    return steps.sample(size, run.generator("batch", step)), step, run.generator("update", step)


def train(
    cfg, run, envs: list[Any], data: Dataset, learners: dict[str, Any], scale: Scale, size: int
) -> tuple[float | None, Found]:
    """(mean return of the data's whole episodes, name → what `evaluate` finds after training, and `fqe`)"""
    steps, returns = logged(cfg, run, data, scale), data.returns()
    behavior = sum(returns) / len(returns) if returns else None
    run.print(f"{data.name}: {len(data):,} steps" + ("" if behavior is None else f", mean return {behavior:.1f}"))
    found: Found = {}
    for name, learner in learners.items():
        last: dict[str, float] = {}
        state = learner.state() | {"last": last, "cut": envs[0].episode_limit}
        for step in run.steps(cfg.steps, state, phase=f"{data.name}_{name}"):
            seen = learner.update(*a_batch(run, steps, size, step))
            if (step + 1) % cfg.eval_every == 0 or step + 1 == cfg.steps:
                last |= evaluate(cfg, run, envs, learner, scale)
                run.log(step, **seen, **{name: last[name] for name in LOGGED if name in last})
            elif (step + 1) % LOG_EVERY == 0:
                run.log(step, **seen)
        found[name] = last or evaluate(cfg, run, envs, learner, scale)
        run.print(f"{data.name}_{name}: {found[name]['return']:.1f}")
    estimates: dict[str, float] = {}
    names = [name for name in EVALUATED if name in learners] if cfg.steps and cfg.fqe_steps else []
    for i in run.steps(len(names), {"estimates": estimates}, phase=f"{data.name}_fqe"):
        estimates[names[i]] = fitted(cfg, run, envs, learners[names[i]], steps, scale)
        run.log(i, estimate=estimates[names[i]])
    for name, estimate in estimates.items():
        found[name]["fqe"] = estimate
    return behavior if data.comparable else None, found


def seeds(cfg, run) -> list[int]:
    """Of the episodes that every learner plays when it is evaluated."""
    return episode_seeds(run, cfg.eval_episodes, "evaluation")


def evaluate(cfg, run, envs: list[Any], learner: Any, scale: Scale) -> dict[str, float]:
    """Of fresh episodes: `return`, undiscounted; `true`, discounted from the start; `believed`, the learner's own Q
    there; `excess`, the one less the other. Means over the episodes, all in the environment's rewards, and `…_error`,
    their standard errors."""
    generator = run.generator("acting")
    rollout, discounted = true_returns(
        envs, lambda seen: scale.to_env(learner.act(scale.seen(seen), generator)), seeds(cfg, run), cfg.gamma
    )
    found = {"return": rollout.rewards.sum(0), "true": discounted[0]}
    believed = learner.value(scale.seen(rollout.observations[0]), scale.to_learner(rollout.actions[0]))
    if believed is not None:
        found |= {"believed": believed / scale.rewards, "excess": believed / scale.rewards - discounted[0]}
    return {
        key: value
        for name, each in found.items()
        for key, value in ((name, each.mean().item()), (f"{name}_error", standard_error(each.tolist())))
    }


def fitted(cfg, run, envs: list[Any], learner: Any, steps: Transitions, scale: Scale) -> float:
    """The value of the start by fitted Q evaluation, from the logged steps alone."""
    observations, actions, is_continuous = environments.sizes(envs[0])
    generator, hidden = run.generator("fqe"), [cfg.hidden, cfg.hidden]

    def policy(seen: Tensor) -> Tensor:
        parts = seen.split(1000)
        return torch.cat([learner.act(s, generator) if is_continuous else learner.policy_of(s) for s in parts])

    q = TwinQ(observations, actions, hidden, count=1) if is_continuous else QNetwork(observations, actions, hidden)
    fqe = FQE(q, steps, policy(steps.next_observations), gamma=cfg.gamma, lr=cfg.lr, tau=cfg.fqe_polyak)
    for step in range(min(cfg.fqe_steps, cfg.steps)):
        fqe.update(torch.randint(len(steps), (cfg.fqe_batch,), generator=run.generator("fqe_rows", step)))
    resets = [e.reset(seed=s)[0] for e, s in zip(envs, seeds(cfg, run), strict=True)]
    starts = scale.seen(torch.from_numpy(np.stack(resets)))
    return fqe.value(starts, policy(starts)).mean().item() / scale.rewards
