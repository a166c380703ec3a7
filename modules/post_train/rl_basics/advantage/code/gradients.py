"""The policy gradient of a softmax over the table's logits, exactly and from rollouts, by what stands at ∇ log π.

∂ log π(a|s) / ∂ θ(s, b) = 1[a = b] − π(b|s)
"""

import numpy as np
import torch
from torch import Tensor

from finetune import ops
from finetune.rl.advantages import group_normalized, leave_one_out, returns_to_go, whitened
from finetune.rl.agents.reward_scale import RewardScale
from finetune.rl.envs.rollout import Rollout
from finetune.rl.statistics import chi_square_z_correlated
from finetune.rl.tabular import mdp as tables
from finetune.rl.tabular.mdp import MDP

UNBIASED_GRADIENTS = (
    "total_return", "reward_to_go", "value_baseline", "optimal_baseline", "leave_one_out", "gae", "advantage",
)  # fmt: skip
RESCALED_GRADIENTS = ("whitened", "scaled_rewards", "group_normalized")
GRADIENTS = (*UNBIASED_GRADIENTS, *RESCALED_GRADIENTS)


def exact_gradient(mdp: MDP, policy: np.ndarray, steps: int) -> np.ndarray:
    """Σ_{t<steps} γ^t Σ_s Pr(s_t = s) π(a|s) A^π(s, a) for every (s, a): the policy gradient theorem."""
    P, _ = tables.under(mdp, policy)
    seen, now = np.zeros(len(P)), np.array(mdp.start)
    for t in range(steps):
        seen += mdp.gamma**t * now
        now = now @ P
    A = np.where(mdp.allowed, tables.advantages(mdp, policy), 0.0)
    return seen[:, None] * policy * A


def optimal_baseline(mdp: MDP, policy: np.ndarray, V: np.ndarray) -> np.ndarray:
    """b(s) = E[|∇ log π|² Q] / E[|∇ log π|²] (S,): of all functions of the state the one that leaves the least variance
    to a step's own term. |∇ log π(a|s)|² = 1 − 2 π(a|s) + Σ_b π(b|s)²."""
    weights = policy * (1 - 2 * policy + (policy**2).sum(1, keepdims=True))
    Q = np.where(mdp.allowed, tables.action_values(mdp, V), 0.0)
    total = weights.sum(1)
    return np.where(total > 0, (weights * Q).sum(1) / np.where(total > 0, total, 1.0), V)


SUMS = ("count", "sums", "squares", "outer", "batches", "products")


class Slopes:
    """Mean, variance and covariance of the gradients of each factor (K) by D logits; a run's checkpoints hold it.

    The covariance is kept along at most 64 directions: all there are in a small table, random ones in a large one.
    """

    def __init__(self, wanted: np.ndarray, generator: np.random.Generator) -> None:
        self.wanted = wanted.ravel()  # the exact gradient
        d, k = len(self.wanted), len(GRADIENTS)
        m = min(d, 64)
        self.basis = torch.from_numpy(
            np.linalg.qr(np.column_stack([self.wanted, generator.normal(size=(d, m - 1))]))[0]
        )
        self.count = torch.zeros((), dtype=torch.float64)
        self.sums, self.squares, self.outer = (torch.zeros(k, *n, dtype=torch.float64) for n in ((d,), (), (m, m)))
        self.batches, self.products = torch.zeros(k, dtype=torch.float64), torch.zeros(k, k, dtype=torch.float64)

    def add(self, samples: Tensor) -> None:
        """(K, N, D)"""
        self.count += samples.shape[1]
        self.sums += samples.sum(1)
        self.squares += samples.square().sum((1, 2))
        own = samples.var(1).sum(1)  # (K,) the variance within this batch
        self.batches += own
        self.products += own[:, None] * own
        along = samples @ self.basis
        self.outer += along.mT @ along

    def mean(self) -> np.ndarray:
        return (self.sums / self.count).numpy()  # (K, D)

    def variance(self) -> np.ndarray:
        """(K,) trace of the covariance of one sample."""
        return (self.squares / self.count).numpy() - (self.mean() ** 2).sum(-1)

    def share_error(self, whole: int) -> np.ndarray:
        """(K,) standard error of a factor's variance as a part of that of the factor `whole`, from how the batches
        differ. Both come of the same rollouts, so that much of the noise cancels."""
        part = self.batches / self.batches[whole]
        off = self.products.diag() - 2 * part * self.products[:, whole] + part**2 * self.products[whole, whole]
        return (off.clamp(min=0).sqrt() / self.batches[whole]).numpy()

    def z(self) -> np.ndarray:
        """(K,) |mean − exact|², in standard deviations of what chance does."""
        mean = self.mean() @ self.basis.numpy()
        C = ((self.outer / self.count).numpy() - mean[:, :, None] * mean[:, None]) / float(self.count)
        size = float(abs(self.wanted).max())
        return chi_square_z_correlated(mean - self.wanted @ self.basis.numpy(), C, size)

    def state_dict(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in SUMS}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        vars(self).update(state)


def gradients(
    group: int, lam: float, mdp: MDP, rollout: Rollout, policy: np.ndarray, V: np.ndarray, scale: RewardScale
) -> Tensor:
    """(factors, groups, S·A): the mean over a group of rollouts of Σ_t γ^t ∇ log π(a_t|s_t) Ψ_t, up to the rollout's
    first end. The critic is exact."""
    states, actions, gamma = rollout.observations, rollout.actions, mdp.gamma
    values, table = torch.from_numpy(V), torch.from_numpy(policy)
    given = (
        rollout.rewards, values[states], values[rollout.next_observations], rollout.terminated, rollout.truncated
    )  # fmt: skip
    baselined, returns = ops.gae(*given, gamma=gamma, lam=1.0)
    smoothed, _ = ops.gae(*given, gamma=gamma, lam=lam)
    best = torch.from_numpy(optimal_baseline(mdp, policy, V))
    exact = torch.from_numpy(np.where(mdp.allowed, tables.advantages(mdp, policy), 0.0))
    grouped = returns[0].view(-1, group)
    discount = gamma ** torch.arange(len(states), dtype=torch.float64)[:, None]
    alone, alive = torch.ones_like(discount), rollout.first_episode
    last = rollout.ends.clone()
    last[-1] = True  # the rows of the next batch are not these
    factors = {  # Ψ, (T, N) or (N,)
        "total_return": alone * returns[0],
        "reward_to_go": discount * returns,
        "value_baseline": discount * baselined,
        "optimal_baseline": discount * (returns - best[states]),
        "leave_one_out": alone * leave_one_out(grouped).flatten(),
        "gae": discount * smoothed,
        "advantage": discount * exact[states, actions],
        "whitened": discount * whitened(smoothed, alive),
        "scaled_rewards": discount * returns_to_go(scale(rollout.rewards, last), rollout.ends, gamma),
        "group_normalized": alone * group_normalized(grouped).flatten(),
    }
    rows, (S, A) = states.shape[1], policy.shape
    at = (torch.arange(rows) * S * A + states * A + actions).flatten()
    found = []
    for name in GRADIENTS:
        taken = torch.zeros(rows * S * A, dtype=torch.float64)
        taken.index_add_(0, at, (factors[name] * alive).flatten())
        weights = taken.view(rows, S, A)
        slope = weights - weights.sum(-1, keepdim=True) * table  # (N, S, A)
        found.append(slope.view(-1, group, S * A).mean(1))
    return torch.stack(found)
