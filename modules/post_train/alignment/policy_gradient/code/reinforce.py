"""REINFORCE with a baseline (Williams 1992): networks, whole episodes, the update, the training loop.

    ∇J = E[ Σ_t γ^t ∇ log π(a_t|s_t) · (G_t − b_t) ]

Options: the factor γ^t of the theorem, and several steps on one batch with importance ratios (`--reuse`).
"""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from finetune import ops, optim
from finetune.rl.agents import networks as nets
from finetune.rl.agents.reward_scale import RewardSize
from finetune.rl.envs import environments
from finetune.rl.envs.rollout import Rollout, episode_seeds
from finetune.runs.run import Run

from .baselines import LearnedBaseline, advantages, discounts
from .off_policy import effective_sample_size

if TYPE_CHECKING:
    from .main import Config


# --- Networks


def networks(cfg: Config, run: Run, envs: list[environments.Env]) -> tuple[Any, LearnedBaseline]:
    """A policy and a learned baseline; the same initial weights for every method, so that their curves start alike."""
    run.seed("networks")
    observations, actions, continuous = environments.sizes(envs[0])
    hidden = [cfg.hidden, cfg.hidden]
    policy = (nets.Gaussian if continuous else nets.Categorical)(observations, actions, hidden)
    return policy, LearnedBaseline(observations, hidden, cfg.gamma, cfg.value_lr, cfg.value_epochs)


# --- Collection


def acting(policy: Any, generator: torch.Generator) -> environments.Act:
    """The policy with actions drawn from its distribution."""
    return lambda observations: policy.sample(policy(observations), generator)


def collect(run: Run, policy: Any, envs: list[environments.Env], *key: Any) -> Rollout:
    """One whole episode of each environment. Seeds depend on the key only, so a resumed run plays the same ones."""
    seeds = episode_seeds(run, len(envs), "episodes", *key)
    return environments.play(envs, acting(policy, run.generator("actions", *key)), seeds)


class Batch:
    """The steps of all episodes in one row, with advantages of root mean square 1. Their mean is not subtracted: that
    would be a second baseline."""

    def __init__(self, cfg: Config, rollout: Rollout, advantages: Tensor, shuffle: torch.Generator) -> None:
        alive = rollout.first_episode
        if cfg.discount_correction:
            advantages = discounts(cfg.gamma, advantages) * advantages
        chosen = advantages[alive]
        if cfg.shuffle_advantages:
            chosen = chosen[torch.randperm(len(chosen), generator=shuffle)]
        self.observations, self.actions = rollout.observations[alive], rollout.actions[alive]
        self.advantages = chosen / chosen.square().mean().sqrt().clamp(min=1e-8)


# --- Update


def policy_loss(log_probs: Tensor, advantages: Tensor, alive: Tensor) -> Tensor:
    """−Σ log π(a_t|s_t) A_t over the steps that count. Its gradient is the policy gradient, negated."""
    return -(log_probs * advantages.detach() * alive).sum()


def update(cfg: Config, policy: Any, optimizer: torch.optim.Optimizer, batch: Batch, lr: float) -> dict[str, float]:
    """`--reuse` steps of Adam on −mean(w log π · A) − entropy bonus. The weight w is the ratio π/π_old of the action,
    at most `--ratio-bound`: it corrects which actions were taken, not which states were seen."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    old, weights = None, torch.ones_like(batch.advantages)
    for _ in range(cfg.reuse):
        params = policy(batch.observations)
        log_probs = policy.log_prob(params, batch.actions)
        if old is None:
            old, old_log_probs = params.detach(), log_probs.detach()
        elif cfg.correction == "step":
            weights = (log_probs.detach() - old_log_probs).exp().clamp(max=cfg.ratio_bound)
        entropy = policy.entropy(params).mean()
        loss = policy_loss(log_probs, weights * batch.advantages, torch.ones_like(weights)) / len(weights)
        optimizer.zero_grad()
        (loss - cfg.entropy * entropy).backward()
        norm = ops.clip_grad_norm_([p.grad for p in policy.parameters()], 1.0)
        optimizer.step()
    with torch.no_grad():
        kl = policy.kl(old, policy(batch.observations)).mean()
    found = {"entropy": entropy.item(), "kl": kl.item(), "grad_norm": float(norm)}
    return found | ({"effective": float(effective_sample_size(weights)) / len(weights)} if cfg.reuse > 1 else {})


# --- Loop


def train(cfg: Config, run: Run, envs: list[environments.Env]) -> nn.Module:
    """The policy after `--steps` updates, each from one episode of every environment."""
    policy, learned = networks(cfg, run, envs)
    optimizer = torch.optim.Adam(policy.parameters(), lr=cfg.lr)
    unit = RewardSize()
    state = {
        "policy": policy,
        "optimizer": optimizer,
        **learned.state,
        "episode_limit": envs[0].episode_limit,
        "rewards": unit,
    }
    for step in run.steps(cfg.steps, state, phase="reinforce"):
        rollout = collect(run, policy, envs, "reinforce", step)
        earned = fmean(rollout.rewards.sum(0).tolist())
        rollout.rewards = rollout.rewards + cfg.reward_shift * rollout.first_episode
        rollout.rewards = rollout.rewards / unit.see(rollout.rewards)
        values = learned.values(rollout) if cfg.baseline == "learned" else ()
        A, returns = advantages(rollout, cfg.gamma, cfg.baseline, *values)
        batch = Batch(cfg, rollout, A, run.generator("shuffle", "reinforce", step))
        found = update(cfg, policy, optimizer, batch, cfg.lr * optim.cosine(step, cfg.steps, 0, 1.0, 0.1))
        if cfg.baseline == "learned":
            found["value_loss"] = learned.fit(batch.observations, returns[rollout.first_episode])
        run.log(step, **{"return": earned}, **found)
    return policy
