"""Weights in int8 with a scale for each output channel.

quantize(weight), weight (out, in) float32 or bfloat16 → (codes, scales): scales (out,) float32 is the largest absolute
value of a row divided by 127, or 1 for a row of zeros; codes (out, in) int8 is weight / scale rounded to the nearest
integer, halves to even, all of it in float32.
linear(x, codes, scales), x (…, in) float32 → (…, out) float32: x times the dequantized weight, transposed.

    >>> codes, scales = quantize(torch.tensor([[127.0, -63.6], [0.0, 0.25]]))
    >>> codes, scales
    (tensor([[127, -64],
            [  0, 127]], dtype=torch.int8), tensor([1.0000, 0.0020]))
    >>> linear(torch.tensor([1.0, 1.0]), codes, scales)
    tensor([63.0000,  0.2500])
"""

import torch
from torch import Tensor


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    wide = weight.float()
    scales = wide.abs().amax(1) / 127
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    codes = (wide / scales[:, None]).round().clamp(-127, 127)
    return codes.to(torch.int8), scales


def linear(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    return x @ codes.to(x.dtype).T * scales
