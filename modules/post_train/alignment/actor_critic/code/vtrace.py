"""V-trace (Espeholt et al. 2018, arXiv:1802.01561): A2C from the steps of an older policy μ, corrected by π/μ.

    ρ = min(ρ̄, π/μ)    c = min(c̄, π/μ)    δ_t = r_t + γ V(s_{t+1}) − V(s_t)
    v_t = V(s_t) + ρ_t δ_t + γ c_t (v_{t+1} − V(s_{t+1}))        the critic's target
    A_t = ρ_t (r_t + γ v_{t+1} − V(s_t))                         the actor's advantage

IMPALA's actors act with whatever parameters they received last. Here the behavior policy is exactly `lag` updates old.
Networks and loss: those of a2c.py.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from finetune.rl import advantages as estimators
from finetune.rl.agents.learner import mean_metrics
from finetune.rl.agents.reward_scale import RewardSize
from finetune.rl.envs.environments import sizes
from finetune.rl.envs.rollout import Rollout
from finetune.rl.envs.vector import VectorEnv

from .a2c import ActorCritic, a2c_loss, clip_, next_state_values, shuffled

if TYPE_CHECKING:
    from .main import Config


class VTrace:
    def __init__(self, cfg: Config, envs: VectorEnv) -> None:
        self.cfg, self.envs = cfg, envs
        self.model = ActorCritic(*sizes(envs.envs[0]), cfg.hidden, cfg.shared_trunk, cfg.value_scale)
        self.rates = cfg.lr, cfg.critic_rate * cfg.lr  # of the actor, of the critic
        groups = [{"params": self.model.actor_parameters}, {"params": list(self.model.value.parameters())}]
        self.optimizer = torch.optim.Adam(groups, lr=0.0, eps=1e-5, fused=True)
        self.rewards = RewardSize()
        # A ring: from update k until update k + lag, row k mod lag holds the parameters before update k.
        self.past: dict[str, Any] = {"parameters": flat(self.model).repeat(cfg.lag, 1), "updates": 0}
        self.behavior = copy.deepcopy(self.model) if cfg.lag else self.model  # μ

    @property
    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "envs": self.envs, "rewards": self.rewards,
                "past": self.past}  # fmt: skip

    # --- Collection

    @torch.no_grad()
    def act(self, observations: Tensor, rng: torch.Generator) -> Tensor:
        return self.model.policy.sample(self.model.distribution(observations), rng)

    @torch.no_grad()
    def greedy(self, observations: Tensor) -> Tensor:
        return self.model.policy.mode(self.model.distribution(observations))

    def collect(self, rng: torch.Generator) -> Rollout:
        """(T, N) steps of the behavior policy, with rewards in units of the largest so far."""
        if self.cfg.lag:
            assign(self.behavior, self.past["parameters"][self.past["updates"] % self.cfg.lag])
        mu = self.behavior
        rollout = self.envs.collect(lambda obs: mu.policy.sample(mu.distribution(obs), rng), self.cfg.horizon)
        rollout.rewards = rollout.rewards / self.rewards.see(rollout.rewards)
        return rollout

    # --- Update

    def update(self, rollout: Rollout, rng: torch.Generator) -> dict[str, Tensor]:
        cfg, policy = self.cfg, self.model.policy
        params, values = self.model(rollout.observations)  # (T, N, P), (T, N)
        log_probs, entropies = policy.log_prob(params, rollout.actions), policy.entropy(params)  # (T, N)
        baseline = values.detach()
        with torch.no_grad():
            old_params = self.behavior.distribution(rollout.observations)  # (T, N, P)
            log_ratios = log_probs - policy.log_prob(old_params, rollout.actions)  # log π/μ (T, N)
        advantages, targets = estimators.vtrace(  # (T, N) each
            rollout.rewards, baseline, next_state_values(self.model, rollout, baseline),
            rollout.terminated, rollout.truncated, log_ratios,
            gamma=cfg.gamma, rho_bar=cfg.rho_bar, c_bar=cfg.c_bar,
        )  # fmt: skip
        if cfg.lag:
            self.past["parameters"][self.past["updates"] % cfg.lag] = flat(self.model)
        if cfg.shuffle:
            advantages = shuffled(advantages, rng)
        loss, parts = a2c_loss(log_probs, advantages, values, targets, entropies, cfg.value_weight, cfg.entropy)
        self.optimizer.zero_grad()
        loss.backward()
        clip_(self.model.actor_parameters, cfg.clip)
        self.optimizer.step()
        self.past["updates"] += 1
        kl = policy.kl(old_params, params.detach()).mean()
        return parts | {"ratio": log_ratios.exp().mean(), "kl_from_behavior": kl}

    # --- Loop

    def train_for(self, steps: int, lr_scale: float, rng: torch.Generator) -> dict[str, float]:
        """About `steps` environment steps: collect, update, repeat. Returns the means of the updates' figures."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = lr_scale * rate
        updates = max(1, round(steps / (self.cfg.horizon * len(self.envs))))
        return mean_metrics([self.update(self.collect(rng), rng) for _ in range(updates)])

    def freeze(self) -> None:
        """From now on only the critic learns; with a shared trunk, only its last layer."""
        self.rates = 0.0, self.rates[1]


def flat(model: nn.Module) -> Tensor:
    """A copy of all parameters as one vector."""
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@torch.no_grad()
def assign(model: nn.Module, parameters: Tensor) -> None:
    """The inverse of `flat`."""
    start = 0
    for p in model.parameters():
        p.copy_(parameters[start : start + p.numel()].view_as(p))
        start += p.numel()
