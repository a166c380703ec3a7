"""The U-Net of a diffusion model (Ho et al. 2020, appendix B): a picture and a time in, a picture out.

    x ── conv ── level 0 ──────────── skip ──────────── level 0 ── norm, SiLU, conv ── output
                   └ half ── level 1 ─ skip ─ level 1 ── double ┘
                               └── block, attention, block ──┘

A block adds to its input; its norms are scaled and shifted by what the time and the label say.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune import ops
from finetune.errors import UserError


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer with weights 0: a block begins as the identity, the whole network with the output 0."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


def time_embedding(t: Tensor, dim: int) -> Tensor:
    """(N,) → (N, dim): cosines and sines of t at frequencies from 1 to 1/10000 (Vaswani et al. 2017)."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1)


class Norm(nn.GroupNorm):
    """GroupNorm in groups of at least eight channels, at most 32 groups; `silu` is SiLU of it, in one pass."""

    def __init__(self, channels: int) -> None:
        super().__init__(max(g for g in range(1, 33) if channels % g == 0 and (channels // g >= 8 or g == 1)), channels)

    def silu(self, x: Tensor) -> Tensor:
        return ops.group_norm_silu(x, self.weight, self.bias, self.num_groups, self.eps)


class Block(nn.Module):
    """x (N, C, H, W), embedding (N, E) → (N, out, H, W): two convolutions and a shortcut, then attention if it has
    heads."""

    def __init__(self, channels: int, out: int, embedding: int, dropout: float, heads: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = Norm(channels), nn.Conv2d(channels, out, 3, padding=1)
        self.said = nn.Linear(embedding, 2 * out)  # scale and shift
        self.norm2, self.drop = Norm(out), nn.Dropout(dropout)
        self.conv2 = zeroed(nn.Conv2d(out, out, 3, padding=1))
        self.shortcut = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()
        self.attention = Attention(out, heads) if heads else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(self.norm1.silu(x))
        scale, shift = self.said(embedding)[..., None, None].chunk(2, 1)
        h = F.silu(self.norm2(h) * (1 + scale) + shift)
        return self.attention(self.shortcut(x) + self.conv2(self.drop(h)))


class Attention(nn.Module):
    """Every pixel of x (N, C, H, W) attends to all others."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm = heads, Norm(channels)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        pixels = self.norm(x).flatten(2).transpose(1, 2)  # (N, H W, C)
        q, k, v = self.qkv(pixels).view(n, height * width, 3, self.heads, c // self.heads).unbind(2)
        mixed = ops.attention(q, k, v, causal=False).flatten(2)
        return x + self.out(mixed).transpose(1, 2).view(n, c, height, width)


class UNet(nn.Module):
    """x (N, C, H, W) in [−1, 1], t (N,), labels (N,) → the prediction, of x's shape; (N, 2 C, H, W) if it learns the
    variance. The label `classes` says nothing of the class. Sides must be multiples of 2^(levels − 1)."""

    def __init__(
        self, channels: int, classes: int, width: int = 32, levels: int = 2, blocks: int = 1, heads: int = 4,
        dropout: float = 0.0, learned_variance: bool = False, attention: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        if width % (8 * heads):
            raise UserError(f"--width {width} must be a multiple of 8 · --heads = {8 * heads}")
        self.classes, self.channels, self.width, self.levels = classes, channels, width, levels
        wide = [width * min(2**level, 4) for level in range(levels)]
        said = 4 * width
        self.time = nn.Sequential(nn.Linear(width, said), nn.SiLU(), nn.Linear(said, said))
        self.label = nn.Embedding(classes + 1, said)
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()

        def level(ins: list[int], out: int, attend: bool) -> nn.ModuleList:
            """Blocks from each number of channels to `out`, with attention or without."""
            return nn.ModuleList(Block(c, out, said, dropout, heads if attend else 0) for c in ins)

        skips, now = [width], width
        for i, out in enumerate(wide):
            attend = i >= levels - attention
            self.down.append(level([now, *[out] * (blocks - 1)], out, attend))
            skips += [out] * blocks
            now = out
            if i < levels - 1:
                self.shrink.append(nn.Conv2d(now, now, 3, stride=2, padding=1))
                skips.append(now)
        self.middle = level([now, now], now, True)
        for i, out in reversed(list(enumerate(wide))):
            ins = []
            for _ in range(blocks + 1):
                ins.append(now + skips.pop())
                now = out
            self.up.append(level(ins, out, i >= levels - attention))
            if i > 0:
                self.grow.append(nn.Conv2d(now, now, 3, padding=1))
        self.norm = Norm(now)
        self.last = zeroed(nn.Conv2d(now, channels * (2 if learned_variance else 1), 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        if x.shape[-1] % 2 ** (self.levels - 1) or x.shape[-2] % 2 ** (self.levels - 1):
            raise UserError(f"images of {x.shape[-1]}×{x.shape[-2]} cannot be halved {self.levels - 1} times: "
                            "give fewer --levels, or another --side")  # fmt: skip
        said = F.silu(self.time(time_embedding(t, self.width)) + self.label(labels))  # (N, E)
        h = self.first(x)
        kept = [h]
        for i, blocks in enumerate(self.down):
            for block in cast(nn.ModuleList, blocks):
                h = block(h, said)
                kept.append(h)
            if i < len(self.shrink):
                h = self.shrink[i](h)
                kept.append(h)
        for block in self.middle:
            h = block(h, said)
        for i, blocks in enumerate(self.up):
            for block in cast(nn.ModuleList, blocks):
                h = block(torch.cat([h, kept.pop()], 1), said)
            if i < len(self.grow):
                h = self.grow[i](F.interpolate(h, scale_factor=2.0, mode="nearest"))
        return self.last(self.norm.silu(h))
