"""Elements of the paged cache: stored as the tokens are, as int8, or as e4m3 in uint8, by integer arithmetic that every
GPU has (Triton converts float8 only where the hardware does)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST = {torch.int8: 127.0, torch.uint8: 448.0}


def is_fp8(cache: Tensor) -> bool:
    return cache.dtype == torch.uint8


@triton.jit
def widen(x, FP8: tl.constexpr):
    """Stored elements as fp32, without their scale."""
    if FP8:
        bits = x.to(tl.int32)
        size = bits & 0x7F
        # exponent and mantissa to the top, and 120 more in the exponent; this is exact for subnormals too
        value = (size << 20).to(tl.float32, bitcast=True) * 1329227995784915872903807060280344576.0
        value = tl.where(size == 0x7F, float("nan"), value)
        value = tl.where(bits >= 0x80, -value, value)
    else:
        value = x.to(tl.float32)
    return value


@triton.jit
def narrow(x, FP8: tl.constexpr):
    """fp32 within the type's range as its bits, to nearest, ties to even."""
    if FP8:
        bits = x.to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 960
        # 1.5 · 2^23: the integer, in units of 2^-9, stands in the low bits
        small = (size.to(tl.float32, bitcast=True) * 512.0 + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
        code = tl.where(size < 0x3C800000, small, normal)  # below 2^-6
        code = tl.where(bits < 0, code | 0x80, code).to(tl.uint8)
    else:
        code = ((x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000).to(tl.int8)
    return code
