"""Learners of continuous actions: behavior cloning, and SAC from logged steps, conservative or not."""

import copy
from typing import Any

import torch
from torch import Tensor

from finetune.optim import descend
from finetune.rl.agents.networks import Deterministic, SquashedGaussian, TwinQ
from finetune.rl.agents.offline import cloning_loss
from finetune.rl.agents.targets import critic_loss, polyak_, sac_policy_loss, soft_value, td_target, temperature_loss
from finetune.rl.envs.environments import Act
from finetune.rl.envs.replay import Transitions

from .losses import conservative_gap, dual_loss, max_backup, sampled_actions, weight


class Clone:
    """A deterministic policy by least squares."""

    def __init__(self, policy: Deterministic, lr: float) -> None:
        self.policy = policy
        self.optimizer = torch.optim.Adam(policy.parameters(), lr=lr, fused=True)

    @property
    def state(self) -> dict[str, Any]:
        return {"policy": self.policy, "optimizer": self.optimizer}

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.optimizer]

    @torch.no_grad()
    def act(self, observations: Tensor) -> Tensor:
        return self.policy(observations)

    policy_of = act

    def acting(self, generator: torch.Generator) -> Act:
        return self.act

    def update(self, batch: Transitions, returns_to_go: Tensor, generator: torch.Generator) -> dict[str, float]:
        loss = cloning_loss(self.policy(batch.observations), batch.actions)
        descend(loss, self.optimizer)
        return {"loss": loss.item()}


class ActorCritic:
    """SAC with α · gap added to the loss of its critics: α = 0 is SAC.

    backup: what V(s') is in the target: `soft`, with the entropy as in SAC; `plain`, without; `max`, the best of
    `samples` actions. temperature: where SAC's starts. warm_start: so many first updates move the policy by the data's
    log probability, and not by Q.
    """

    def __init__(
        self,
        policy: SquashedGaussian,
        q: TwinQ,
        *,
        alpha: float,
        gamma: float,
        lr: float,
        tau: float,
        samples: int = 10,
        backup: str = "soft",
        rho: bool = False,
        threshold: float | None = None,
        calibrated: bool = False,
        warm_start: int = 0,
        temperature: float = 0.1,
    ) -> None:
        self.policy, self.q, self.target = policy, q, copy.deepcopy(q)
        self.alpha, self.gamma, self.tau, self.samples, self.backup = alpha, gamma, tau, samples, backup
        self.rho, self.threshold, self.calibrated, self.warm_start = rho, threshold, calibrated, warm_start
        self.log_temperature = torch.tensor(temperature).log().requires_grad_()
        self.log_alpha = torch.full((q.count,), alpha).log().requires_grad_(threshold is not None)
        self.counts = {"updates": 0}

        def adam(parameters: Any) -> torch.optim.Optimizer:
            return torch.optim.Adam(parameters, lr=lr, fused=True)

        self.policy_optimizer, self.optimizer = adam(policy.parameters()), adam(q.parameters())
        self.temperature_optimizer = adam([self.log_temperature])
        self.dual = adam([self.log_alpha]) if threshold is not None else None

    @property
    def state(self) -> dict[str, Any]:
        state = {
            "policy": self.policy, "q": self.q, "target": self.target, "optimizer": self.optimizer,
            "policy_optimizer": self.policy_optimizer, "temperature_optimizer": self.temperature_optimizer,
            "numbers": {"log_temperature": self.log_temperature, "log_alpha": self.log_alpha}, "counts": self.counts,
        }  # fmt: skip
        return state if self.dual is None else state | {"dual": self.dual}

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        both = [self.optimizer, self.policy_optimizer, self.temperature_optimizer]
        return both if self.dual is None else [*both, self.dual]

    @torch.no_grad()
    def act(self, observations: Tensor) -> Tensor:
        return self.policy.mode(self.policy(observations))

    policy_of = act

    def acting(self, generator: torch.Generator) -> Act:
        return self.act

    @torch.no_grad()
    def value(self, observations: Tensor) -> Tensor:
        """What it believes: the least critic's Q(s, π(s)) (N,)."""
        return self.q(observations, self.act(observations)).amin(0)

    @torch.no_grad()
    def wanted(self, batch: Transitions, params: Tensor, noise: Tensor) -> Tensor:
        """The critics' target (N,); params of π at s', noise (samples, N, A), of which all but `max` take the first."""
        drawn = noise if self.backup == "max" else noise[:1]
        actions, log_probs = self.policy.rsample(params, drawn)
        values = self.target(batch.next_observations, actions)  # (C, n, N)
        if self.backup == "max":
            following = max_backup(values)
        else:
            temperature = self.log_temperature.exp() if self.backup == "soft" else 0.0
            following = soft_value(values, log_probs, temperature)[0]
        return td_target(batch.rewards, following, batch.terminated, self.gamma)

    def update(self, batch: Transitions, returns_to_go: Tensor, generator: torch.Generator) -> dict[str, float]:
        n, shape = self.samples, batch.actions.shape
        noise = torch.randn(2 + 3 * n, *shape, generator=generator)
        uniform = torch.rand(n, *shape, generator=generator)
        params = self.policy(batch.observations)
        with torch.no_grad():
            next_params = self.policy(batch.next_observations)
        wanted = self.wanted(batch, next_params, noise[: n + 1])
        shown = {}
        if self.alpha or self.dual is not None:
            parts = sampled_actions(self.policy, params, next_params, uniform, noise[n + 2 :].unflatten(0, (2, n)))
            gap, data = conservative_gap(
                self.q, batch.observations, batch.actions, *parts, rho=self.rho,
                returns_to_go=returns_to_go if self.calibrated else None,
            )  # fmt: skip
            shown["gap"] = gap.mean().item()
        else:
            gap, data = torch.zeros(()), self.q(batch.observations, batch.actions)
        if self.dual is not None:
            descend(dual_loss(self.log_alpha, gap, self.threshold), self.dual)
        td = critic_loss(data, wanted)
        descend(td + (weight(self.log_alpha.detach()) * gap).sum(), self.optimizer)
        temperature = self.log_temperature.exp().item()
        self._step_policy(batch, params, noise[n + 1])
        polyak_(self.target, self.q, self.tau)
        self.counts["updates"] += 1
        return {"td_loss": td.item(), "value": data.mean().item(), "temperature": temperature, **shown}

    def _step_policy(self, batch: Transitions, params: Tensor, noise: Tensor) -> None:
        """The policy, against the critics of now; then SAC's temperature."""
        actions, log_probs = self.policy.rsample(params, noise)
        temperature = self.log_temperature.detach().exp()
        if self.counts["updates"] < self.warm_start:
            loss = (temperature * log_probs - self.policy.log_prob(params, batch.actions)).mean()
        else:
            loss = sac_policy_loss(self.q(batch.observations, actions), log_probs, temperature)
        descend(loss, self.policy_optimizer)
        descend(
            temperature_loss(self.log_temperature, log_probs, self.policy.target_entropy), self.temperature_optimizer
        )
