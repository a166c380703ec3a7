"""A dynamic loss scaler for fp16 training.

LossScaler(scale, interval): `scale` (a float) is what the loss is multiplied by; it is an attribute that changes.

unscale(gradients) → (list, finite): gradients are fp16 or fp32 tensors of the scaled loss; the list has them divided by
scale, in fp32 (in fp16 small ones would vanish). finite is a bool: False if any gradient has inf or NaN. The gradients
given are not changed.

update(finite): called once a step. After a step that was not finite (it is skipped) the scale is halved, but never to
less than 1, and the count of good steps starts again. After `interval` finite steps in a row the scale is doubled, but
never to more than 2**24, and the count starts again.

    >>> scaler = LossScaler(scale=1024.0, interval=2)
    >>> scaler.unscale([torch.tensor([1.0, 6e-8], dtype=torch.float16)])
    ([tensor([9.7656e-04, 5.8208e-11])], True)
    >>> scaler.unscale([torch.tensor([torch.inf]), torch.tensor([1.0])])[1]
    False
    >>> for finite in (True, True, False, False, True):
    ...     scaler.update(finite)
    >>> scaler.scale
    512.0
"""

from torch import Tensor


class LossScaler:
    def __init__(self, scale: float = 65536.0, interval: int = 2000) -> None:
        self.scale, self.interval = scale, interval
        self.good = 0

    def unscale(self, gradients: list[Tensor]) -> tuple[list[Tensor], bool]:
        finite = all(bool(g.isfinite().all()) for g in gradients)
        return [g.float() / self.scale for g in gradients], finite

    def update(self, finite: bool) -> None:
        if not finite:
            self.scale = max(self.scale / 2, 1.0)
            self.good = 0
            return
        self.good += 1
        if self.good == self.interval:
            self.scale = min(self.scale * 2, 2.0**24)
            self.good = 0
