"""Policy gradients of a softmax over a table's logits: exact, and sampled with ten factors of ∇ log π.

∇J = Σ_t γ^t E[∇ log π(a_t|s_t) · Ψ_t]        Ψ = return, reward-to-go, advantage, …
∂ log π(a|s) / ∂ θ(s, b) = 1[a = b] − π(b|s)
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from finetune import ops
from finetune.rl.advantages import group_normalized, leave_one_out, returns_to_go, whitened
from finetune.rl.agents.reward_scale import RewardScale
from finetune.rl.envs.rollout import Rollout
from finetune.rl.statistics import chi_square_z_correlated, critical_z
from finetune.rl.tabular import mdp as tables
from finetune.rl.tabular.mdp import MDP
from finetune.runs.display import uncertain
from finetune.runs.run import Run

from . import plots

UNBIASED_GRADIENTS = (
    "total_return", "reward_to_go", "value_baseline", "optimal_baseline", "leave_one_out", "gae", "advantage",
)  # fmt: skip
GRADIENTS = (*UNBIASED_GRADIENTS, "whitened", "scaled_rewards", "group_normalized")


def exact_gradient(mdp: MDP, policy: np.ndarray, steps: int) -> np.ndarray:
    """The policy gradient theorem: Σ_{t<steps} γ^t Pr(s_t = s) π(a|s) A^π(s, a) for every (s, a)."""
    P, _ = tables.under(mdp, policy)
    visits, now = np.zeros(len(P)), np.array(mdp.start)
    for t in range(steps):
        visits += mdp.gamma**t * now
        now = now @ P
    A = np.where(mdp.allowed, tables.advantages(mdp, policy), 0.0)
    return visits[:, None] * policy * A


def optimal_baseline(mdp: MDP, policy: np.ndarray, V: np.ndarray) -> np.ndarray:
    """b(s) = E[|∇ log π|² Q] / E[|∇ log π|²] (S,): the baseline of least variance for a step's own term (Greensmith et
    al. 2004). |∇ log π(a|s)|² = 1 − 2 π(a|s) + Σ_b π(b|s)²."""
    weights = policy * (1 - 2 * policy + (policy**2).sum(1, keepdims=True))
    Q = np.where(mdp.allowed, tables.action_values(mdp, V), 0.0)
    total = weights.sum(1)
    return np.where(total > 0, (weights * Q).sum(1) / np.where(total > 0, total, 1.0), V)


SUMS = ("count", "sums", "squares", "outer", "batches", "products")


class GradientMoments:
    """Running mean, variance and covariance of sampled gradients (D,) with each of K factors.

    The covariance is kept along at most 64 directions: all of them in a small table, random ones in a large one.
    """

    def __init__(self, exact: np.ndarray, rng: np.random.Generator) -> None:
        self.exact = exact.ravel()
        d, k = len(self.exact), len(GRADIENTS)
        m = min(d, 64)
        self.basis = torch.from_numpy(np.linalg.qr(np.column_stack([self.exact, rng.normal(size=(d, m - 1))]))[0])
        self.count = torch.zeros((), dtype=torch.float64)
        self.sums, self.squares, self.outer = (torch.zeros(k, *n, dtype=torch.float64) for n in ((d,), (), (m, m)))
        self.batches, self.products = torch.zeros(k, dtype=torch.float64), torch.zeros(k, k, dtype=torch.float64)

    def add(self, samples: Tensor) -> None:
        """Adds N samples (K, N, D)."""
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
        """The trace of the covariance of one sample (K,)."""
        return (self.squares / self.count).numpy() - (self.mean() ** 2).sum(-1)

    def ratio_error(self, reference: int) -> np.ndarray:
        """Standard error (K,) of each factor's variance relative to that of the factor `reference`, from the spread of
        the batches. Both use the same rollouts, so much of the noise cancels."""
        ratio, cross = self.batches / self.batches[reference], self.products[:, reference]
        square = self.products.diag() - 2 * ratio * cross + ratio**2 * self.products[reference, reference]
        return (square.clamp(min=0).sqrt() / self.batches[reference]).numpy()

    def z(self) -> np.ndarray:
        """z-score of |mean − exact|² for each factor (K,)."""
        mean = self.mean() @ self.basis.numpy()
        C = ((self.outer / self.count).numpy() - mean[:, :, None] * mean[:, None]) / float(self.count)
        size = float(abs(self.exact).max())
        return chi_square_z_correlated(mean - self.exact @ self.basis.numpy(), C, size)

    def state_dict(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in SUMS}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        vars(self).update(state)


def sampled(
    group: int, lam: float, mdp: MDP, rollout: Rollout, policy: np.ndarray, V: np.ndarray, scale: RewardScale
) -> Tensor:
    """(factors, groups, S·A): the mean over each group of rollouts of Σ_t γ^t ∇ log π(a_t|s_t) Ψ_t, up to a rollout's
    first end. The critic V is exact."""
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
    every, alive = torch.ones_like(discount), rollout.first_episode
    last = rollout.ends.clone()
    last[-1] = True  # the next batch has other rollouts
    factors = {  # Ψ (T, N)
        "total_return": every * returns[0],
        "reward_to_go": discount * returns,
        "value_baseline": discount * baselined,
        "optimal_baseline": discount * (returns - best[states]),
        "leave_one_out": every * leave_one_out(grouped).flatten(),
        "gae": discount * smoothed,
        "advantage": discount * exact[states, actions],
        "whitened": discount * whitened(smoothed, alive),
        "scaled_rewards": discount * returns_to_go(scale(rollout.rewards, last), rollout.ends, gamma),
        "group_normalized": every * group_normalized(grouped).flatten(),
    }
    rows, (S, A) = states.shape[1], policy.shape
    at = (torch.arange(rows) * S * A + states * A + actions).flatten()
    found = []
    for name in GRADIENTS:
        sums = torch.zeros(rows * S * A, dtype=torch.float64)
        weights = sums.index_add_(0, at, (factors[name] * alive).flatten()).view(rows, S, A)
        gradient = weights - weights.sum(-1, keepdim=True) * table  # (N, S, A)
        found.append(gradient.view(-1, group, S * A).mean(1))
    return torch.stack(found)


def report(run: Run, moments: GradientMoments, drawn: bool) -> None:
    """The result is the variance with the optimal baseline; that the unbiased factors are unbiased is checked. In an
    MDP of one's own the variance has no target: how much a baseline saves depends on the rewards."""
    mean, exact, variance = moments.mean(), moments.exact, moments.variance()
    reference = GRADIENTS.index("reward_to_go")
    z = dict(zip(GRADIENTS, moments.z(), strict=True))
    ratio = dict(zip(GRADIENTS, variance / (variance[reference] or 1.0), strict=True))  # 0 in a world without chance
    error = dict(zip(GRADIENTS, moments.ratio_error(reference), strict=True))
    lengths = np.linalg.norm(mean, axis=1) * np.linalg.norm(exact)
    cosine = dict(zip(GRADIENTS, mean @ exact / np.maximum(lengths, 1e-300), strict=True))
    worst = max(z[name] for name in UNBIASED_GRADIENTS)
    run.check("gradient_z", worst, at_most=critical_z(len(UNBIASED_GRADIENTS)))
    run.check("gradient_z_group_normalized", z["group_normalized"])
    run.result("variance_with_optimal_baseline", ratio["optimal_baseline"], error=error["optimal_baseline"],
               baseline=1.0, target=0.5 if drawn else None, higher=False)  # fmt: skip
    run.table(
        "the policy gradient by its factor Ψ: z of the mean, variance (reward-to-go = 1), cosine with ∇J",
        [
            {
                "factor": name,
                "z": f"{z[name]:.1f}",
                "variance": uncertain(ratio[name], error[name]),
                "cosine": f"{cosine[name]:.4f}",
            }
            for name in GRADIENTS
        ],
    )
    plots.gradient_variance(run, {name: (ratio[name], error[name]) for name in UNBIASED_GRADIENTS})
