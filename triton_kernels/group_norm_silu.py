"""GroupNorm and SiLU (Wu & He 2018, arXiv:1803.08494):  y = z · σ(z),  z = x̂ · w + b,  x̂ = (x − mean) · rstd

    d = dy · σ(z) · (1 + z · (1 − σ(z)))     db = Σ d, dw = Σ d · x̂ over positions, then over images
    dx = rstd · (d · w − Σ w · db / n − x̂ · Σ w · dw / n)     sums over the channels of a group of n elements

Layout: contiguous (N, C, S). Forward: a program takes a group of an image, which is contiguous, and sweeps it three
times, BLOCK_SIZE elements at a time; the variance has a sweep for itself. Backward: a program takes a channel of an
image for its two sums; then one a group makes dx, whose means follow from its channels' sums; a last kernel adds these
over images in a fixed order.
Bytes, times the dtype's size: forward 2 an element (the later sweeps from a cache), backward 5. FLOPs: about 15 and 45,
an exponential in each. Intensity: about 4 FLOP/byte in bf16; the roof is memory bandwidth. Source: the formulas.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import check, empty_f32, sum_parts, warps

WIDEST = 2048  # elements at a time


@triton.jit
def group_norm_silu_kernel(
    x, weight, bias, y, means, rstd, groups, channels, positions, n, eps, BLOCK_SIZE: tl.constexpr
):
    unit = tl.program_id(0).to(tl.int64)
    x += unit * n
    y += unit * n
    at = tl.arange(0, BLOCK_SIZE)
    sums = tl.zeros([BLOCK_SIZE], tl.float32)
    for first in range(0, n, BLOCK_SIZE):
        sums += tl.load(x + first + at, mask=first + at < n, other=0.0).to(tl.float32)
    mean = tl.sum(sums, 0) / n
    squares = tl.zeros([BLOCK_SIZE], tl.float32)
    for first in range(0, n, BLOCK_SIZE):
        inside = first + at < n
        centered = tl.where(inside, tl.load(x + first + at, mask=inside, other=0.0).to(tl.float32) - mean, 0.0)
        squares += centered * centered
    rstd_unit = 1 / tl.sqrt_rn(tl.sum(squares, 0) / n + eps)
    tl.store(means + unit, mean)
    tl.store(rstd + unit, rstd_unit)
    of_group = (unit % groups) * channels
    for first in range(0, n, BLOCK_SIZE):
        inside = first + at < n
        channel = of_group + (first + at) // positions
        w = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
        z = (tl.load(x + first + at, mask=inside, other=0.0).to(tl.float32) - mean) * rstd_unit * w + b
        tl.store(y + first + at, z * tl.sigmoid(z), mask=inside)


@triton.jit
def group_norm_silu_sums_kernel(
    dy, x, weight, bias, means, rstd, dweight_parts, dbias_parts, all_channels, channels, positions,
    BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    here = tl.program_id(0).to(tl.int64)  # a channel of an image
    unit = here // channels
    channel = here % all_channels
    mean, rstd_unit = tl.load(means + unit), tl.load(rstd + unit)
    w, b = tl.load(weight + channel).to(tl.float32), tl.load(bias + channel).to(tl.float32)
    at = tl.arange(0, BLOCK_SIZE)
    dw, db = tl.zeros([BLOCK_SIZE], tl.float32), tl.zeros([BLOCK_SIZE], tl.float32)
    for first in range(0, positions, BLOCK_SIZE):
        inside = first + at < positions
        g = tl.load(dy + here * positions + first + at, mask=inside, other=0.0).to(tl.float32)
        block = tl.load(x + here * positions + first + at, mask=inside, other=0.0).to(tl.float32)
        normal = (block - mean) * rstd_unit
        z = normal * w + b
        sigma = tl.sigmoid(z)
        d = g * sigma * (1 + z * (1 - sigma))  # 0 outside
        dw += tl.where(inside, d * normal, 0.0)
        db += tl.where(inside, d, 0.0)
    tl.store(dweight_parts + here, tl.sum(dw, 0))
    tl.store(dbias_parts + here, tl.sum(db, 0))


@triton.jit
def group_norm_silu_backward_kernel(
    dy, x, weight, bias, means, rstd, dweight_parts, dbias_parts, dx, groups, channels, positions, n,
    BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(0).to(tl.int64)
    dy += unit * n
    x += unit * n
    dx += unit * n
    of_group = (unit % groups) * channels
    mean, rstd_unit = tl.load(means + unit), tl.load(rstd + unit)
    at = tl.arange(0, BLOCK_SIZE)
    push, pull = tl.zeros([BLOCK_SIZE], tl.float32), tl.zeros([BLOCK_SIZE], tl.float32)
    for first in range(0, channels, BLOCK_SIZE):
        inside = first + at < channels
        w = tl.load(weight + of_group + first + at, mask=inside, other=0.0).to(tl.float32)
        push += w * tl.load(dbias_parts + unit * channels + first + at, mask=inside, other=0.0)
        pull += w * tl.load(dweight_parts + unit * channels + first + at, mask=inside, other=0.0)
    mean_g, mean_gx = tl.sum(push, 0) / n, tl.sum(pull, 0) / n
    for first in range(0, n, BLOCK_SIZE):
        inside = first + at < n
        channel = of_group + (first + at) // positions
        w = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(dy + first + at, mask=inside, other=0.0).to(tl.float32)
        normal = (tl.load(x + first + at, mask=inside, other=0.0).to(tl.float32) - mean) * rstd_unit
        z = normal * w + b
        sigma = tl.sigmoid(z)
        d = g * sigma * (1 + z * (1 - sigma))
        tl.store(dx + first + at, (d * w - mean_g - normal * mean_gx) * rstd_unit, mask=inside)


def block(elements: int) -> dict[str, int]:
    size = min(triton.next_power_of_2(max(elements, 1)), WIDEST)
    return {"BLOCK_SIZE": size, "num_warps": warps(size)}


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    fits = x.dtype == weight.dtype == bias.dtype and weight.shape == bias.shape == x.shape[1:2]
    check(fits, "group_norm_silu", "weight and bias must be (channels,) of x (images, channels, …), of one dtype")
    y = x.new_empty(x.shape)
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    units, channels = x.shape[0] * groups, x.shape[1] // groups
    positions = x.shape[2:].numel()
    n = channels * positions
    means, rstd = empty_f32(x, units), empty_f32(x, units)
    if x.numel():
        group_norm_silu_kernel[units,](x, weight, bias, y, means, rstd, groups, channels, positions, n, eps, **block(n))
    else:  # statistics of nothing
        means.zero_(), rstd.zero_()
    return y, means, rstd


def group_norm_silu_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, means: Tensor, rstd: Tensor, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)
    if not x.numel():
        return dx, dweight.zero_(), dbias.zero_()
    dy, x, weight, bias = dy.contiguous(), x.contiguous(), weight.contiguous(), bias.contiguous()
    images, channels, positions = x.shape[0], x.shape[1] // groups, x.shape[2:].numel()
    parts = empty_f32(x, 2, images, x.shape[1])
    n = channels * positions
    group_norm_silu_sums_kernel[images * x.shape[1],](
        dy, x, weight, bias, means, rstd, parts[0], parts[1], x.shape[1], channels, positions, **block(positions)
    )
    group_norm_silu_backward_kernel[images * groups,](
        dy, x, weight, bias, means, rstd, parts[0], parts[1], dx, groups, channels, positions, n, **block(n)
    )
    return dx, sum_parts(parts[0], dweight), sum_parts(parts[1], dbias)


OPERATORS = {"group_norm_silu": group_norm_silu, "group_norm_silu_backward": group_norm_silu_backward}


def typical(dtype: torch.dtype):
    for channels, side in ((128, 32), (512, 8)):
        x = torch.empty(16, channels, side, side, dtype=dtype)
        stat = empty_f32(x, 16 * 32)
        w = torch.empty(channels, dtype=dtype)
        yield "group_norm_silu", (x, w, w, 32, 1e-5)
        yield "group_norm_silu_backward", (x, x, w, w, stat, stat, 32)
