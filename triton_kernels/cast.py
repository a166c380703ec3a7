"""Conversion between float32, bfloat16, float16, float8_e4m3fn and float8_e5m2:  y = round(x · scale), on the bits.

With E exponent bits, M mantissa bits and bias 2^(E−1) − 1, an fp32 number that stays normal loses its lowest 23 − M
bits, one that becomes subnormal more. The kept part goes up by one where the lost part is more than half (or half, and
the last bit kept is odd), or stochastically where a random word / 2^32 is below it; a carry runs into the exponent by
itself. All formats share this code, and all architectures: Triton's own fp8 types need newer ones, and have no such
rounding. Random words: Philox-4x32-10 (Salmon et al. 2011), word i mod 4 of counter i // 4 under the key `seed`; one
call serves four elements. 8-bit floats come and go as bytes.
Layout: flat; a program takes BLOCK elements. Bytes: the sizes of both dtypes an element. FLOPs: about 20 integer
operations, 30 more with random words. Intensity: 4 to 10 operations a byte; the roof is memory bandwidth.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import check

# float32, bfloat16, float16, float8_e4m3fn, float8_e5m2, as the op file numbers them; 8 bits are stored as bytes
STORED = (torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.uint8)
LAYOUTS = (None, (8, 7, 0x7F80, 0x7FC0), (5, 10, 0x7C00, 0x7E00), (4, 3, 0x7F, 0x7F), (5, 2, 0x7C, 0x7F))
BLOCK = 1024


@triton.jit
def widen(x, GIVEN: tl.constexpr):
    """fp32 of what is stored."""
    if GIVEN == 4:  # e5m2: the upper half of a float16
        wide = (x.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
    elif GIVEN == 3:
        size = x.to(tl.int32) & 0x7F
        wide = ((size << 20) + (120 << 23)).to(tl.float32, bitcast=True)
        wide = tl.where(size < 8, size.to(tl.float32) * 0.001953125, wide)  # subnormal: 2^−9 a unit
        wide = tl.where(size == 0x7F, float("nan"), wide)
        wide = tl.where(x.to(tl.int32) > 0x7F, -wide, wide)
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def random_words(first_group, seed, BLOCK: tl.constexpr):
    """(BLOCK,) uint32 of the elements from 4 · first_group on."""
    group = first_group + tl.arange(0, BLOCK // 4).to(tl.int64)
    low, high = (group & 0xFFFFFFFF).to(tl.uint32), (group >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(seed, low, high, low * 0, low * 0)
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [BLOCK])  # a, b, c, d of a group side by side


@triton.jit
def cast_kernel(
    x, y, scale, scale_number, n, seed, GIVEN: tl.constexpr, WANTED: tl.constexpr, SCALE: tl.constexpr,
    STOCHASTIC: tl.constexpr, SATURATE: tl.constexpr, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr,
    BEYOND: tl.constexpr, NAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    wide = widen(tl.load(x + at, mask=at < n, other=0), GIVEN)
    if SCALE:
        wide *= tl.load(scale)
    else:
        wide *= scale_number
    if WANTED == 0:
        tl.store(y + at, wide, mask=at < n)
    else:
        bias: tl.constexpr = (1 << (EXPONENT - 1)) - 1
        drop: tl.constexpr = 23 - MANTISSA
        bits = wide.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        size = bits & 0x7FFFFFFF
        field = size >> 23
        exponent = tl.where(field > 0, field - 127, -126)
        normal = exponent >= 1 - bias
        mantissa = (size & 0x7FFFFF) + tl.where(field > 0, 0x800000, 0)
        value = tl.where(normal, size - ((127 - bias) << 23), mantissa)
        drops = tl.minimum(tl.where(normal, drop, drop + 1 - bias - exponent), 62)
        one = value * 0 + 1
        out = value >> drops
        lost = value & ((one << drops) - 1)
        if STOCHASTIC:
            word = random_words(tl.program_id(0).to(tl.int64) * (BLOCK // 4), seed, BLOCK).to(tl.int64)
            few = tl.minimum(drops, 32)  # `lost` as a number of 2^−32; below 2^24, so 56 bits at the most
            out += (word < ((lost << (32 - few)) >> (drops - few))).to(tl.int64)
        else:
            half = one << (drops - 1)
            out += ((lost > half) | ((lost == half) & ((out & 1) == 1))).to(tl.int64)
        over: tl.constexpr = BEYOND - 1 if SATURATE else BEYOND
        out = tl.where((out >= BEYOND) | (size == 0x7F800000), over, out)
        out = tl.where(size > 0x7F800000, NAN, out) | ((bits >> 31) << (EXPONENT + MANTISSA))
        tl.store(y + at, out.to(y.dtype.element_ty), mask=at < n)


def cast(
    x: Tensor, given: int, wanted: int, scale: float, scale_tensor: Tensor | None, stochastic: bool, seed: int,
    saturate: bool,
) -> Tensor:  # fmt: skip
    check(x.dtype == STORED[given], "cast", "x is not of the format given")
    x, y = x.contiguous(), torch.empty(x.shape, dtype=STORED[wanted], device=x.device)
    if x.numel():
        names = ("EXPONENT", "MANTISSA", "BEYOND", "NAN")
        layout = dict(zip(names, LAYOUTS[wanted] or (0, 0, 0, 0), strict=True))
        cast_kernel[(triton.cdiv(x.numel(), BLOCK),)](
            x, y.view(torch.int16) if y.itemsize == 2 else y, y if scale_tensor is None else scale_tensor, scale,
            x.numel(), seed, GIVEN=given, WANTED=wanted, SCALE=scale_tensor is not None, STOCHASTIC=stochastic,
            SATURATE=saturate, **layout, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return y


OPERATORS = {"cast": cast}


def typical(dtype: torch.dtype):
    x = torch.empty(1 << 20, dtype=dtype)
    for wanted in range(5):
        for stochastic in (False, True):
            yield "cast", (x, STORED.index(dtype), wanted, 1.0, None, stochastic and wanted > 0, 2**40, wanted == 3)
    for given in (3, 4):
        yield "cast", (torch.empty(1 << 20, dtype=torch.uint8), given, 0, 1.0, torch.ones(()), False, 0, False)
