"""One training task: a set of logged steps, rewards scaled for learning, and the environment to evaluate in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from finetune.errors import UserError
from finetune.rl.agents import log_alone
from finetune.rl.agents.log_alone import HeldOut
from finetune.rl.agents.offline import reward_mismatch
from finetune.rl.envs import environments, logged_data
from finetune.rl.envs.environments import Env
from finetune.rl.envs.logged_data import Dataset, Spaces
from finetune.rl.envs.replay import Transitions
from finetune.rl.envs.rollout import episode_seeds
from finetune.runs.run import Run

if TYPE_CHECKING:
    from .main import Config

# Name of a set → its environment and quality.
SETS = {
    **{name: ("CartPole-v1", name) for name in ("expert", "random", "medium", "mixed")},
    **{f"pendulum_{name}": ("Pendulum-v1", name) for name in ("expert", "random", "medium", "mixed")},
}


@dataclass
class Task:
    """A data set and what is needed to learn from it and to evaluate the result."""

    name: str
    data: Dataset
    steps: Transitions  # the data as learned from, with scaled rewards
    reward_scale: float
    gamma: float
    batch: int
    spaces: Spaces
    envs: list[Env]  # for evaluation only; empty with a log alone
    comparable: bool  # whether the logs have the environment's rewards
    seeds: list[int]  # of the evaluation episodes: the same for every learner and step
    held: HeldOut | None = None  # with a log alone: the episodes by which policies are judged

    @property
    def limit(self) -> dict[str, Any]:
        """The part of a checkpoint's state that is the environments'."""
        return {"limit": self.envs[0].episode_limit} if self.envs else {}


def prepare(cfg: Config, run: Run, name: str, limit: environments.EpisodeLimit) -> Task:
    """Generates the set of this name, or reads --data."""
    if cfg.data and cfg.env == "none":
        return from_log_alone(cfg, run, name)
    env, quality = (cfg.env, "") if cfg.data else SETS[name]
    envs = environments.make(env, cfg.eval_episodes, episode_limit=limit, args=cfg.env_arg if cfg.data else ())
    if cfg.data:
        data = logged_data.load(cfg.data, cfg.data_format, run.print)
    else:
        count = max(cfg.data_steps // (25 if quality == "expert" else 1), 100)
        data = logged_data.generate(env, quality, count, run.generator("data", name).initial_seed())
    try:
        data = data.fit(envs[0])
    except UserError as e:
        raise UserError(f"{e} (--env ID: another environment; --env none: learn from the log alone)") from None
    shuffle(cfg, run, name, data)
    largest, gamma, batch = settings(cfg, data)
    scale = largest / data.reward_size
    scaled = replace(data, rewards=data.rewards * scale)
    steps = with_returns(cfg, scaled, gamma)

    seeds = episode_seeds(run, cfg.eval_episodes, "evaluation", name)
    mismatch = reward_mismatch(data.transitions(), envs[:5], seeds[:5]) if cfg.data else None
    if cfg.data and mismatch:
        run.print(
            f"{cfg.data.name}: {env} pays {mismatch[0]:.3g} a step, the logs say {mismatch[1]:.3g}: returns are in the "
            "environment's rewards, believed values in those of the logs, and the two are not compared"
        )
    return Task(name, data, steps, scale, gamma, batch, Spaces.of(envs[0]), envs, mismatch is None, seeds)


def from_log_alone(cfg: Config, run: Run, name: str) -> Task:
    """The steps of --data without an environment: its spaces from the data, some episodes held out."""
    assert cfg.data is not None
    loaded = logged_data.load(cfg.data, cfg.data_format, run.print)
    data, spaces = loaded.alone(cfg.states, cfg.action_low, cfg.action_high)
    run.print(f"{cfg.data.name}: learned from alone, {spaces.said}")
    shuffle(cfg, run, name, data)
    largest, gamma, batch = settings(cfg, data)
    scale = largest / data.reward_size
    scaled = replace(data, rewards=data.rewards * scale)
    rest, held = log_alone.split(run, scaled, cfg.held_out, spaces.action_dim, gamma, scale)
    return Task(name, data, with_returns(cfg, rest, gamma), scale, gamma, batch, spaces, [], False, [], held)


def shuffle(cfg: Config, run: Run, name: str, data: Dataset) -> None:
    if cfg.shuffle_actions:
        data.actions = data.actions[torch.randperm(len(data), generator=run.generator("shuffle", name))]


def settings(cfg: Config, data: Dataset) -> tuple[float, float, int]:
    """(largest scaled reward, discount, rows of an update) for this kind of actions."""
    if data.continuous:
        return cfg.reward_scale_continuous, cfg.gamma_continuous, cfg.batch_continuous
    return cfg.reward_scale, cfg.gamma, cfg.batch


def with_returns(cfg: Config, data: Dataset, gamma: float) -> Transitions:
    """The data's transitions, for Cal-QL with the behavior policy's returns."""
    steps = data.transitions()
    if cfg.calibrated and data.continuous:
        steps.returns_to_go = data.returns_to_go(gamma)[data.usable]
    return steps
