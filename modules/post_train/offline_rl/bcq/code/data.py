"""One training task: a set of logged steps, scaled for learning, and the environments to evaluate in."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from finetune.errors import UserError
from finetune.rl.agents import log_alone
from finetune.rl.agents.log_alone import HeldOut
from finetune.rl.agents.offline import reward_mismatch
from finetune.rl.envs import logged_data
from finetune.rl.envs.environments import Env
from finetune.rl.envs.logged_data import Dataset, Spaces
from finetune.rl.envs.replay import Transitions
from finetune.rl.envs.rollout import episode_seeds
from finetune.runs.run import Run

if TYPE_CHECKING:
    from .main import Config


@dataclass
class Scale:
    """Converts between the environment's numbers and the learners'. With continuous actions observations have mean 0
    and standard deviation 1 over the data, actions are in −1 … 1. Rewards are scaled by a factor."""

    rewards: float
    low: Tensor | None = None  # bounds of continuous actions
    high: Tensor | None = None
    mean: Tensor | float = 0.0
    std: Tensor | float = 1.0

    @classmethod
    def of(cls, data: Dataset, spaces: Spaces, largest_reward: float) -> Scale:
        rewards = largest_reward / data.reward_size
        if not data.continuous:
            return cls(rewards)
        mean, std = data.observations.mean(0), data.observations.std(0)
        constant = ~(std > 1e-6 * mean.abs())
        return cls(rewards, *spaces.bounds, mean, std.masked_fill(constant, 1.0))

    def observations(self, observations: Tensor) -> Tensor:
        if self.low is None:  # bytes of images stay bytes
            return observations
        return (observations - self.mean) / self.std

    def original(self, observations: Tensor) -> Tensor:
        return observations * self.std + self.mean

    def data(self, data: Dataset) -> Dataset:
        """The data in the learners' numbers."""
        return replace(
            data,
            observations=self.observations(data.observations),
            next_observations=self.observations(data.next_observations),
            actions=self.to_learner(data.actions),
            rewards=self.rewards * data.rewards,
        )

    def to_learner(self, actions: Tensor) -> Tensor:
        if self.low is None or self.high is None:
            return actions
        return (2 * (actions - self.low) / (self.high - self.low) - 1).clamp(-1, 1)

    def to_env(self, actions: Tensor) -> Tensor:
        if self.low is None or self.high is None:
            return actions
        return self.low + (actions + 1) / 2 * (self.high - self.low)


@dataclass
class Task:
    """A data set and what is needed to learn from it and to evaluate the result."""

    name: str  # such as cartpole_expert: phases, pictures and results begin with it
    data: Dataset
    scale: Scale
    steps: Transitions  # the data as learned from, scaled
    spaces: Spaces
    envs: list[Env]  # for evaluation only; empty with a log alone
    comparable: bool = True  # whether the logs have the environment's rewards
    held: HeldOut | None = None  # with a log alone: the episodes by which policies are judged

    @property
    def limit(self) -> dict[str, Any]:
        """The part of a checkpoint's state that is the environments'."""
        return {"limit": self.envs[0].episode_limit} if self.envs else {}

    @property
    def behavior(self) -> float | None:
        """Mean return of the data's whole episodes; None without any, or if the logs have other rewards."""
        returns = self.data.returns()
        return fmean(returns) if returns and self.comparable else None


def generated_task(cfg: Config, run: Run, envs: list[Env], env: str, quality: str) -> Task:
    """A set of this quality; the name of a set is that of the environment without version, and the quality."""
    seed = run.generator("data", env, quality).initial_seed() % 2**31
    return make_task(cfg, run, envs, env, logged_data.generate(env, quality, cfg.rows, seed), comparable=True)


def task_of_file(cfg: Config, run: Run, envs: list[Env], env: str) -> Task:
    """The steps of --data."""
    assert cfg.data is not None
    loaded = logged_data.load(cfg.data, cfg.data_format, run.print)
    try:
        data = loaded.fit(envs[0])
    except UserError as e:
        raise UserError(f"{e} (--envs ID: another environment; --envs none: learn from the log alone)") from None
    mismatch = reward_mismatch(data.transitions(), envs[:5], episode_seeds(run, len(envs[:5]), "paid"))
    if mismatch:
        run.print(
            f"{cfg.data.name}: {env} pays {mismatch[0]:.3g} a step, the logs say {mismatch[1]:.3g}: returns are in the "
            "environment's rewards, believed values in those of the logs, and the two are not compared"
        )
    return make_task(cfg, run, envs, env, data, comparable=mismatch is None)


def make_task(cfg: Config, run: Run, envs: list[Env], env: str, data: Dataset, comparable: bool) -> Task:
    name, spaces = task_name(env, data.name), Spaces.of(envs[0])
    scale, scaled = scaled_data(cfg, run, name, data, spaces)
    return Task(name, data, scale, scaled.transitions(), spaces, envs, comparable)


def task_of_log_alone(cfg: Config, run: Run) -> Task:
    """The steps of --data without an environment: its spaces from the data, some episodes held out."""
    assert cfg.data is not None
    loaded = logged_data.load(cfg.data, cfg.data_format, run.print)
    data, spaces = loaded.alone(cfg.states, cfg.action_low, cfg.action_high)
    run.print(f"{cfg.data.name}: learned from alone, {spaces.said}")
    name = task_name("log", data.name)
    scale, scaled = scaled_data(cfg, run, name, data, spaces)
    rest, held = log_alone.split(run, scaled, cfg.held_out, spaces.action_dim, cfg.gamma, scale.rewards)
    return Task(name, data, scale, rest.transitions(), spaces, [], False, held)


def scaled_data(cfg: Config, run: Run, name: str, data: Dataset, spaces: Spaces) -> tuple[Scale, Dataset]:
    scale = Scale.of(data, spaces, cfg.reward_scale_continuous if data.continuous else cfg.reward_scale)
    scaled = scale.data(data)
    if cfg.shuffle_actions:
        rows = torch.randperm(len(scaled), generator=run.generator("shuffle", name))
        scaled = replace(scaled, actions=scaled.actions[rows])
    return scale, scaled


def task_name(env: str, data: str) -> str:
    """CartPole-v1, expert → cartpole_expert; mine:My-World-v0, a log → my_world_a_log."""
    short = re.sub(r"-v\d+$", "", env.split(":")[-1].split("/")[-1])
    return "_".join(re.sub(r"[^a-z0-9]+", "_", part.lower()).strip("_") for part in (short, data))
