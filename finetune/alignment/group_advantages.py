"""Advantages of answers from the rewards of the other answers to the same prompt: no value network.

Rewards r (groups, size); a row holds the answers to one prompt. An advantage is one number for all tokens of an answer.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Kind = Literal["group", "group_centered", "batch", "leave_one_out"]
EPSILON = 1e-4  # added to a standard deviation
KINDS: dict[str, str] = {
    "group": "(r − mean of the group) / its standard deviation: GRPO (Shao et al. 2024, arXiv:2402.03300, §4.1.2)",
    "group_centered": "r − mean of the group: Dr. GRPO (Liu et al. 2025, arXiv:2503.20783), as the deviation weights "
    "easy and hard prompts more",
    "batch": "(r − mean of the group) / standard deviation of the batch (REINFORCE++, arXiv:2501.03262)",
    "leave_one_out": "r − mean of the others of the group: RLOO (Ahmadian et al. 2024, arXiv:2402.14740), unbiased",
}


def advantages(rewards: Tensor, kind: Kind = "group") -> Tensor:
    """(groups, size) → (groups, size), of the kind. Deviations are the unbiased ones (n − 1); a group of equal rewards,
    and a group of one, has advantages of exactly 0."""
    size = rewards.shape[1]
    centered = rewards - rewards.mean(1, keepdim=True)
    centered = centered.masked_fill((rewards == rewards[:, :1]).all(1, keepdim=True), 0)  # no rounding where all agree
    if kind == "group_centered" or size == 1:
        return centered
    if kind == "leave_one_out":  # r_i − (Σ r − r_i) / (n − 1) = n / (n − 1) · (r_i − mean)
        return centered * (size / (size - 1))
    deviation = rewards.std(1, keepdim=True) if kind == "group" else rewards.std()
    return centered / (deviation + EPSILON)


def spread(rewards: Tensor) -> Tensor:
    """(groups,) bool: whether a group's rewards differ. One without spread has no gradient (DAPO's dynamic sampling,
    Yu et al. 2025, arXiv:2503.14476, §3.2, samples others instead)."""
    return (rewards != rewards[:, :1]).any(1)


def overlong_penalty(lengths: Tensor, most: int, margin: int) -> Tensor:
    """0 up to most − margin tokens, from there linearly down to −1 at `most` (ibid., eq. 13)."""
    return ((most - margin - lengths) / max(margin, 1)).clamp(-1, 0)
