"""What a learned policy earns, what its learner believes, and what fitted Q evaluation finds from the logs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from finetune.rl.agents.networks import QNetwork, TwinQ
from finetune.rl.agents.offline import FQE, OfflineLearner
from finetune.rl.envs.evaluation import true_returns
from finetune.rl.envs.rollout import episode_seeds
from finetune.rl.statistics import standard_error
from finetune.runs.run import Run

if TYPE_CHECKING:
    from .data import Task
    from .main import Config

LOG_EVERY = 10  # updates between two rows of metrics.csv


def eval_seeds(cfg: Config, run: Run) -> list[int]:
    """Seeds of the episodes that every learner is evaluated on."""
    return episode_seeds(run, cfg.eval_episodes, "evaluation")


def evaluate(cfg: Config, run: Run, task: Task, learner: OfflineLearner) -> dict[str, float]:
    """Means over fresh episodes, in the environment's rewards, and their standard errors as `…_error`:

    `return`, undiscounted; `true`, the discounted return from the start; `believed`, the learner's own Q there;
    `overestimate`, believed − true.
    """
    rng, scale = run.generator("acting"), task.scale

    def act(observations: Tensor) -> Tensor:
        return scale.to_env(learner.act(scale.observations(observations), rng))

    rollout, discounted = true_returns(task.envs, act, eval_seeds(cfg, run), cfg.gamma)
    found = {"return": rollout.rewards.sum(0), "true": discounted[0]}
    starts, first_actions = scale.observations(rollout.observations[0]), scale.to_learner(rollout.actions[0])
    believed = learner.value(starts, first_actions)
    if believed is not None:
        found |= {"believed": believed / scale.rewards, "overestimate": believed / scale.rewards - discounted[0]}
    means = {name: values.mean().item() for name, values in found.items()}
    return means | {f"{name}_error": standard_error(values.tolist()) for name, values in found.items()}


def curve(found: dict[str, float]) -> dict[str, float]:
    """The part of what `evaluate` finds that is logged in metrics.csv."""
    return {name: found[name] for name in ("return", "true", "believed") if name in found}


def fitted_q_evaluation(cfg: Config, run: Run, task: Task, learner: OfflineLearner) -> float:
    """Mean value of the starts by FQE, from the logged steps alone, in the environment's rewards."""
    env, hidden, rng = task.envs[0], [cfg.hidden, cfg.hidden], run.generator("fqe")

    def policy(observations: Tensor) -> Tensor:
        return torch.cat([learner.policy(part, rng) for part in observations.split(1000)])

    if env.continuous:
        q: QNetwork | TwinQ = TwinQ(env.obs_dim, env.action_dim, hidden, count=1)
    else:
        q = QNetwork(env.obs_dim, env.action_dim, hidden)
    next_policy = policy(task.steps.next_observations)
    fqe = FQE(q, task.steps, next_policy, gamma=cfg.gamma, lr=cfg.lr, tau=cfg.fqe_polyak)
    for step in range(min(cfg.fqe_steps, cfg.steps)):
        fqe.update(torch.randint(len(task.steps), (cfg.fqe_batch,), generator=run.generator("fqe_rows", step)))
    resets = [e.reset(seed=s)[0] for e, s in zip(task.envs, eval_seeds(cfg, run), strict=True)]
    starts = task.scale.observations(torch.from_numpy(np.stack(resets)))
    return fqe.value(starts, policy(starts)).mean().item() / task.scale.rewards
