"""Dynamic loss scaling: the loss is multiplied so that small gradients survive in fp16, and divided in fp32 again.

Dynamic scaling looks for the largest factor that does not overflow (Micikevicius et al. 2018, arXiv:1710.03740, §3.2):
a step with an inf or NaN is skipped and the factor shrinks; after `interval` good steps it grows. The two policies in
use differ in when it shrinks and in what they count:

torch      (torch.amp.GradScaler) shrinks at every overflow; counts good steps and starts again after each change.
deepspeed  (DynamicLossScaler) forgives `hysteresis` − 1 overflows before it shrinks; grows at a good step that comes
           after `interval` (or a multiple) good ones since the last overflow, and only then forgives again.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from finetune import ops

LARGEST = 3.4028234663852886e38  # fp32: torch's scale is a tensor and stays where it would become infinite


class LossScaler:
    """The factor and its counters as tensors, so that a GPU never has to tell the host that something overflowed.

    `update(found_inf)` after every step, taken or skipped.
    """

    def __init__(
        self, policy: str = "torch", scale: float = 65536.0, interval: int = 2000, hysteresis: int = 2
    ) -> None:
        patience = hysteresis if policy == "deepspeed" else 1
        self.settings: dict[str, Any] = {"policy": policy, "growth_interval": interval, "hysteresis": patience}
        self.settings["min_scale"] = 1.0 if policy == "deepspeed" else 0.0
        self.scale = torch.tensor(scale)
        self.growth, self.patience = (torch.tensor(n, dtype=torch.int32) for n in (0, patience))

    def update(self, found_inf: Tensor) -> None:
        ops.loss_scale_update_(self.scale, self.growth, self.patience, found_inf, **self.settings)

    def state_dict(self) -> dict[str, Tensor]:
        return {"scale": self.scale, "growth": self.growth, "patience": self.patience}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, own in self.state_dict().items():
            own.copy_(state[name])


class PlainScaler:
    """The same rules in plain numbers: the definition that tests compare with."""

    def __init__(
        self,
        policy: Literal["torch", "deepspeed"] = "torch",
        scale: float = 65536.0,
        interval: int = 2000,
        growth: float = 2.0,
        backoff: float = 0.5,
        hysteresis: int = 2,
        least: float = 1.0,
    ) -> None:
        self.policy, self.scale, self.interval = policy, scale, interval
        self.growth, self.backoff, self.hysteresis, self.least = growth, backoff, hysteresis, least
        self.good = 0  # steps since the last change (torch) or the last overflow (deepspeed)
        self.patience = hysteresis  # deepspeed: the overflow that brings this to 0 shrinks the scale

    def update(self, overflow: bool) -> None:
        if self.policy == "torch":
            self._torch(overflow)
        else:
            self._deepspeed(overflow)

    def _torch(self, overflow: bool) -> None:
        self.good = 0 if overflow else self.good + 1
        if overflow:
            self.scale *= self.backoff
        elif self.good == self.interval:
            if self.scale * self.growth <= LARGEST:
                self.scale *= self.growth
            self.good = 0

    def _deepspeed(self, overflow: bool) -> None:
        if overflow:
            self.good = 0
            if self.patience == 1:  # and it stays 1: the next overflow shrinks the scale at once
                self.scale = max(self.scale * self.backoff, self.least)
            else:
                self.patience -= 1
            return
        if self.good and self.good % self.interval == 0:
            self.scale *= self.growth
            self.patience = self.hysteresis
        self.good += 1
