"""Rotary position embedding, with both ways of pairing dimensions.

x (…, t, d), d even, token j at position offset + j → like x. Pair i of d/2 is turned by the angle
position · base^(−2i/d): (a, b) becomes (a·cos − b·sin, b·cos + a·sin). Pairs are dimensions i and i + d/2 (Llama in
transformers), or 2i and 2i + 1 with interleaved=True (the paper, GPT-J). Angles are computed in fp32 at least, whatever
the type of x. Gradients must be right too (autograd may make them).

    >>> rope(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), offset=1)
    tensor([[ 0.5403,  0.8415],
            [-0.4161,  0.9093]])
    >>> rope(torch.tensor([[1.0, 0.0, 1.0, 0.0]]), offset=1, interleaved=True)
    tensor([[0.5403, 0.8415, 0.9999, 0.0100]])
"""

import torch
from torch import Tensor


def rope(x: Tensor, offset: int = 0, base: float = 10000.0, interleaved: bool = False) -> Tensor:
    t, d = x.shape[-2:]
    positions = torch.arange(offset, offset + t, dtype=torch.float32, device=x.device)
    frequencies = base ** (-torch.arange(0, d, 2, dtype=torch.float32, device=x.device) / d)
    angles = positions[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    turned = (a * cos - b * sin, b * cos + a * sin)
    found = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return found.to(x.dtype)
