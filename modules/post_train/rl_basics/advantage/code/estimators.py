"""Eleven advantage estimators, each a function of its name: Â of the first step of every rollout.

    A^π(s, a) = Q^π(s, a) − V^π(s)        δ_t = r_t + γ V(s_{t+1}) − V(s_t)

The recursions over time are those that training uses: finetune/rl/advantages.py and the op `gae`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from finetune import ops
from finetune.rl import advantages
from finetune.rl.envs.rollout import Rollout
from finetune.rl.tabular.mdp import MDP

if TYPE_CHECKING:
    from .main import Config


@dataclass
class Batch:
    """Rollouts of a behavior policy μ with a critic's values and the probabilities of the policy π. All (T, N)."""

    rewards: Tensor
    terminated: Tensor
    truncated: Tensor
    values: Tensor  # V(s_t)
    next_values: Tensor  # V(s_{t+1})
    action_values: Tensor  # Q(s_t, a_t), one step ahead of V
    expected_values: Tensor  # E_{a~π} Q(s_t, a)
    next_expected_values: Tensor  # E_{a~π} Q(s_{t+1}, a)
    log_probs: Tensor  # log π(a_t|s_t)
    log_ratios: Tensor  # log π(a_t|s_t) − log μ(a_t|s_t)
    gamma: float
    lam: float
    n: int
    group: int  # consecutive columns that begin in the same state

    @classmethod
    def of(
        cls, cfg: Config, mdp: MDP, rollout: Rollout, policy: np.ndarray, behavior: np.ndarray, critic: np.ndarray
    ) -> Batch:
        """The critic is a table V (S,); Q follows from it by one step of the model."""
        states, actions, next_states = rollout.observations, rollout.actions, rollout.next_observations
        V, Q = torch.from_numpy(critic), np.where(mdp.allowed, mdp.R + mdp.gamma * mdp.P @ critic, 0.0)
        means = (torch.from_numpy(policy) * torch.from_numpy(Q)).sum(1)
        with np.errstate(divide="ignore"):
            log_probs = torch.from_numpy(np.log(policy))[states, actions]
            log_behavior = torch.from_numpy(np.log(behavior))[states, actions]
        return cls(
            rollout.rewards, rollout.terminated, rollout.truncated, V[states], V[next_states],
            torch.from_numpy(Q)[states, actions], means[states], means[next_states], log_probs,
            log_probs - log_behavior, cfg.gamma, cfg.lam, cfg.n, cfg.group,
        )  # fmt: skip

    @property
    def with_values(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.rewards, self.values, self.next_values, self.terminated, self.truncated

    @property
    def with_action_values(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.rewards, self.action_values, self.next_expected_values, self.terminated, self.truncated


# --- On-policy: the rollouts are those of π


def mc(b: Batch) -> Tensor:
    """Monte Carlo: Σ γ^t r_t − V(s_0)."""
    return ops.gae(*b.with_values, gamma=b.gamma, lam=1.0)[0][0]


def td(b: Batch) -> Tensor:
    """TD error: r_0 + γ V(s_1) − V(s_0)."""
    return ops.gae(*b.with_values, gamma=b.gamma, lam=0.0)[0][0]


def n_step(b: Batch) -> Tensor:
    """n rewards, then γ^n V(s_n), minus V(s_0)."""
    return advantages.n_step(*b.with_values, n=b.n, gamma=b.gamma)[0]


def gae(b: Batch) -> Tensor:
    """Generalized advantage estimation: Σ (γλ)^t δ_t."""
    return ops.gae(*b.with_values, gamma=b.gamma, lam=b.lam)[0][0]


def upgo(b: Batch) -> Tensor:
    """UPGO: the return while it beats the critic, then V."""
    return advantages.upgo(*b.with_values, gamma=b.gamma)[0]


def returns(b: Batch) -> Tensor:
    """Returns of groups (groups, group); a rollout that is cut bootstraps at its end."""
    return ops.gae(*b.with_values, gamma=b.gamma, lam=1.0)[1][0].view(-1, b.group)


def leave_one_out(b: Batch) -> Tensor:
    """RLOO: the return minus the mean return of the others in the group."""
    return advantages.leave_one_out(returns(b)).flatten()


def group_normalized(b: Batch) -> Tensor:
    """GRPO: (return − mean) / (standard deviation + ε) of the group."""
    return advantages.group_normalized(returns(b)).flatten()


# --- Off-policy: the rollouts are those of μ


def importance(b: Batch) -> Tensor:
    """Rewards weighted with the product of all ratios π/μ so far: V-trace without bounds."""
    return vtrace(b, bound=math.inf)


def vtrace(b: Batch, bound: float = 1.0) -> Tensor:
    """V-trace with ratios of at most `bound`. Its own factor ρ_0, which corrects for how often μ takes the action, is
    divided out: the question here is how good the action is."""
    A, _ = advantages.vtrace(*b.with_values, b.log_ratios, gamma=b.gamma, rho_bar=bound, c_bar=bound)
    return A[0] / b.log_ratios[0].exp().clamp(max=bound)


def retrace(b: Batch) -> Tensor:
    """Retrace: targets of Q with traces c = λ min(1, π/μ), minus E_π Q(s_0, ·)."""
    targets = advantages.retrace(*b.with_action_values, b.log_ratios, gamma=b.gamma, lam=b.lam)
    return targets[0] - b.expected_values[0]


def tree_backup(b: Batch) -> Tensor:
    """Tree-backup: the same with c = λ π(a|s), for which μ need not be known."""
    targets = advantages.tree_backup(*b.with_action_values, b.log_probs, gamma=b.gamma, lam=b.lam)
    return targets[0] - b.expected_values[0]


ON_POLICY = {f.__name__: f for f in (mc, td, n_step, gae, upgo, leave_one_out, group_normalized)}
OFF_POLICY = {f.__name__: f for f in (importance, vtrace, retrace, tree_backup)}
ESTIMATORS = ON_POLICY | OFF_POLICY
UNBIASED = ("mc", "td", "n_step", "gae", "leave_one_out", "importance", "retrace", "tree_backup")  # with exact V
