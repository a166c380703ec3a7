"""A process small enough to list all its trajectories: exact expectations and variances of gradient estimates.

The rows of a listed rollout are all trajectories, each once. An estimator applied to them and weighted with their
probabilities is its exact expectation. Policies are softmax of logits (S, A).
"""

from __future__ import annotations

from collections.abc import Callable
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

from .baselines import discounts

STEPS = 2  # of a trajectory


def process(rng: np.random.Generator) -> tuple[MDP, Tensor]:
    """Three states, two actions, two successors of each pair: a random one, and a random policy's logits (3, 2)."""
    mdp = tables.garnet(3, 2, 2, rng, 0.9, mean=1.0)
    return mdp, torch.from_numpy(rng.standard_normal(mdp.size))


def trajectories(mdp: MDP, steps: int = STEPS) -> tuple[Rollout, Tensor]:
    """Every possible trajectory, one in each row, and the environment's part of its probability (K,)."""
    S, A = mdp.size
    found, world = [], []
    for first in np.flatnonzero(mdp.start):
        for path in product(range(A), range(S), repeat=steps):
            states, actions, next_states = (int(first), *path[1:-2:2]), path[::2], path[1::2]
            if (p := mdp.start[first] * mdp.P[states, actions, next_states].prod()) > 0:
                found.append((states, actions, next_states))
                world.append(p)
    s, a, s_next = np.array(found).transpose(1, 2, 0)  # (T, K) each
    no = torch.zeros(s.shape, dtype=torch.bool)
    s, a, rewards, s_next = map(torch.from_numpy, (s, a, mdp.rewards[s, a, s_next], s_next))
    return Rollout(s, a, rewards, s_next, no, no), torch.tensor(world, dtype=torch.float64)


def sample(mdp: MDP, logits: Tensor, rows: int, rng: np.random.Generator) -> Rollout:
    """`rows` sampled trajectories."""
    starts = rng.choice(len(mdp.start), rows, p=mdp.start)
    return sample_tabular(mdp, logits.softmax(-1).numpy(), STEPS, starts, rng)


def log_probs(rollout: Rollout, logits: Tensor) -> Tensor:
    """log π(a|s) of the actions taken (T, N)."""
    return logits.log_softmax(-1)[rollout.observations, rollout.actions]


def probabilities(rollout: Rollout, world: Tensor, logits: Tensor) -> Tensor:
    """The probability of each listed trajectory (K,); differentiable."""
    return world * log_probs(rollout, logits).sum(0).exp()


def episode_gradients(rollout: Rollout, logits: Tensor, advantages: Tensor) -> Tensor:
    """Σ_t ∇ log π(a_t|s_t) A_t of each row (N, S·A), from ∂ log π(a|s) / ∂ logits(s, ·) = 1(a) − π(·|s)."""
    S, A = logits.shape
    score = F.one_hot(rollout.actions, A) - logits.softmax(-1)[rollout.observations]  # (T, N, A)
    where = F.one_hot(rollout.observations, S).to(advantages.dtype)
    return torch.einsum("tns,tna,tn->nsa", where, score, advantages).flatten(1)


# --- The gradient of J, and the usual form without γ^t


def objective(rollout: Rollout, world: Tensor, logits: Tensor, gamma: float) -> Tensor:
    """J = Σ_τ p(τ) Σ_t γ^t r_t; differentiable."""
    return probabilities(rollout, world, logits) @ (discounts(gamma, rollout.rewards) * rollout.rewards).sum(0)


def gradient(rollout: Rollout, world: Tensor, logits: Tensor, gamma: float) -> Tensor:
    """∇J (S·A,) by automatic differentiation of J."""
    theta = logits.clone().requires_grad_()
    return torch.autograd.grad(objective(rollout, world, theta, gamma), theta)[0].flatten()


def usual_form(rollout: Rollout, world: Tensor, logits: Tensor, gamma: float) -> Tensor:
    """E[Σ_t ∇ log π(a_t|s_t) G_t] (S·A,), the policy gradient without the factor γ^t; differentiable."""
    return probabilities(rollout, world, logits) @ episode_gradients(rollout, logits, to_go(rollout, gamma))


def to_go(rollout: Rollout, gamma: float) -> Tensor:
    return returns_to_go(rollout.rewards, rollout.ends, gamma)


def asymmetry(field: Callable[[Tensor], Tensor], at: Tensor) -> float:
    """|D − Dᵀ| / |D| of the derivative D of a vector field (D,) at `at`. It is 0 for a gradient, as second derivatives
    commute; otherwise the field is the gradient of no function."""
    jacobian = torch.autograd.functional.jacobian(field, at).flatten(1)
    return float((jacobian - jacobian.T).norm() / jacobian.norm())


# --- Estimates


def batch_means(estimates: Tensor, rows: int) -> np.ndarray:
    """Estimates (N, D) of single episodes → those of batches of `rows` episodes (N // rows, D)."""
    whole = len(estimates) // rows * rows
    return estimates[:whole].view(-1, rows, estimates.shape[1]).mean(1).numpy()


def z_score(estimates: np.ndarray, exact: Tensor) -> float:
    """z-score of the mean of independent estimates (M, D) against its exact value (D,)."""
    return float(chi_square_z_correlated(estimates.mean(0) - exact.numpy(), np.cov(estimates.T) / len(estimates)))


def total_variance(estimates: np.ndarray) -> float:
    """The trace of the covariance of estimates (M, D)."""
    return float(estimates.var(0, ddof=1).sum())
