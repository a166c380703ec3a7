import math

import torch


class LossScaler:
    def __init__(self, scale=65536.0, interval=2000):
        self.exponent, self.interval, self.history = math.log2(scale), interval, []

    @property
    def scale(self):
        return 2.0**self.exponent

    def unscale(self, gradients):
        found = [g.to(torch.float32) * 2.0**-self.exponent for g in gradients]
        return found, all(math.isfinite(x) for g in found for x in g.flatten().tolist())

    def update(self, finite):
        self.history = [*self.history, finite]
        if not finite:
            self.exponent = max(self.exponent - 1, 0)
            self.history = []
        elif len(self.history) >= self.interval:
            self.exponent = min(self.exponent + 1, 24)
            self.history = []
