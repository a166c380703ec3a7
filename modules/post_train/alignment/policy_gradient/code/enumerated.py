"""A process so small that all of its trajectories can be listed: what an estimate is on average, and how it scatters.

The rows of a rollout are then all trajectories, each once, and what an estimator makes of them, weighed with their
probabilities, is its exact expectation. Policies are softmax of logits (S, A).
"""

from __future__ import annotations

from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.rl.advantages import returns_to_go
from finetune.rl.envs.rollout import Rollout
from finetune.rl.statistics import chi_square_z_correlated
from finetune.rl.tabular import mdp as tables
from finetune.rl.tabular.mdp import MDP
from finetune.rl.tabular.sample import sample_tabular

STEPS = 2  # of a trajectory


def process(draw: np.random.Generator) -> tuple[MDP, Tensor]:
    """Three states, two actions, two successors of each pair: a random one, and a random policy's logits (3, 2)."""
    mdp = tables.garnet(3, 2, 2, draw, 0.9, mean=1.0)
    return mdp, torch.from_numpy(draw.standard_normal(mdp.size))


def trajectories(mdp: MDP, steps: int = STEPS) -> tuple[Rollout, Tensor]:
    """Every trajectory that can happen, one a row, and the world's part of its probability (K,)."""
    S, A = mdp.size
    found, world = [], []
    for first in np.flatnonzero(mdp.start):
        for path in product(range(A), range(S), repeat=steps):
            states, actions, after = (int(first), *path[1:-2:2]), path[::2], path[1::2]
            if (p := mdp.start[first] * mdp.P[states, actions, after].prod()) > 0:
                found.append((states, actions, after))
                world.append(p)
    s, a, t = np.array(found).transpose(1, 2, 0)  # (T, K) each
    no = torch.zeros(s.shape, dtype=torch.bool)
    columns = map(torch.from_numpy, (s, a, mdp.rewards[s, a, t], t))
    return Rollout(*columns, no, no), torch.tensor(world, dtype=torch.float64)


def sample(mdp: MDP, logits: Tensor, rows: int, draw: np.random.Generator) -> Rollout:
    """`rows` trajectories as they come."""
    starts = draw.choice(len(mdp.start), rows, p=mdp.start)
    return sample_tabular(mdp, logits.softmax(-1).numpy(), STEPS, starts, draw)


def log_probs(rollout: Rollout, logits: Tensor) -> Tensor:
    """(T, N) log π(a|s)"""
    return logits.log_softmax(-1)[rollout.observations, rollout.actions]


def probabilities(rollout: Rollout, world: Tensor, logits: Tensor) -> Tensor:
    """(K,), of each trajectory; differentiable."""
    return world * log_probs(rollout, logits).sum(0).exp()


def by_episode(rollout: Rollout, logits: Tensor, psi: Tensor) -> Tensor:
    """Σ_t ∇ log π(a_t|s_t) ψ_t of each row: (N, S·A), by hand: ∂ log π(a|s) / ∂ logits(s, ·) = 1(a) − π(·|s)."""
    S, A = logits.shape
    score = F.one_hot(rollout.actions, A) - logits.softmax(-1)[rollout.observations]  # (T, N, A)
    where = F.one_hot(rollout.observations, S).to(psi.dtype)
    return torch.einsum("tns,tna,tn->nsa", where, score, psi).flatten(1)


def discounts(gamma: float, psi: Tensor) -> Tensor:
    """γ^t (T, 1)"""
    return gamma ** torch.arange(len(psi), dtype=psi.dtype)[:, None]


# --- The gradient of J, and what is usually followed instead


def objective(rollout: Rollout, world: Tensor, logits: Tensor, gamma: float) -> Tensor:
    """J = Σ_τ p(τ) Σ_t γ^t r_t; differentiable."""
    return probabilities(rollout, world, logits) @ (discounts(gamma, rollout.rewards) * rollout.rewards).sum(0)


def gradient(rollout: Rollout, world: Tensor, logits: Tensor, gamma: float) -> Tensor:
    """∇J (S·A,) by automatic differentiation of the sum itself."""
    theta = logits.clone().requires_grad_()
    return torch.autograd.grad(objective(rollout, world, theta, gamma), theta)[0].flatten()


def usual(rollout: Rollout, world: Tensor, logits: Tensor, gamma: float) -> Tensor:
    """E[Σ_t ∇ log π(a_t|s_t) G_t] (S·A,), without the factor γ^t; differentiable."""
    return probabilities(rollout, world, logits) @ by_episode(rollout, logits, to_go(rollout, gamma))


def to_go(rollout: Rollout, gamma: float) -> Tensor:
    return returns_to_go(rollout.rewards, rollout.ends, gamma)


def asymmetry(field, at: Tensor) -> float:
    """Of the derivative of a vector field (D,) at `at`: |D − Dᵀ| / |D|. Of a gradient it is 0, as second derivatives
    commute; if it is not, there is no function whose gradient the field is."""
    jacobian = torch.autograd.functional.jacobian(field, at).flatten(1)
    return float((jacobian - jacobian.T).norm() / jacobian.norm())


# --- Estimates


def batch_means(estimates: Tensor, rows: int) -> np.ndarray:
    """(N, D) → (N // rows, D): what batches of so many episodes estimate."""
    whole = len(estimates) // rows * rows
    return estimates[:whole].view(-1, rows, estimates.shape[1]).mean(1).numpy()


def z_score(found: np.ndarray, wanted: Tensor) -> float:
    """How far the mean of independent estimates (M, D) is from `wanted`, in standard deviations of what chance does."""
    return float(chi_square_z_correlated(found.mean(0) - wanted.numpy(), np.cov(found.T) / len(found)))


def total_variance(found: np.ndarray) -> float:
    """The trace of the covariance of estimates (M, D)."""
    return float(found.var(0, ddof=1).sum())
