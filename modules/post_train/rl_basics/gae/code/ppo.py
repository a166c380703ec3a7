"""PPO with the clipped surrogate (Schulman et al. 2017, arXiv:1707.06347): networks, advantages, update, loop.

    L = −E[min(r A, clamp(r, 1 − ε, 1 + ε) A)] + c_v E[(V − V_target)²] − c_e H[π]        r = π(a|s) / π_old(a|s)

A by GAE; the details are those of Huang et al. 2022, "The 37 implementation details of PPO". An update is a rollout of
all environments and several passes over it. `train` trains once; `compare` trains with several λ.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from finetune import ops
from finetune.rl.advantages import whitened
from finetune.rl.agents import networks
from finetune.rl.agents.reward_scale import RewardSize
from finetune.rl.agents.surrogate import approximate_kl, clip_fraction, explained_variance
from finetune.rl.envs import environments
from finetune.rl.envs.evaluation import returns
from finetune.rl.envs.rollout import Rollout, episode_seeds
from finetune.rl.envs.vector import VectorEnv
from finetune.rl.statistics import mean_and_error
from finetune.runs.display import uncertain
from finetune.runs.run import Run

if TYPE_CHECKING:
    from .main import Config

SOLVED, WINDOW = 475.0, 20  # CartPole-v1 counts as solved at this mean return of the last 20 episodes
USUAL = 0.95  # the λ with a target


@dataclass
class Batch:
    """The steps of a rollout in one row, with what policy and critic computed before the updates."""

    observations: Tensor  # (B, D)
    actions: Tensor  # (B,) or (B, A)
    log_probs: Tensor  # (B,)
    values: Tensor  # (B,)
    advantages: Tensor  # (B,)
    targets: Tensor  # (B,) λ-returns

    def rows(self, chosen: Tensor) -> Batch:
        return Batch(**{name: column[chosen] for name, column in vars(self).items()})


class PPO:
    """A policy and a critic, each a network of its own, under one optimizer; a `Learner` of rollouts."""

    def __init__(self, cfg: Config, envs: list[environments.Env], lam: float) -> None:
        self.cfg, self.lam = cfg, lam
        observations, actions, continuous = environments.sizes(envs[0])
        hidden = [cfg.ppo_hidden, cfg.ppo_hidden]
        self.policy: Any = (networks.Gaussian if continuous else networks.Categorical)(observations, actions, hidden)
        self.value = networks.Value(observations, hidden)
        self.parameters = [*self.policy.parameters(), *self.value.parameters()]
        self.optimizer = torch.optim.Adam(self.parameters, lr=cfg.ppo_lr, eps=1e-5, fused=True)

    def act(self, observations: Tensor, rng: torch.Generator) -> Tensor:
        return self.policy.sample(self.policy(observations), rng)

    def greedy(self, observations: Tensor) -> Tensor:
        return self.policy.mode(self.policy(observations))

    @property
    def state(self) -> dict[str, Any]:
        return {"policy": self.policy, "value": self.value, "optimizer": self.optimizer}

    # --- Advantages

    @torch.no_grad()
    def batch(self, rollout: Rollout) -> Batch:
        """GAE with the critic before the updates. V of the state that a step reached, so a time limit bootstraps."""
        values = self.value(rollout.observations)  # (T, N)
        advantages, targets = ops.gae(
            rollout.rewards, values, self.value(rollout.next_observations), rollout.terminated, rollout.truncated,
            gamma=self.cfg.ppo_gamma, lam=self.lam,
        )  # fmt: skip
        log_probs = self.policy.log_prob(self.policy(rollout.observations), rollout.actions)
        columns = (rollout.observations, rollout.actions, log_probs, values, advantages, targets)
        return Batch(*(column.flatten(0, 1) for column in columns))

    # --- Update

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss of one minibatch, and its log r."""
        cfg, A = self.cfg, whitened(batch.advantages)
        params = self.policy(batch.observations)
        log_ratios = self.policy.log_prob(params, batch.actions) - batch.log_probs
        r = log_ratios.exp()
        policy_loss = -torch.minimum(r * A, r.clamp(1 - cfg.ppo_clip, 1 + cfg.ppo_clip) * A).mean()
        value_loss = (self.value(batch.observations) - batch.targets).square().mean()
        entropy = self.policy.entropy(params).mean()
        return policy_loss + cfg.ppo_value_weight * value_loss - cfg.ppo_entropy * entropy, log_ratios.detach()

    def update(self, rollout: Rollout, rng: torch.Generator) -> dict[str, Tensor]:
        """`--ppo-epochs` passes over the rollout in minibatches, each in a new order."""
        cfg, batch = self.cfg, self.batch(rollout)
        if cfg.shuffle_rewards:
            batch.advantages = batch.advantages[torch.randperm(len(batch.advantages), generator=rng)]
        count = len(batch.values)
        kl, clipped = [], []
        for _ in range(cfg.ppo_epochs):
            for chosen in torch.randperm(count, generator=rng).split(-(-count // cfg.ppo_minibatches)):
                loss, log_ratios = self.loss(batch.rows(chosen))
                self.optimizer.zero_grad()
                loss.backward()
                ops.clip_grad_norm_([p.grad for p in self.parameters if p.grad is not None], cfg.ppo_max_norm)
                self.optimizer.step()
                kl.append(approximate_kl(log_ratios).mean())
                clipped.append(clip_fraction(log_ratios, cfg.ppo_clip))
        found = {"kl": torch.stack(kl).mean(), "clip_fraction": torch.stack(clipped).mean()}
        explained = explained_variance(batch.values, batch.targets)
        return found if explained.isnan() else found | {"explained_variance": explained}  # NaN: all targets are equal


# --- Loop


@dataclass
class Training:
    """What one training gave: returns of twenty episodes before and after, the mean return of the last episodes after
    each update, and the steps of the environments until it was first `SOLVED`; all of them if it never was."""

    before: list[float]
    after: list[float]
    curve: list[float]
    steps: int
    solved: bool


def train(cfg: Config, run: Run, lam: float, repeat: int, envs: list[environments.Env]) -> Training:
    """Repetition i has the same initial weights, seeds of episodes and random numbers for every λ."""
    run.seed("ppo", repeat)
    learner = PPO(cfg, envs, lam)
    vector = VectorEnv(envs, run.generator("ppo", repeat).initial_seed())
    updates, size = min(cfg.ppo_updates, cfg.steps), cfg.ppo_horizon * cfg.ppo_envs
    before = evaluate(cfg, run, learner, "before", repeat, envs[0].episode_limit)
    unit = RewardSize()  # of rewards; in a larger one the critic's gradient would outweigh the policy's
    past: dict[str, Any] = {"recent": [], "curve": [], "steps": 0}
    state = learner.state | {"vector": vector, "past": past, "episode_limit": envs[0].episode_limit, "rewards": unit}
    for step in run.steps(updates, state, phase=f"ppo_{lam:g}_{repeat}"):
        rng = run.generator("ppo", repeat, step)
        for group in learner.optimizer.param_groups:
            group["lr"] = cfg.ppo_lr * (1 - step / updates)
        rollout = vector.collect(partial(learner.act, rng=rng), cfg.ppo_horizon)
        rollout.rewards = rollout.rewards / unit.see(rollout.rewards)
        found = learner.update(rollout, rng)
        past["recent"] = (past["recent"] + [earned for earned, _ in vector.pop_finished()])[-WINDOW:]
        mean = sum(past["recent"]) / max(1, len(past["recent"]))
        past["curve"].append(mean)
        if not past["steps"] and len(past["recent"]) == WINDOW and mean >= SOLVED:
            past["steps"] = (step + 1) * size
        run.log(step, **{"return": mean}, **found)
    after = evaluate(cfg, run, learner, "after", repeat, envs[0].episode_limit)
    run.print(f"PPO, λ = {lam:g}, training {repeat}: {fmean(before):.0f} before, {fmean(after):.0f} after")
    return Training(before, after, past["curve"], past["steps"] or updates * size, past["steps"] > 0)


def evaluate(
    cfg: Config, run: Run, learner: PPO, when: str, repeat: int, limit: environments.EpisodeLimit
) -> list[float]:
    """Returns of twenty fresh episodes, actions sampled as in training."""
    seeds = episode_seeds(run, 20, "evaluation", when, repeat)
    rng = run.generator("evaluation", when, repeat)
    envs = environments.make(cfg.ppo_env, 20, episode_limit=limit, args=cfg.env_arg)
    return returns(envs, partial(learner.act, rng=rng), seeds)


# --- Comparison over λ


def compare(cfg: Config, run: Run, limit: environments.EpisodeLimit) -> dict[float, list[Training]]:
    """`--ppo-repeats` trainings with each λ. The result is that of λ = 0.95; the others are checks and a table."""
    envs = environments.make(cfg.ppo_env, cfg.ppo_envs, episode_limit=limit, args=cfg.env_arg)
    trained = {lam: [train(cfg, run, lam, i, envs) for i in range(cfg.ppo_repeats)] for lam in cfg.ppo_lambdas}
    steps = {lam: statistics.median(t.steps for t in trainings) for lam, trainings in trained.items()}
    rows = []
    for lam, trainings in trained.items():
        name = f"{lam:g}".replace(".", "_")
        untrained, _ = mean_and_error([t.before for t in trainings])
        after, error = mean_and_error([t.after for t in trainings])
        if lam == USUAL:
            target = (195.0 if run.toy else 400.0) if cfg.ppo_env == "CartPole-v1" else None
            run.result(f"ppo_return_{name}", after, error=error, baseline=untrained, target=target)
            run.result(f"ppo_steps_{name}", steps[lam], baseline=steps.get(0.0), higher=False)
        else:
            run.check(f"ppo_return_{name}", after, error=error)
            run.check(f"ppo_steps_{name}", steps[lam])
        rows.append({"λ": f"{lam:g}", "return": uncertain(after, error), "steps until solved": f"{steps[lam]:.0f}",
                     "solved": f"{sum(t.solved for t in trainings)} of {len(trainings)}"})  # fmt: skip
    run.table(f"PPO on {cfg.ppo_env} by λ: mean return after training ± standard error; median of the steps", rows)
    return trained
