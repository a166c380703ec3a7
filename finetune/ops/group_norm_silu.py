"""GroupNorm followed by SiLU (Wu & He 2018, arXiv:1803.08494), the pair that begins a U-Net's residual block.

    y = silu(z),   z = (x − mean) / sqrt(variance + eps) · weight + bias,   silu(z) = z / (1 + exp(−z))

Mean and (biased) variance over a group: C / groups adjacent channels and all positions of an image. Arithmetic in fp32
whatever the dtype; the result is rounded once. Backward keeps x and each group's two statistics: z is computed again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from finetune.ops._op import op
from finetune.ops._samples import Sample


@op
def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = 1e-5, *, backend: str | None = None
) -> Tensor:
    """x (N, C, …), weight and bias (C,) of one dtype, C divisible by `groups` → like x. Gradients for all three."""
    wide = torch.promote_types(x.dtype, torch.float32)
    grouped = x.to(wide).reshape(x.shape[0], groups, x[:1].numel() // groups if len(x) else 0)
    centered = grouped - grouped.mean(-1, keepdim=True)
    normal = centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps)
    along = (-1, *(1,) * (x.dim() - 2))
    z = normal.reshape(x.shape) * weight.to(wide).view(along) + bias.to(wide).view(along)
    return torch.nn.functional.silu(z).to(x.dtype)


@group_norm_silu.check
def _(x: Tensor, weight: Tensor, bias: Tensor, groups: int, **_) -> None:
    if x.dim() < 2 or weight.shape != x.shape[1:2] or bias.shape != x.shape[1:2]:
        raise RuntimeError(
            f"group_norm_silu: x (N, C, …) needs weight and bias (C,), got {[*x.shape]}, {[*weight.shape]} "
            f"and {[*bias.shape]}"
        )
    if groups < 1 or x.shape[1] % groups:
        raise RuntimeError(f"group_norm_silu: {x.shape[1]} channels do not divide into {groups} groups")


@group_norm_silu.fake()
def _(x: Tensor, groups: int, **_) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty(x.shape[0] * groups, dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), mean, rstd


@group_norm_silu.fake("group_norm_silu_backward")
def _(x: Tensor, weight: Tensor, bias: Tensor, **_) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


@group_norm_silu.backward()
def _(operators, ctx, dy: Tensor, *_):
    gradients = operators.group_norm_silu_backward(dy, *ctx.saved_tensors, ctx.rest["groups"])
    return *gradients, None, None


@group_norm_silu.sampled
def samples() -> Iterator[Sample]:
    g = torch.Generator().manual_seed(0)

    def make(name: str, *shape: int, groups: int, scale: float = 1.0, shift: float = 0.0, bench: bool = False):
        x = torch.randn(*shape, generator=g, dtype=torch.float64) * scale + shift
        weight, bias = (torch.randn(shape[1], generator=g, dtype=torch.float64) for _ in range(2))
        n = x.numel()
        args = (x, weight, bias, groups)
        return Sample(name, args, grad=(0, 1, 2), bench=bench, flops=85.0 * n, bytes=20.0 * n)

    yield make("small", 2, 4, 3, groups=2)
    yield make("odd", 3, 6, 5, 7, groups=3)
    yield make("no positions", 5, 12, groups=3)
    yield make("one group", 2, 5, 4, 4, groups=1)
    yield make("a channel a group", 2, 6, 17, groups=6)
    yield make("empty", 0, 8, 4, groups=2)
    yield make("no elements", 2, 4, 0, groups=2)
    yield make("digits", 3, 32, 8, 8, groups=8)
    yield make("volume", 1, 4, 3, 5, 7, groups=2)
    yield make("wide", 1, 4, 33, 35, groups=2)
    # Wider than a block's threads take at once, by 16 bytes. Eight channels: the bound is twice torch's largest error,
    # and of the sums over two channels that was, from seed to seed, a third to twice of ours, which rounds no more.
    yield make("wider", 2, 8, 1032, groups=4)
    yield make("beyond what is kept", 1, 2, 8200, groups=1)
    yield make("many", 33, 4, 9, groups=2)  # images, whose sums are added in parts
    yield make("many channels", 1, 520, 2, groups=2)
    yield make("large", 2, 4, 16, groups=2, scale=1e4)
    yield make("shifted", 2, 4, 65, groups=2, shift=300.0)
    x = torch.randn(2, 5, 3, 6, generator=g, dtype=torch.float64).permute(0, 3, 1, 2)
    weight, bias = (torch.randn(6, generator=g, dtype=torch.float64) for _ in range(2))
    yield Sample("channels last", (x, weight, bias, 3), grad=(0, 1, 2))
    yield from make("aligned", 2, 4, 16, groups=2).at_odd_addresses()
    yield make("bench", 16, 128, 32, 32, groups=32, bench=True)
