"""GELU's tanh form (Hendrycks & Gimpel 2016, arXiv:1606.08415):  y = x · s,  s = σ(2u),  2u = x · (a + b x²)

    dx = dy · (s + x · s · (1 − s) · (a + 3 b x²))          a = 2 √(2/π),  b = 0.044715 a

Layout: contiguous, BLOCK_SIZE elements a program. σ is computed again in the backward pass rather than kept.
Bytes: 2 an element forward (read x, write y), 3 backward (read dy and x, write dx), times the dtype's size.
FLOPs: about 8 forward and 17 backward, an exponential among them. Intensity: 3 FLOP/byte in bf16; the roof is memory
bandwidth.
Source: the formulas.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_SIZE = 1024


@triton.jit
def sigmoid(x, square):
    """s and s · (1 − s), from exp(−|2u|) so that neither loses its digits."""
    u2 = x * (1.5957691216 + 0.0713548163 * square)
    e = tl.exp(-tl.abs(u2))
    r = 1 / (1 + e)
    return tl.where(u2 < 0, e * r, r), e * r * r


@triton.jit
def gelu_kernel(x, y, size, BLOCK_SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    v = tl.load(x + at, mask=at < size, other=0.0).to(tl.float32)
    s, _ = sigmoid(v, v * v)
    tl.store(y + at, v * s, mask=at < size)


@triton.jit
def gelu_backward_kernel(dy, x, dx, size, BLOCK_SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    v = tl.load(x + at, mask=at < size, other=0.0).to(tl.float32)
    d = tl.load(dy + at, mask=at < size, other=0.0).to(tl.float32)
    square = v * v
    s, slope = sigmoid(v, square)
    inner = 1.5957691216 + 3 * 0.0713548163 * square
    tl.store(dx + at, d * (s + v * slope * inner), mask=at < size)


def gelu(x: Tensor) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        gelu_kernel[(triton.cdiv(x.numel(), BLOCK_SIZE),)](x, y, x.numel(), BLOCK_SIZE=BLOCK_SIZE)
    return y


def gelu_backward(dy: Tensor, x: Tensor) -> Tensor:
    dy, x = dy.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    if x.numel():
        gelu_backward_kernel[(triton.cdiv(x.numel(), BLOCK_SIZE),)](dy, x, dx, x.numel(), BLOCK_SIZE=BLOCK_SIZE)
    return dx


OPERATORS = {"gelu": gelu, "gelu_backward": gelu_backward}


def typical(dtype: torch.dtype):
    x = torch.empty(512, 3072, dtype=dtype)
    yield "gelu", (x,)
    yield "gelu_backward", (x, x)
