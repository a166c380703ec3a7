"""GAE four ways: as the sum that defines it, as a recursion, as one matrix, as a scan of maps. All equal the op `gae`.

    δ_t = r_t + γ · (1 − terminated_t) · V(next state of t) − V_t
    A_t = Σ_k (γλ)^k δ_{t+k}, up to the end of t's segment

Each takes rewards, values, next_values (T, N) and terminated, truncated (T, N) bool, and gives the advantages (T, N).
"""

import torch
from torch import Tensor

from finetune.rl.advantages import td_errors


def by_definition(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    lam: float,
) -> Tensor:
    """The sum, term by term: T² / 2 additions a row without an end."""
    deltas = td_errors(rewards, values, next_values, terminated, gamma)
    ends = terminated | truncated
    advantages = torch.zeros_like(deltas)
    for row in range(deltas.shape[1]):
        for t in range(len(deltas)):
            for k in range(len(deltas) - t):
                advantages[t, row] += (gamma * lam) ** k * deltas[t + k, row]
                if ends[t + k, row]:
                    break
    return advantages


def by_recursion(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    lam: float,
) -> Tensor:
    """A_t = δ_t + γλ · A_{t+1}, backwards in Python; nothing comes over an end. The loop of most code bases."""
    deltas = td_errors(rewards, values, next_values, terminated, gamma)
    ends = terminated | truncated
    advantages = torch.empty_like(deltas)
    following = torch.zeros_like(deltas[0])  # (N,)
    for t in reversed(range(len(deltas))):
        following = deltas[t] + (gamma * lam * following).masked_fill(ends[t], 0.0)
        advantages[t] = following
    return advantages


def as_matrix(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    lam: float,
) -> Tensor:
    """A = M δ with M[t, k] = (γλ)^(k − t) where k is not before t and in the same segment: one product, T² memory."""
    deltas = td_errors(rewards, values, next_values, terminated, gamma)
    ends = terminated | truncated
    segment = ends.cumsum(0) - ends.long()  # (T, N): ends before t
    steps = torch.arange(len(deltas))
    distance = steps - steps[:, None]  # (T, T): k − t
    powers = torch.where(distance >= 0, (gamma * lam) ** distance.clamp(min=0).to(deltas.dtype), 0.0)
    same = segment[:, None] == segment[None]  # (T, T, N)
    return torch.einsum("tk,tkn,kn->tn", powers, same.to(deltas.dtype), deltas)


def by_scan(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    lam: float,
) -> Tensor:
    """Step t maps A_{t+1} to δ_t + c_t · A_{t+1}; two such maps compose to a third, so log₂ T rounds suffice.

    In round i each step takes over the map of the 2^i steps from its own on: what a GPU's scan does.
    """
    offset = td_errors(rewards, values, next_values, terminated, gamma)
    factor = gamma * lam * (~(terminated | truncated)).to(offset.dtype)
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


VARIANTS = {
    "definition": by_definition,
    "recursion": by_recursion,
    "matrix": as_matrix,
    "scan": by_scan,
}
