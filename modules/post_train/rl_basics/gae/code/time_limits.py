"""Time limits: two tabular critics on the same episodes, one bootstraps at truncation, one takes it for termination.

V(s) ← V(s) + lr · (mean λ-return of s − V(s))
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from finetune import ops
from finetune.rl.envs.rollout import Rollout
from finetune.rl.tabular import mdp as tables
from finetune.rl.tabular.mdp import MDP
from finetune.rl.tabular.sample import sample_tabular

if TYPE_CHECKING:
    from .main import Config


def learn(V: Tensor, rollout: Rollout, gamma: float, lam: float, lr: float) -> None:
    """Moves V, in place, towards the mean λ-return of each state that was seen."""
    states, next_states = rollout.observations, rollout.next_observations
    _, returns = ops.gae(
        rollout.rewards, V[states], V[next_states], rollout.terminated, rollout.truncated, gamma=gamma, lam=lam
    )
    visits = torch.bincount(states.flatten(), minlength=len(V))
    sums = torch.zeros_like(V).index_add_(0, states.flatten(), returns.flatten())
    V += torch.where(visits > 0, lr * (sums / visits.clamp(min=1) - V), 0.0)


def truncation_as_termination(rollout: Rollout) -> Rollout:
    """The same rollout for a critic that knows one `done` flag only."""
    return Rollout(**vars(rollout) | {"terminated": rollout.ends, "truncated": torch.zeros_like(rollout.ends)})


def one_batch_error(cfg: Config, mdp: MDP, policy: np.ndarray, V: np.ndarray, rng: np.random.Generator) -> float:
    """The bar for a critic that learns from many batches: the root mean square over the states of the standard error of
    the mean return after one batch, if every return were complete and independent: √(σ²(s) / visits).

    σ² = E[(r + γ V(s') − V(s))²] + γ² E[σ²(s')], the variance of a return (Sobel 1982).
    """
    P, _ = tables.under(mdp, policy)
    surprise = (mdp.rewards + mdp.gamma * V - V[:, None, None]) ** 2
    one_step = (policy[:, :, None] * mdp.P * surprise).sum((1, 2)) * ~mdp.terminal
    variance = np.linalg.solve(np.eye(len(V)) - mdp.gamma**2 * P * ~mdp.terminal[:, None], one_step)
    starts = rng.choice(len(V), cfg.rows, p=mdp.start)
    states = sample_tabular(mdp, policy, cfg.length, starts, rng, limit=cfg.limit).observations.flatten()
    visits = np.bincount(states.numpy(), minlength=len(V)).clip(1)
    return float(np.sqrt((variance / visits)[~mdp.terminal].mean()))
