"""What the learned policies earn, what each learner believes, and what fitted Q evaluation finds from the logs."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from finetune.rl.agents.log_alone import BEHAVIOR
from finetune.rl.agents.networks import QNetwork, TwinQ
from finetune.rl.agents.offline import FQE, OfflineLearner, in_parts, own_value, return_bounds
from finetune.rl.envs.environments import Act
from finetune.rl.envs.evaluation import returns, true_returns
from finetune.rl.envs.replay import Transitions
from finetune.rl.statistics import standard_error
from finetune.runs.run import Run

if TYPE_CHECKING:
    from .data import Task
    from .main import Config

TAIL = 150  # states so near a time limit are not compared: their returns-to-go are cut off
FQE_TAU = 0.05


def policy_of(learner: OfflineLearner, rng: torch.Generator) -> Act:
    return lambda observations: learner.act(observations, rng)


def mean_return(run: Run, task: Task, learner: OfflineLearner, step: int) -> float:
    """Mean undiscounted return of the evaluation episodes."""
    rng = run.generator("evaluation", task.name, step)
    return fmean(returns(task.envs, policy_of(learner, rng), task.seeds))


@dataclass
class Estimate:
    """Returns and values of one learner. Values are discounted, in the environment's rewards."""

    episodes: list[float]  # undiscounted returns
    true_each: Tensor  # discounted return of each episode
    believed_each: Tensor | None  # the learner's own value of its start; cloning has none
    fqe_each: Tensor | None  # fitted Q evaluation's value of its start
    values: Tensor | None  # the learner's own values of states on the way
    returns_to_go: Tensor  # the discounted returns from these states

    @property
    def true(self) -> float:
        return float(self.true_each.mean())

    @property
    def believed(self) -> float | None:
        return None if self.believed_each is None else float(self.believed_each.mean())

    @property
    def fqe(self) -> float | None:
        return None if self.fqe_each is None else float(self.fqe_each.mean())

    def overestimate(self, other: Estimate | None = None) -> tuple[float, float]:
        """(mean of believed − true over the episodes, its standard error). other: the difference to another learner's
        overestimate from the same starts."""
        assert self.believed_each is not None
        errors = self.believed_each - self.true_each
        if other is not None:
            assert other.believed_each is not None
            errors = errors - (other.believed_each - other.true_each)
        return float(errors.mean()), standard_error(errors.tolist())


@dataclass
class Judged:
    """With a log alone: values of the held-out starts, discounted, in the data's rewards."""

    fqe: dict[str, Tensor]  # of each learner and of the behavior policy (E,)
    believed: dict[str, float]  # means of the learners' own


def estimate(cfg: Config, run: Run, task: Task, learners: dict[str, OfflineLearner]) -> dict[str, Estimate]:
    played = {}
    for name, learner in learners.items():
        act = policy_of(learner, run.generator("evaluation", task.name))
        played[name] = true_returns(task.envs, act, task.seeds, task.gamma)
    starts = played["bc"][0].observations[0]
    fqe = fitted_q_evaluation(cfg, run, task, task.steps, learners, starts, min(cfg.fqe_steps, cfg.steps))
    rng = run.generator("values", task.name)

    def believed(learner: OfflineLearner, observations: Tensor) -> Tensor | None:
        """V(s) = Q(s, π(s)) in the environment's rewards."""
        values = own_value(learner, observations, rng)
        return None if values is None else values / task.reward_scale

    estimates = {}
    for name, (rollout, to_go) in played.items():
        steps_left = rollout.first_episode.flip(0).cumsum(0).flip(0)
        counted = rollout.first_episode & ((steps_left > TAIL) | rollout.terminated.any(0))
        estimates[name] = Estimate(
            episodes=rollout.rewards.sum(0).tolist(),
            true_each=to_go[0],
            believed_each=believed(learners[name], starts),
            fqe_each=fqe[name] / task.reward_scale if fqe else None,
            values=believed(learners[name], rollout.observations[counted]),
            returns_to_go=to_go[counted],
        )
    return estimates


def fitted_q_evaluation(
    cfg: Config,
    run: Run,
    task: Task,
    steps: Transitions,
    learners: dict[str, OfflineLearner],
    starts: Tensor,
    total: int,
) -> dict[str, Tensor]:
    """FQE of every learner's policy from these logged steps: its values of the `starts` (N,), in scaled rewards. With a
    log alone also of the behavior policy. total: steps of --updates updates; at 0 there are no values."""
    if not total:
        return {}
    rng, limits = run.generator("fqe", task.name), return_bounds(task.steps.rewards, task.gamma)
    spaces, hidden = task.spaces, [cfg.hidden, cfg.hidden]
    evaluations, at_starts = {}, {}

    def policy(learner: OfflineLearner, observations: Tensor) -> Tensor:
        return in_parts(lambda part: learner.policy(part, rng), observations)

    def add(name: str, steps: Transitions, policy: Tensor) -> None:
        run.seed("fqe")
        if task.data.continuous:
            q: TwinQ | QNetwork = TwinQ(spaces.obs_dim, spaces.action_dim, hidden, count=1)
        else:
            q = QNetwork(spaces.observed, spaces.action_dim, hidden)
        evaluations[name] = FQE(q, steps, policy, gamma=task.gamma, lr=cfg.lr, tau=FQE_TAU, limits=limits)

    for name, learner in learners.items():
        add(name, steps, policy(learner, steps.next_observations))
    if task.held and len(task.held.followed):
        add(BEHAVIOR, task.held.followed, task.held.next_policy)
        at_starts[BEHAVIOR] = task.held.first_policy
    state = {f"{name}_{part}": value for name, fqe in evaluations.items() for part, value in fqe.state.items()}
    for step in run.steps(total, state, phase=f"{task.name}_fqe"):
        losses = {}
        for name, fqe in evaluations.items():
            rows = run.generator("fqe", task.name, step)
            batches = torch.randint(len(fqe.data), (cfg.updates, task.batch), generator=rows)
            losses[name] = 0.0
            for i, batch in enumerate(batches):
                fqe.optimizer.param_groups[0]["lr"] = cfg.lr * (1 - (step + i / cfg.updates) / total)
                losses[name] += fqe.update(batch) / cfg.updates
        run.log(step, **{f"td_error_{name}": value for name, value in losses.items()})
    at_starts |= {name: policy(learner, starts) for name, learner in learners.items()}
    return {name: fqe.value(starts, at_starts[name]) for name, fqe in evaluations.items()}


def judge(cfg: Config, run: Run, task: Task, learners: dict[str, OfflineLearner]) -> Judged:
    """FQE's values of the held-out starts, of every learner and of the behavior policy, and what each learner believes
    of them, in the data's rewards."""
    assert task.held is not None
    starts, rng = task.held.starts, run.generator("values", task.name)
    fqe = fitted_q_evaluation(cfg, run, task, task.held.steps, learners, starts, cfg.fqe_steps)
    believed = {name: own_value(learner, starts, rng) for name, learner in learners.items()}
    return Judged(
        {name: values / task.reward_scale for name, values in fqe.items()},
        {name: float(v.mean()) / task.reward_scale for name, v in believed.items() if v is not None},
    )
