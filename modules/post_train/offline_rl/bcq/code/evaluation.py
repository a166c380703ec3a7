"""What a learned policy earns, what its learner believes, and what fitted Q evaluation finds from the logs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from finetune.rl.agents.networks import QNetwork, TwinQ
from finetune.rl.agents.offline import FQE, OfflineLearner, own_value, return_bounds
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
    `overestimate`, believed − true. With a log alone there is `believed` only, at the held-out starts.
    """
    rng, scale = run.generator("acting"), task.scale
    if task.held:
        believed = own_value(learner, task.held.starts, rng)
        return {} if believed is None else {"believed": believed.mean().item() / scale.rewards}

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


def fitted_q_evaluation(cfg: Config, run: Run, task: Task, learner: OfflineLearner | None) -> Tensor:
    """Values of the starts by FQE (E,), from the logged steps alone, in the environment's rewards. With a log alone
    from the held-out episodes; None is then the behavior policy."""
    spaces, held, hidden, rng = task.spaces, task.held, [cfg.hidden, cfg.hidden], run.generator("fqe")

    def policy(observations: Tensor) -> Tensor:
        assert learner is not None
        return torch.cat([learner.policy(part, rng) for part in observations.split(1000)])

    if task.data.continuous:
        q: QNetwork | TwinQ = TwinQ(spaces.obs_dim, spaces.action_dim, hidden, count=1)
    else:
        q = QNetwork(spaces.observed, spaces.action_dim, hidden)
    if held:
        steps, starts, total = held.steps if learner else held.followed, held.starts, cfg.fqe_steps
    else:
        resets = [e.reset(seed=s)[0] for e, s in zip(task.envs, eval_seeds(cfg, run), strict=True)]
        steps, starts = task.steps, task.scale.observations(torch.from_numpy(np.stack(resets)))
        total = min(cfg.fqe_steps, cfg.steps)
    next_policy = policy(steps.next_observations) if learner or held is None else held.next_policy
    limits = return_bounds(task.steps.rewards, cfg.gamma) if held and cfg.gamma < 1 else (-math.inf, math.inf)
    fqe = FQE(q, steps, next_policy, gamma=cfg.gamma, lr=cfg.lr, tau=cfg.fqe_polyak, limits=limits)
    for step in range(total):
        fqe.update(torch.randint(len(steps), (cfg.fqe_batch,), generator=run.generator("fqe_rows", step)))
    first_policy = policy(starts) if learner or held is None else held.first_policy
    return fqe.value(starts, first_policy) / task.scale.rewards
