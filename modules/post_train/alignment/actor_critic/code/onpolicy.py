"""One-step actor-critic, A2C, eligibility traces and V-trace: one update each, from what the environments just gave."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from finetune import ops
from finetune.rl import advantages
from finetune.rl.agents.reward_scale import RewardSize
from finetune.rl.envs import environments
from finetune.rl.envs.rollout import Rollout
from finetune.rl.envs.vector import VectorEnv

from .losses import Traces, a2c_loss
from .networks import ActorCritic, assign, flat


class Learner:
    """What a method changes as it learns, and its updates. `chunk` is all that the loop calls."""

    def __init__(self, cfg: Any, method: str, vector: VectorEnv) -> None:
        self.cfg, self.vector = cfg, vector
        self.model = ActorCritic(*environments.sizes(vector.envs[0]), cfg.hidden, cfg.shared_trunk, cfg.value_scale)
        self.parameters = list(self.model.parameters())
        by_horizon = method in ("a2c", "vtrace")
        self.horizon = cfg.horizon if by_horizon else 1
        self.clip = cfg.clip if by_horizon else None
        self.actor = [*self.model.trunk.parameters(), *self.model.policy.parameters()]
        self.rates = (cfg.lr, cfg.critic_rate * cfg.lr) if by_horizon else (cfg.online_lr, cfg.online_lr)
        groups = [{"params": self.actor}, {"params": list(self.model.value.parameters())}]
        self.optimizer = torch.optim.Adam(groups, lr=0.0, eps=1e-5, fused=True)
        self.rewards = RewardSize()

    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "vector": self.vector, "rewards": self.rewards}

    def chunk(self, steps: int, lr: float, generator: torch.Generator) -> dict[str, float]:
        """About `steps` steps of the environments; lr: a part of the learning rate. Means of the updates' figures."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = lr * rate
        found = [
            self.update(self.collect(generator), generator)
            for _ in range(max(1, round(steps / (self.horizon * len(self.vector)))))
        ]
        return {name: float(torch.stack([f[name] for f in found]).mean()) for name in found[0]}

    def collect(self, generator: torch.Generator) -> Rollout:
        """A rollout whose rewards are divided by the largest so far: all that is learned is in this unit."""
        rollout = self.vector.collect(self.behaving(generator), self.horizon)
        rollout.rewards = rollout.rewards / self.rewards.see(rollout.rewards)
        return rollout

    def hold(self) -> None:
        """The policy stays as it is from now on (and a shared trunk with it); the critic goes on learning."""
        self.rates = (0.0, self.rates[1])

    def acting(self, generator: torch.Generator) -> environments.Act:
        """As the policy that is learned."""
        return drawn(self.model, generator)

    valued = tried = acting  # the policy that the critic is the value of, and the one that is evaluated
    bonus = None  # to the rewards, in the critic's values

    def behaving(self, generator: torch.Generator) -> environments.Act:
        """As whoever gathers what is learned from."""
        return self.acting(generator)

    @torch.no_grad()
    def best(self, observations: Tensor) -> Tensor:
        return self.model.policy.mode(self.model.distribution(observations))

    def values(self, observations: Tensor) -> Tensor:
        """In the environment's unit."""
        return self.rewards.size * self.model.values(observations)

    def update(self, rollout: Rollout, generator: torch.Generator) -> dict[str, Tensor]:
        """A2C; with a horizon of 1, one-step actor-critic."""
        params, values = self.model(rollout.observations)  # (T, N, ·), (T, N)
        psi, targets = ops.gae(*self.bootstrapped(rollout, values), gamma=self.cfg.gamma, lam=1.0)
        return self.descend(rollout, params, values, psi, targets, generator)

    def bootstrapped(self, rollout: Rollout, values: Tensor) -> tuple[Tensor, ...]:
        """rewards, V, V of the state that each step reached, terminated, truncated: as the op `gae` takes them."""
        return (rollout.rewards, values.detach(), following(self.model, rollout, values.detach()),
                rollout.terminated, rollout.truncated)  # fmt: skip

    def descend(
        self, rollout: Rollout, params: Tensor, values: Tensor, psi: Tensor, targets: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        cfg, policy = self.cfg, self.model.policy
        if cfg.shuffle:
            psi = shuffled(psi, generator)
        log_probs, entropies = policy.log_prob(params, rollout.actions), policy.entropy(params)
        loss, parts = a2c_loss(log_probs, psi, values, targets, entropies, cfg.value_weight, cfg.entropy)
        self.step(torch.autograd.grad(loss, self.parameters))
        return parts

    def step(self, gradients: Any) -> None:
        for p, g in zip(self.parameters, gradients, strict=True):
            p.grad = g
        if self.clip is not None:
            ops.clip_grad_norm_([p.grad for p in self.actor], self.clip)
        self.optimizer.step()


class TraceLearner(Learner):
    """AC(λ): every step, along the traces and not along the gradient of this step alone."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.traces = Traces(self.model, len(self.vector))

    def state(self) -> dict[str, Any]:
        return super().state() | {"traces": self.traces}

    def update(self, rollout: Rollout, generator: torch.Generator) -> dict[str, Tensor]:
        cfg = self.cfg
        r = Rollout(*(column[0] for column in vars(rollout).values()))  # the one step, (N, …)
        params, values = self.traces.add(r.observations, r.actions, cfg.gamma * cfg.lam)
        with torch.no_grad():
            after = self.model.values(r.next_observations)
        deltas = advantages.td_errors(r.rewards, values.detach(), after, r.terminated, cfg.gamma)
        if cfg.shuffle:
            deltas = shuffled(deltas, generator)
        upwards = self.traces.direction(deltas, cfg.value_weight)
        entropy = self.model.policy.entropy(params).mean()
        if cfg.entropy:
            bonus = torch.autograd.grad(cfg.entropy * entropy, self.parameters, materialize_grads=True)
            torch._foreach_add_(upwards, bonus)
        self.step(torch._foreach_neg(upwards))
        self.traces.end(r.ends)
        return {"value_loss": deltas.square().mean(), "entropy": entropy.detach()}


class LaggingLearner(Learner):
    """V-trace: a policy `lag` updates old acts, and the estimates are corrected for it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        # A ring: row k mod lag holds the parameters from before update k until update k + lag.
        self.past = {"parameters": flat(self.model).repeat(self.cfg.lag, 1), "updates": 0}
        self.behavior = copy.deepcopy(self.model) if self.cfg.lag else self.model

    def state(self) -> dict[str, Any]:
        return super().state() | {"past": self.past}

    def behaving(self, generator: torch.Generator) -> environments.Act:
        if self.cfg.lag:
            assign(self.behavior, self.past["parameters"][self.past["updates"] % self.cfg.lag])
        return drawn(self.behavior, generator)

    def update(self, rollout: Rollout, generator: torch.Generator) -> dict[str, Tensor]:
        cfg = self.cfg
        params, values = self.model(rollout.observations)
        with torch.no_grad():
            old = self.behavior.distribution(rollout.observations)
            log_mu = self.behavior.policy.log_prob(old, rollout.actions)
            log_ratios = self.model.policy.log_prob(params, rollout.actions) - log_mu
        bounds = {"rho_bar": cfg.rho_bar, "c_bar": cfg.c_bar}
        given = self.bootstrapped(rollout, values)
        psi, targets = advantages.vtrace(*given, log_ratios, gamma=cfg.gamma, **bounds)
        if cfg.lag:
            self.past["parameters"][self.past["updates"] % cfg.lag] = flat(self.model)
        parts = self.descend(rollout, params, values, psi, targets, generator)
        self.past["updates"] += 1
        return parts | {
            "ratio": log_ratios.exp().mean(),
            "kl_behind": self.model.policy.kl(old, params).mean().detach(),
        }


@torch.no_grad()
def following(model: ActorCritic, rollout: Rollout, values: Tensor) -> Tensor:
    """V (T, N) of the state that each step reached. Within an episode that is V of the next row, known already."""
    after = torch.cat([values[1:], model.values(rollout.next_observations[-1:])])
    cut = rollout.truncated[:-1]
    if cut.any():
        after[:-1][cut] = model.values(rollout.next_observations[:-1][cut])
    return after


def drawn(model: ActorCritic, generator: torch.Generator) -> environments.Act:
    return lambda observations: model.policy.sample(model.distribution(observations), generator)


def shuffled(values: Tensor, generator: torch.Generator) -> Tensor:
    return values.flatten()[torch.randperm(values.numel(), generator=generator)].view_as(values)


LEARNERS = {"one_step": Learner, "a2c": Learner, "lambda": TraceLearner, "vtrace": LaggingLearner}
