"""GAE four ways: as the sum that defines it, as a recursion, as one matrix, as a scan of maps. All equal the op `gae`.

    δ_t = r_t + γ · (1 − terminated_t) · V(next state of t) − V_t
    A_t = Σ_k (γλ)^k δ_{t+k}, up to the end of t's segment

Each takes the δ_t (T, N), the ends of segments (T, N) bool and γλ, and gives the advantages (T, N); as `VARIANTS` has
them, they take what the op takes: rewards, values, next_values, terminated, truncated, γ and λ.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from finetune.rl.advantages import td_errors


def by_definition(deltas: Tensor, ends: Tensor, decay: float) -> Tensor:
    """The sum, term by term: T² / 2 additions a row without an end."""
    advantages = torch.zeros_like(deltas)
    for row in range(deltas.shape[1]):
        for t in range(len(deltas)):
            for k in range(len(deltas) - t):
                advantages[t, row] += decay**k * deltas[t + k, row]
                if ends[t + k, row]:
                    break
    return advantages


def by_recursion(deltas: Tensor, ends: Tensor, decay: float) -> Tensor:
    """A_t = δ_t + γλ · A_{t+1}, backwards in Python; nothing comes over an end. The loop of most code bases."""
    advantages = torch.empty_like(deltas)
    following = torch.zeros_like(deltas[0])  # (N,)
    for t in reversed(range(len(deltas))):
        following = deltas[t] + (decay * following).masked_fill(ends[t], 0.0)
        advantages[t] = following
    return advantages


def as_matrix(deltas: Tensor, ends: Tensor, decay: float) -> Tensor:
    """A = M δ with M[t, k] = (γλ)^(k − t) where k is not before t and in the same segment: one product, T² memory."""
    segment = ends.cumsum(0) - ends.long()  # (T, N): ends before t
    steps = torch.arange(len(deltas))
    distance = steps - steps[:, None]  # (T, T): k − t
    powers = torch.where(distance >= 0, decay ** distance.clamp(min=0).to(deltas.dtype), 0.0)
    same = segment[:, None] == segment[None]  # (T, T, N)
    return torch.einsum("tk,tkn,kn->tn", powers, same.to(deltas.dtype), deltas)


def by_scan(deltas: Tensor, ends: Tensor, decay: float) -> Tensor:
    """Step t maps A_{t+1} to δ_t + c_t · A_{t+1}; two such maps compose to a third, so log₂ T rounds suffice.

    In round i each step takes over the map of the 2^i steps from its own on: what a GPU's scan does.
    """
    offset, factor = deltas, decay * (~ends).to(deltas.dtype)
    reach = 1
    while reach < len(offset):
        behind = torch.zeros_like(offset)
        behind[:-reach] = offset[reach:]
        offset = torch.where(factor == 0, offset, offset + factor * behind)  # 0 · NaN behind an end is no NaN here
        shifted = torch.zeros_like(factor)
        shifted[:-reach] = factor[reach:]
        factor = factor * shifted
        reach *= 2
    return offset


def of_rollout(way: Callable[[Tensor, Tensor, float], Tensor]) -> Callable[..., Tensor]:
    def advantages(
        rewards: Tensor,
        values: Tensor,
        next_values: Tensor,
        terminated: Tensor,
        truncated: Tensor,
        gamma: float,
        lam: float,
    ) -> Tensor:
        deltas = td_errors(rewards, values, next_values, terminated, gamma)
        return way(deltas, terminated | truncated, gamma * lam)

    return advantages


VARIANTS = {
    "definition": of_rollout(by_definition),
    "recursion": of_rollout(by_recursion),
    "matrix": of_rollout(as_matrix),
    "scan": of_rollout(by_scan),
}
