"""The L2 norm of many tensors together:  sqrt(Σ over all tensors of x²).

The first two of the three steps of clip_grad_norm.py: each block's sum of squares, then their sum in one program and in
a fixed order. Bytes: one sweep, the dtype's size an element. FLOPs: 2 an element. Intensity: 1 FLOP/byte in bf16; the
roof is memory bandwidth.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import empty_f32
from .clip_grad_norm import norm_of, squares_of


def global_norm(tensors: list[Tensor]) -> Tensor:
    if not any(t.numel() for t in tensors):
        return empty_f32(tensors[0]).zero_()
    squares, _ = squares_of([t.contiguous() for t in tensors])
    return norm_of(squares, 0.0)[0].clone()


OPERATORS = {"global_norm": global_norm}


def typical(dtype: torch.dtype):
    yield "global_norm", ([torch.empty(3072, 576, dtype=dtype), torch.empty(576, dtype=dtype)],)
