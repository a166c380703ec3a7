"""Conservative Q-learning with continuous actions (Kumar et al. 2020, arXiv:2006.04779): SAC whose critics also push
down Q of sampled actions and push up Q of the logged ones.

    critic loss = TD + α · E_data[ log ∫ exp Q(s, a) da − Q(s, a_data) ]

The integral is estimated by importance sampling. `train` compares three learners on the same batches: behavior cloning,
naive SAC (α = 0), CQL. Cal-QL: Nakamoto et al. 2023, arXiv:2303.05479.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from finetune.optim import descend
from finetune.rl.agents.networks import Deterministic, SquashedGaussian, TwinQ
from finetune.rl.agents.offline import Cloning, OfflineLearner, set_lr
from finetune.rl.agents.targets import critic_loss, polyak_, sac_policy_loss, soft_value, td_target, temperature_loss
from finetune.rl.envs.replay import Transitions
from finetune.runs.run import Run

from .cql_discrete import clamped_exp, lagrange_loss
from .evaluation import mean_return

if TYPE_CHECKING:
    from .data import Task
    from .main import Config

# --- The gap: log ∫ exp Q(s, a) da minus Q of the logged action, by importance sampling


def sample_actions(
    actor: SquashedGaussian, params: Tensor, next_params: Tensor, uniform: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """n actions for each state s from each of three proposals: uniform within the bounds, π(s) and π(s').

    params, next_params: of π at s and s'. uniform (n, N, A) in [0, 1), noise (2, n, N, A) standard normal.
    → actions (3 n, N, A) and their log densities (3 n, N), without gradients: the gap trains Q alone.
    """
    with torch.no_grad():
        actions, log_probs = actor.rsample(params, noise[0])
        next_actions, next_log_probs = actor.rsample(next_params, noise[1])
        uniform_actions = actor.center + actor.scale * (2 * uniform - 1)
        uniform_log_probs = torch.full_like(log_probs, -float((2 * actor.scale).log().sum()))
        return (
            torch.cat([uniform_actions, actions, next_actions]),
            torch.cat([uniform_log_probs, log_probs, next_log_probs]),
        )


def importance_logsumexp(q: Tensor, log_density: Tensor) -> Tensor:
    """log Σ_i exp(Q(s, a_i)) / density(a_i) (C, N) over samples (C, 3 n, N): log ∫ exp Q da, plus log 3 n."""
    return (q - log_density).logsumexp(-2)


def mean_logsumexp(q: Tensor) -> Tensor:
    """log E_π exp Q (C, N) over samples (C, n, N) from π: CQL(ρ) with ρ = π."""
    return q.logsumexp(-2) - math.log(q.shape[-2])


def conservative_gap(
    critics: TwinQ,
    observations: Tensor,
    actions: Tensor,
    samples: Tensor,
    log_density: Tensor,
    *,
    rho: bool = False,
    returns_to_go: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(mean gap (C,), Q of the logged actions (C, N)); samples and log_density are those of `sample_actions`.

    rho: CQL(ρ), over the samples from π(s) only. returns_to_go (N,): Cal-QL, Q of the policy's samples is pushed down
    to the behavior policy's return at most.
    """
    q = critics(observations, torch.cat([actions[None], samples]))  # (C, 1 + 3 n, N), in one pass
    q_data, q = q[:, 0], q[:, 1:]
    n = len(samples) // 3
    if returns_to_go is not None:
        q = torch.cat([q[:, :n], q[:, n:].maximum(returns_to_go)], 1)
    soft_max = mean_logsumexp(q[:, n : 2 * n]) if rho else importance_logsumexp(q, log_density)
    return (soft_max - q_data).mean(-1), q_data


def max_backup(q: Tensor) -> Tensor:
    """V(s') = max_i min_c Q_c(s', a_i) (N,) over samples (C, n, N): the least conservative backup."""
    return q.amin(0).amax(0)


# --- The learner


class CQL:
    """SAC with the gap in its critics' loss.

    alpha: weight of the gap; 0 is SAC, the naive learner. threshold: learn α so that the gap approaches it
    (CQL-Lagrange). backup: V(s') of the target, `soft` with SAC's entropy term, `plain` without, `max` the best of
    `samples` actions. warm_start: in the first updates the actor clones the data. calibrated: Cal-QL.
    """

    def __init__(
        self,
        actor: SquashedGaussian,
        critics: TwinQ,
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
        self.actor, self.critics, self.target = actor, critics, copy.deepcopy(critics)
        self.alpha, self.gamma, self.tau, self.samples, self.backup = alpha, gamma, tau, samples, backup
        self.rho, self.threshold, self.calibrated, self.warm_start = rho, threshold, calibrated, warm_start
        self.log_temperature = torch.tensor(temperature).log().requires_grad_()
        self.log_alpha = torch.full((critics.count,), alpha).log().requires_grad_(threshold is not None)
        self.counts = {"updates": 0}

        def adam(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
            return torch.optim.Adam(parameters, lr=lr, fused=True)

        self.actor_optimizer, self.critic_optimizer = adam(actor.parameters()), adam(critics.parameters())
        self.temperature_optimizer = adam([self.log_temperature])
        self.alpha_optimizer = adam([self.log_alpha]) if threshold is not None else None

    @property
    def state(self) -> dict[str, Any]:
        state = {
            "actor": self.actor, "critics": self.critics, "target": self.target,
            "actor_optimizer": self.actor_optimizer, "critic_optimizer": self.critic_optimizer,
            "temperature_optimizer": self.temperature_optimizer,
            "numbers": {"log_temperature": self.log_temperature, "log_alpha": self.log_alpha}, "counts": self.counts,
        }  # fmt: skip
        return state if self.alpha_optimizer is None else state | {"alpha_optimizer": self.alpha_optimizer}

    def update(self, batch: Transitions, rng: torch.Generator) -> dict[str, Tensor]:
        n, shape = self.samples, batch.actions.shape
        noise = torch.randn(2 + 3 * n, *shape, generator=rng)
        uniform = torch.rand(n, *shape, generator=rng)
        params = self.actor(batch.observations)
        with torch.no_grad():
            next_params = self.actor(batch.next_observations)
        metrics = self.update_critics(batch, params, next_params, uniform, noise)
        metrics |= self.update_actor(batch, params, noise[n + 1])
        polyak_(self.target, self.critics, self.tau)
        self.counts["updates"] += 1
        return metrics

    @torch.no_grad()
    def td_targets(self, batch: Transitions, next_params: Tensor, noise: Tensor) -> Tensor:
        """The critics' target (N,); noise (samples, N, A), of which `soft` and `plain` use the first."""
        actions, log_probs = self.actor.rsample(next_params, noise if self.backup == "max" else noise[:1])
        q = self.target(batch.next_observations, actions)  # (C, n, N)
        if self.backup == "max":
            next_values = max_backup(q)
        else:
            temperature = self.log_temperature.exp() if self.backup == "soft" else 0.0
            next_values = soft_value(q, log_probs, temperature)[0]
        return td_target(batch.rewards, next_values, batch.terminated, self.gamma)

    def update_critics(
        self, batch: Transitions, params: Tensor, next_params: Tensor, uniform: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        n, metrics = self.samples, {}
        targets = self.td_targets(batch, next_params, noise[: n + 1])
        if self.alpha or self.threshold is not None:
            samples = sample_actions(self.actor, params, next_params, uniform, noise[n + 2 :].unflatten(0, (2, n)))
            gap, q_data = conservative_gap(
                self.critics, batch.observations, batch.actions, *samples, rho=self.rho,
                returns_to_go=batch.returns_to_go if self.calibrated else None,
            )  # fmt: skip
            metrics["gap"] = gap.detach().mean()
        else:
            gap, q_data = torch.zeros(()), self.critics(batch.observations, batch.actions)
        if self.alpha_optimizer is not None and self.threshold is not None:
            descend(lagrange_loss(self.log_alpha, gap, self.threshold), self.alpha_optimizer)
        td = critic_loss(q_data, targets)
        descend(td + (clamped_exp(self.log_alpha.detach()) * gap).sum(), self.critic_optimizer)
        return {"td_loss": td.detach(), "value": q_data.detach().mean()} | metrics

    def update_actor(self, batch: Transitions, params: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """SAC's step of the policy and of the temperature, with the updated critics."""
        actions, log_probs = self.actor.rsample(params, noise)
        temperature = self.log_temperature.detach().exp()
        if self.counts["updates"] < self.warm_start:
            loss = (temperature * log_probs - self.actor.log_prob(params, batch.actions)).mean()
        else:
            loss = sac_policy_loss(self.critics(batch.observations, actions), log_probs, temperature)
        descend(loss, self.actor_optimizer)
        descend(
            temperature_loss(self.log_temperature, log_probs, self.actor.target_entropy), self.temperature_optimizer
        )
        return {"temperature": temperature}

    @torch.no_grad()
    def act(self, observations: Tensor, rng: torch.Generator | None = None) -> Tensor:
        return self.actor.mode(self.actor(observations))

    policy = act

    @torch.no_grad()
    def value(self, observations: Tensor, actions: Tensor) -> Tensor:
        return self.critics(observations, actions).amin(0)


# --- Training


def train(cfg: Config, run: Run, task: Task) -> dict[str, OfflineLearner]:
    """Trains cloning, naive SAC and CQL from the same initial weights on the same batches."""
    spaces, hidden = task.spaces, [cfg.hidden, cfg.hidden]

    def networks() -> tuple[SquashedGaussian, TwinQ]:
        run.seed("networks")
        actor = SquashedGaussian(spaces.obs_dim, hidden, *spaces.bounds)
        return actor, TwinQ(spaces.obs_dim, spaces.action_dim, hidden)

    run.seed("networks")
    cloning = Cloning(Deterministic(spaces.obs_dim, hidden, *spaces.bounds), cfg.lr)
    common: dict[str, Any] = {"gamma": task.gamma, "lr": cfg.lr, "tau": cfg.tau}
    naive = CQL(*networks(), alpha=0.0, **common)
    cql = CQL(
        *networks(), alpha=cfg.alpha_continuous, samples=cfg.samples, backup=cfg.backup, rho=cfg.rho,
        threshold=cfg.threshold, calibrated=cfg.calibrated, warm_start=cfg.warm_start, **common,
    )  # fmt: skip
    learners: dict[str, OfflineLearner] = {"bc": cloning, "naive": naive, "cql": cql}

    state = {f"{name}_{part}": value for name, learner in learners.items() for part, value in learner.state.items()}
    for step in run.steps(cfg.steps, state | task.limit, phase=task.name):
        rng = run.generator("batches", task.name, step)
        metrics: dict[str, float] = {}
        for i, rows in enumerate(torch.randint(len(task.steps), (cfg.updates, task.batch), generator=rng)):
            batch = task.steps[rows]
            for name, learner in learners.items():
                set_lr(learner, cfg.lr * (1 - (step + i / cfg.updates) / cfg.steps))
                for metric, value in learner.update(batch, rng).items():
                    key = f"{metric}_{name}"
                    metrics[key] = metrics.get(key, 0.0) + value.item() / cfg.updates
        if task.envs and ((step + 1) % cfg.eval_every == 0 or step + 1 == cfg.steps):
            for name, learner in learners.items():
                metrics[f"return_{name}"] = mean_return(run, task, learner, step)
        run.log(step, **metrics)
    return learners
