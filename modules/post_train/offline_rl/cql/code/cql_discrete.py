"""Conservative Q-learning with discrete actions (Kumar et al. 2020, arXiv:2006.04779): double DQN whose loss also
pushes down Q of all actions and pushes up Q of the logged ones.

    loss = TD + α · E_data[ log Σ_a exp Q(s, a) − Q(s, a_data) ]

`train` compares three learners on the same batches: behavior cloning, naive Q-learning (α = 0), CQL.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.optim import descend
from finetune.rl.agents.networks import QNetwork
from finetune.rl.agents.offline import Cloning, OfflineLearner, set_lr
from finetune.rl.agents.targets import double_dqn_target, gather_actions, polyak_, td_loss
from finetune.rl.envs.replay import Transitions
from finetune.runs.run import Run

from .evaluation import mean_return

if TYPE_CHECKING:
    from .data import Task
    from .main import Config

# --- The gap: soft maximum of Q over all actions minus Q of the logged action


def cql_h(q: Tensor, actions: Tensor) -> Tensor:
    """CQL(H): log Σ_a exp Q(s, a) − Q(s, a_data) (N,) of Q(s, ·) (N, A). Never below 0."""
    return q.logsumexp(-1) - gather_actions(q, actions)


def cql_rho(q: Tensor, actions: Tensor, log_prior: Tensor) -> Tensor:
    """CQL(ρ): log Σ_a ρ(a|s) exp Q(s, a) − Q(s, a_data) (N,), the maximum over μ of E_μ Q − KL(μ ‖ ρ) − Q(s, a_data).

    log_prior (N, A) is log ρ; for the uniform ρ it is CQL(H) minus log A.
    """
    return (q + log_prior.detach()).logsumexp(-1) - gather_actions(q, actions)


def clamped_exp(log_alpha: Tensor) -> Tensor:
    """α, at most a million."""
    return log_alpha.exp().clamp(max=1e6)


def lagrange_loss(log_alpha: Tensor, gap: Tensor, threshold: float) -> Tensor:
    """−α (gap − τ), minimized in log α: α rises while the gap is above the threshold τ, and falls below it."""
    return -(clamped_exp(log_alpha) * (gap.detach() - threshold)).mean()


# --- The learner


class CQL:
    """Double DQN with the gap in its loss.

    alpha: weight of the gap; 0 is double DQN, the naive learner. rho: CQL(ρ), with ρ the softmax of the target network.
    threshold: learn α so that the gap approaches it (CQL-Lagrange); `alpha` is the initial value.
    """

    def __init__(
        self,
        network: QNetwork,
        *,
        alpha: float,
        gamma: float,
        lr: float,
        tau: float,
        rho: bool = False,
        threshold: float | None = None,
    ) -> None:
        self.q, self.target = network, copy.deepcopy(network)
        self.alpha, self.gamma, self.tau, self.rho, self.threshold = alpha, gamma, tau, rho, threshold
        self.optimizer = torch.optim.Adam(network.parameters(), lr=lr, fused=True)
        self.log_alpha = torch.tensor(alpha, dtype=torch.float32).log().requires_grad_(threshold is not None)
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], lr=lr) if threshold is not None else None

    @property
    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"q": self.q, "target": self.target, "optimizer": self.optimizer}
        if self.alpha_optimizer is not None:
            state |= {"alpha": {"log_alpha": self.log_alpha}, "alpha_optimizer": self.alpha_optimizer}
        return state

    def loss(self, batch: Transitions) -> tuple[Tensor, Tensor, Tensor]:
        """(TD loss, mean gap, Q of the logged actions (N,)); the whole loss is TD + α · gap."""
        with torch.no_grad():
            next_q, next_target = self.q(batch.next_observations), self.target(batch.next_observations)
        targets = double_dqn_target(next_q, next_target, batch.rewards, batch.terminated, self.gamma)
        q = self.q(batch.observations)  # (N, A)
        q_data = gather_actions(q, batch.actions)
        if self.rho:
            with torch.no_grad():
                log_prior = self.target(batch.observations).log_softmax(-1)
            gap = cql_rho(q, batch.actions, log_prior)
        else:
            gap = cql_h(q, batch.actions)
        return td_loss(q_data, targets), gap.mean(), q_data

    def update(self, batch: Transitions, rng: torch.Generator | None = None) -> dict[str, Tensor]:
        td, gap, q_data = self.loss(batch)
        if self.alpha_optimizer is not None and self.threshold is not None:
            descend(lagrange_loss(self.log_alpha, gap, self.threshold), self.alpha_optimizer)
            self.alpha = clamped_exp(self.log_alpha).item()
        descend(td + self.alpha * gap, self.optimizer)
        polyak_(self.target, self.q, self.tau)
        return {"td_loss": td.detach(), "gap": gap.detach(), "value": q_data.detach().mean()}

    @torch.no_grad()
    def act(self, observations: Tensor, rng: torch.Generator | None = None) -> Tensor:
        return self.q(observations).argmax(-1)

    def policy(self, observations: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Probabilities (N, A): 1 for the greedy action."""
        return F.one_hot(self.act(observations), self.q.actions).float()

    @torch.no_grad()
    def value(self, observations: Tensor, actions: Tensor) -> Tensor:
        return gather_actions(self.q(observations), actions)


# --- Training


def train(cfg: Config, run: Run, task: Task) -> dict[str, OfflineLearner]:
    """Trains cloning, naive Q-learning and CQL from the same initial weights on the same batches."""

    def network() -> QNetwork:
        run.seed("networks")
        return QNetwork(task.spaces.observed, task.spaces.action_dim, [cfg.hidden, cfg.hidden])

    common: dict[str, Any] = {"gamma": task.gamma, "lr": cfg.lr, "tau": cfg.tau}
    learners: dict[str, OfflineLearner] = {
        "bc": Cloning(network(), cfg.lr),
        "naive": CQL(network(), alpha=0.0, **common),
        "cql": CQL(network(), alpha=cfg.alpha, rho=cfg.rho, threshold=cfg.threshold, **common),
    }
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
