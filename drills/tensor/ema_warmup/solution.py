"""An exponential moving average of weights, with warm-up.

average and weights: dicts with the same names, whose tensors agree in shape; step counts from 0 → a new dict. A
floating-point entry becomes d·average + (1 − d)·weights with d = min(decay, (1 + step) / (10 + step)), computed and
kept in fp32 whatever the type of the weights (in bf16 a change of one thousandth would be lost). Any other entry (a
counter) is copied from the weights, with its type. Neither dict is changed, nor are their tensors.

    >>> ema({"w": torch.tensor([1.0]), "n": torch.tensor(3)}, {"w": torch.tensor([3.0]), "n": torch.tensor(4)}, step=0)
    {'w': tensor([2.8000]), 'n': tensor(4)}
"""

from torch import Tensor


def ema(average: dict[str, Tensor], weights: dict[str, Tensor], step: int, decay: float = 0.999) -> dict[str, Tensor]:
    d = min(decay, (1 + step) / (10 + step))
    return {
        name: d * average[name].float() + (1 - d) * new.float() if new.is_floating_point() else new.clone()
        for name, new in weights.items()
    }
