"""One training task: a set of logged steps, rewards scaled for learning, and the environment to evaluate in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from finetune.rl.agents.offline import reward_mismatch
from finetune.rl.envs import environments, logged_data
from finetune.rl.envs.environments import Env
from finetune.rl.envs.logged_data import Dataset
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
    envs: list[Env]  # for evaluation only
    comparable: bool  # whether the logs have the environment's rewards
    seeds: list[int]  # of the evaluation episodes: the same for every learner and step


def prepare(cfg: Config, run: Run, name: str, limit: environments.EpisodeLimit) -> Task:
    """Generates the set of this name, or reads --data."""
    env, quality = (cfg.env, "") if cfg.data else SETS[name]
    envs = environments.make(env, cfg.eval_episodes, episode_limit=limit)
    if cfg.data:
        data = logged_data.load(cfg.data)
    else:
        count = max(cfg.data_steps // (25 if quality == "expert" else 1), 100)
        data = logged_data.generate(env, quality, count, run.generator("data", name).initial_seed())
    data = data.fit(envs[0])
    if cfg.shuffle_actions:
        data.actions = data.actions[torch.randperm(len(data), generator=run.generator("shuffle", name))]

    largest, gamma, batch = cfg.reward_scale, cfg.gamma, cfg.batch
    if data.continuous:
        largest, gamma, batch = cfg.reward_scale_continuous, cfg.gamma_continuous, cfg.batch_continuous
    scale = largest / data.reward_size
    steps = replace(data.transitions(), rewards=data.rewards * scale)
    if cfg.calibrated and data.continuous:
        steps.returns_to_go = data.returns_to_go(gamma) * scale

    seeds = episode_seeds(run, cfg.eval_episodes, "evaluation", name)
    mismatch = reward_mismatch(data.transitions(), envs[:5], seeds[:5]) if cfg.data else None
    if cfg.data and mismatch:
        run.print(
            f"{cfg.data.name}: {env} pays {mismatch[0]:.3g} a step, the logs say {mismatch[1]:.3g}: returns are in the "
            "environment's rewards, believed values in those of the logs, and the two are not compared"
        )
    return Task(name, data, steps, scale, gamma, batch, envs, mismatch is None, seeds)
