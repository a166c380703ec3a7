"""PPO with the clipped surrogate on gymnasium: the same learner at several λ, and how many steps each of them needs.

Schulman et al. 2017 (arXiv:1707.06347); the details are those of Huang et al. 2022, "The 37 implementation details of
PPO". One step of the loop is one rollout of all environments and the updates made of it.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from finetune import ops
from finetune.rl.advantages import whitened
from finetune.rl.agents import networks
from finetune.rl.agents.reward_scale import RewardSize
from finetune.rl.agents.surrogate import (
    approximate_kl,
    clip_fraction,
    clipped_surrogate,
    explained_variance,
    value_loss,
)
from finetune.rl.envs import environments
from finetune.rl.envs.evaluation import returns
from finetune.rl.envs.rollout import Rollout, episode_seeds
from finetune.rl.envs.vector import VectorEnv
from finetune.rl.statistics import mean_and_error

SOLVED, WINDOW = 475.0, 20  # CartPole-v1 counts as solved at this mean return of so many last episodes
JUDGED = 0.95  # the λ that is held to a target


def race(cfg: Any, run, cut: environments.EpisodeLimit) -> dict[float, list[dict[str, Any]]]:
    """`--ppo-repeats` trainings with each λ. Repetition i begins with the same weights and episodes whatever the λ."""
    envs = environments.make(cfg.ppo_env, cfg.ppo_envs, episode_limit=cut)
    trained = {lam: [train(cfg, run, lam, i, envs) for i in range(cfg.ppo_repeats)] for lam in cfg.ppo_lambdas}
    steps = {lam: statistics.median(r["steps"] for r in runs) for lam, runs in trained.items()}
    for lam, runs in trained.items():
        name, aimed = f"{lam:g}".replace(".", "_"), lam == JUDGED and cfg.ppo_env == "CartPole-v1"
        target = (195.0 if run.toy else 400.0) if aimed else None
        untrained, _ = mean_and_error([r["before"] for r in runs])
        after, error = mean_and_error([r["after"] for r in runs])
        run.result(f"ppo_return_{name}", after, error=error, baseline=untrained, target=target)
        run.result(f"ppo_steps_{name}", steps[lam], baseline=steps.get(0.0) if aimed else None, higher=False)
    return trained


def train(cfg: Any, run, lam: float, repeat: int, envs: list[Any]) -> dict[str, Any]:
    """One training: returns before and after, the mean of the last episodes after each update, and the steps of the
    environments until it first was `SOLVED`; all of them if it never was."""
    run.seed("ppo", repeat)
    learner, vector = Learner(cfg, envs), VectorEnv(envs, run.generator("ppo", repeat).initial_seed())
    updates, size = min(cfg.ppo_updates, cfg.steps), cfg.ppo_horizon * cfg.ppo_envs
    before = evaluate(cfg, run, learner, "before", repeat, envs[0].episode_limit)
    past: dict[str, Any] = {"recent": [], "curve": [], "steps": 0}
    unit = RewardSize()  # in which the critic learns: in any other its gradient would outweigh the policy's
    state = learner.state() | {"vector": vector, "past": past, "cut": envs[0].episode_limit, "rewards": unit}
    for step in run.steps(updates, state, phase=f"ppo_{lam:g}_{repeat}"):
        generator = run.generator("ppo", repeat, step)  # the same for every λ
        rollout = vector.collect(learner.acting(generator), cfg.ppo_horizon)
        rollout.rewards = rollout.rewards / unit.see(rollout.rewards)
        batch = judged(learner, rollout, cfg.ppo_gamma, lam)
        if cfg.shuffle_rewards:
            batch.advantages = batch.advantages[torch.randperm(len(batch.advantages), generator=generator)]
        found = update(learner, batch, cfg, 1 - step / updates, generator)
        past["recent"] = (past["recent"] + [earned for earned, _ in vector.pop_finished()])[-WINDOW:]
        mean = sum(past["recent"]) / max(1, len(past["recent"]))
        past["curve"].append(mean)
        if not past["steps"] and len(past["recent"]) == WINDOW and mean >= SOLVED:
            past["steps"] = (step + 1) * size
        run.log(step, **{"return": mean}, **found)
    after = evaluate(cfg, run, learner, "after", repeat, envs[0].episode_limit)
    run.print(f"PPO, λ = {lam:g}, training {repeat}: {fmean(before):.0f} before, {fmean(after):.0f} after")
    return {"before": before, "after": after, "curve": past["curve"], "steps": past["steps"] or updates * size,
            "solved": past["steps"] > 0}  # fmt: skip


def evaluate(cfg: Any, run, learner: Learner, when: str, repeat: int, cut: environments.EpisodeLimit) -> list[float]:
    """Returns of twenty fresh episodes, actions drawn as in training."""
    seeds = episode_seeds(run, 20, "evaluation", when, repeat)
    act = learner.acting(run.generator("evaluation", when, repeat))
    return returns(environments.make(cfg.ppo_env, 20, episode_limit=cut), act, seeds)


@dataclass
class Batch:
    """The steps of a rollout in one row, with what the policy and the critic said when they were made."""

    observations: Tensor  # (B, D)
    actions: Tensor  # (B,) or (B, A)
    log_probs: Tensor  # (B,)
    values: Tensor  # (B,)
    advantages: Tensor  # (B,)
    targets: Tensor  # (B,) λ-returns

    def part(self, rows: Tensor) -> Batch:
        return Batch(**{name: column[rows] for name, column in vars(self).items()})


class Learner:
    """Policy and critic, each a network of its own, under one optimizer."""

    def __init__(self, cfg: Any, envs: list[Any]) -> None:
        observations, actions, continuous = environments.sizes(envs[0])
        hidden = [cfg.ppo_hidden, cfg.ppo_hidden]
        self.policy: Any = (networks.Gaussian if continuous else networks.Categorical)(observations, actions, hidden)
        self.value = networks.Value(observations, hidden)
        self.parameters = [*self.policy.parameters(), *self.value.parameters()]
        self.optimizer = torch.optim.Adam(self.parameters, lr=cfg.ppo_lr, eps=1e-5, fused=True)

    def state(self) -> dict[str, Any]:
        return {"policy": self.policy, "value": self.value, "optimizer": self.optimizer}

    def acting(self, generator: torch.Generator) -> environments.Act:
        return lambda observations: self.policy.sample(self.policy(observations), generator)


@torch.no_grad()
def judged(learner: Learner, rollout: Rollout, gamma: float, lam: float) -> Batch:
    """The rollout with its advantages, which are of the critic before the updates."""
    values = learner.value(rollout.observations)  # (T, N)
    advantages, targets = ops.gae(
        rollout.rewards, values, learner.value(rollout.next_observations), rollout.terminated, rollout.truncated,
        gamma=gamma, lam=lam,
    )  # fmt: skip
    log_probs = learner.policy.log_prob(learner.policy(rollout.observations), rollout.actions)
    columns = (rollout.observations, rollout.actions, log_probs, values, advantages, targets)
    return Batch(*(column.flatten(0, 1) for column in columns))


def update(learner: Learner, batch: Batch, cfg: Any, left: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Several passes over the batch in minibatches; `left` is the part of learning rate and clip that is left."""
    for group in learner.optimizer.param_groups:
        group["lr"] = left * cfg.ppo_lr
    rows, size = len(batch.values), -(-len(batch.values) // cfg.ppo_minibatches)
    kl, clipped = [], []
    for _ in range(cfg.ppo_epochs):
        for chosen in torch.randperm(rows, generator=generator).split(size):
            loss, log_ratios = ppo_loss(learner, batch.part(chosen), cfg)
            learner.optimizer.zero_grad()
            loss.backward()
            ops.clip_grad_norm_([p.grad for p in learner.parameters], cfg.ppo_max_norm)
            learner.optimizer.step()
            kl.append(approximate_kl(log_ratios).mean())
            clipped.append(clip_fraction(log_ratios, cfg.ppo_clip))
    found = {"kl": torch.stack(kl).mean(), "clip_fraction": torch.stack(clipped).mean()}
    explained = explained_variance(batch.values, batch.targets)
    return found if explained.isnan() else found | {"explained_variance": explained}  # NaN: the targets are all alike


def ppo_loss(learner: Learner, batch: Batch, cfg: Any) -> tuple[Tensor, Tensor]:
    """(clipped surrogate + value_weight · value loss − entropy bonus, log ratios) of one minibatch."""
    params = learner.policy(batch.observations)
    log_ratios = learner.policy.log_prob(params, batch.actions) - batch.log_probs
    policy_loss = clipped_surrogate(log_ratios, whitened(batch.advantages), cfg.ppo_clip).mean()
    critic_loss = value_loss(learner.value(batch.observations), batch.targets).mean()
    entropy = learner.policy.entropy(params).mean()
    return policy_loss + cfg.ppo_value_weight * critic_loss - cfg.ppo_entropy * entropy, log_ratios.detach()
