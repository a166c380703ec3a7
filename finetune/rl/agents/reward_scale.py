"""Reward scaling for training: one learning rate, clip and critic then fit an environment in any unit of reward."""

from __future__ import annotations

import torch
from torch import Tensor

from finetune.rl.statistics import Welford


class RewardScale:
    """Divides rewards by the running standard deviation of the discounted return, so that a critic's targets are near 1
    (VecNormalize of OpenAI baselines). That return runs forwards in time: R_t = γ R_{t−1} + r_t, from 0 after an end.
    Rewards are not centered: subtracting a constant from every reward changes how good it is to stay alive.
    """

    def __init__(self, rows: int, gamma: float, clip: float = 10.0, eps: float = 1e-8) -> None:
        self.gamma, self.clip, self.eps = gamma, clip, eps
        self.returns, self.seen = torch.zeros(rows, dtype=torch.float64), Welford()

    def __call__(self, rewards: Tensor, ends: Tensor) -> Tensor:
        """Scales (T, N) rewards, which continue the rows of the last call. Step t uses the deviation as of step t."""
        scaled = torch.empty_like(rewards)
        for t in range(len(rewards)):
            self.returns = self.gamma * self.returns + rewards[t]
            self.seen.add(self.returns)
            scaled[t] = (rewards[t] / (self.seen.variance() + self.eps).sqrt()).clamp(-self.clip, self.clip)
            self.returns = self.returns.masked_fill(ends[t], 0.0)
        return scaled

    def state_dict(self) -> dict[str, Tensor]:
        return {"returns": self.returns} | self.seen.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.returns = state["returns"]
        self.seen.load_state_dict(state)


class RewardSize:
    """The largest absolute reward so far. Training divides rewards by it, so that a learning rate, an entropy bonus, a
    clip or the scale of a value function mean the same in any unit of reward."""

    def __init__(self) -> None:
        self.largest = 0.0

    def see(self, rewards: Tensor) -> float:
        """Updates with these rewards and returns the size; 1 while all rewards were 0."""
        self.largest = max(self.largest, float(rewards.abs().max()))
        return self.size

    @property
    def size(self) -> float:
        return self.largest or 1.0

    def state_dict(self) -> dict[str, float]:
        return {"largest": self.largest}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.largest = state["largest"]
