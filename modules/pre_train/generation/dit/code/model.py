"""The Diffusion Transformer (Peebles & Xie 2023, arXiv:2212.09748) on the project's ops.

    patches of the image → tokens + fixed positions → blocks → patches of the prediction

A block is a transformer's, except that its norms have no weights: shift, scale and gate of both parts are linear in an
embedding of (timestep, label), and start at zero, so that every block starts as the identity (adaLN-Zero).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from finetune import ops
from finetune.errors import UserError

# Layers, width, heads: the paper's table 1, and two of this project's for a CPU.
SIZES = {
    "XXS": (4, 96, 4),
    "XS": (6, 192, 6),
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
FREQUENCIES = 256  # numbers of a timestep's sinusoidal embedding


@dataclass
class DiTConfig:
    """Shape of a DiT. The labels are 0 … classes − 1; `classes` itself is the null class, of which nothing is known."""

    side: int  # of the square images
    channels: int
    patch: int  # side of a patch
    dim: int
    layers: int
    heads: int
    classes: int
    learn_sigma: bool = True  # as many outputs again, the variance of a DDPM step
    # The timestep's frequencies are 10000^(−i / (128 − shift)): 0 in the paper's code, 1 in diffusers.
    frequency_shift: int = 1

    def __post_init__(self) -> None:
        for name in ("side", "channels", "patch", "dim", "layers", "heads", "classes"):
            if getattr(self, name) < 1:
                raise UserError(f"a DiT needs {name} of at least 1, not {getattr(self, name)}")
        if self.dim > 1 << 16 or self.layers > 1 << 12:
            raise UserError(f"a DiT of {self.layers} layers of width {self.dim} is larger than any that can be used")
        if self.frequency_shift not in (0, 1):
            raise UserError(f"frequency_shift is 0 (the paper's code) or 1 (diffusers), not {self.frequency_shift}")
        if self.side % self.patch:
            raise UserError(f"patches of {self.patch} do not divide images of {self.side}×{self.side}")
        if self.dim % self.heads or self.dim % 4:
            raise UserError(f"dim ({self.dim}) must be a multiple of heads ({self.heads}) and of 4")
        if self.tokens > 1 << 16:
            raise UserError(f"{self.tokens:,} patches of an image are more than the 65,536 that a DiT takes")

    @property
    def tokens(self) -> int:
        return (self.side // self.patch) ** 2

    @property
    def outputs(self) -> int:
        """Channels of the output."""
        return self.channels * (1 + self.learn_sigma)


def positions(dim: int, side: int) -> Tensor:
    """Fixed 2-D sine and cosine positions of a grid, row by row, (side², dim) fp32. The column is in the first half of
    the numbers, the row in the second: the paper's code makes its grid with w first."""
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], 1).float()  # (side, dim / 2)
    column, row = waves.repeat(side, 1), waves.repeat_interleave(side, 0)
    return torch.cat([column, row], 1)


def frequencies_of(t: Tensor, shift: int) -> Tensor:
    """Cosines, then sines of timesteps (N,), which need not be whole: (N, 256) fp32."""
    half = FREQUENCIES // 2
    each = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / (half - shift))
    angles = t.float()[:, None] * each
    return torch.cat([angles.cos(), angles.sin()], 1)


class Block(nn.Module):
    """x + gate · attention(norm(x)), then x + gate · MLP(norm(x)); both norms scaled and shifted by the condition."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.condition = nn.Linear(config.dim, 6 * config.dim)
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.o = nn.Linear(config.dim, config.dim)
        self.up = nn.Linear(config.dim, 4 * config.dim)
        self.down = nn.Linear(4 * config.dim, config.dim)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x (B, N, C), condition (B, C) → like x."""
        rows, tokens, dim = x.shape
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.condition(condition).chunk(6, -1)  # (B, C) each
        q, k, v = self.qkv(ops.modulate(x, shift_a, scale_a)).view(rows, tokens, 3, self.heads, -1).unbind(2)
        o = ops.attention(q, k, v, causal=False).reshape(rows, tokens, dim)
        x = ops.gate_residual(x, gate_a, self.o(o))
        hidden = ops.gelu(self.up(ops.modulate(x, shift_m, scale_m)))
        return ops.gate_residual(x, gate_m, self.down(hidden))


class DiT(nn.Module):
    """net(x (B, C, H, W), t (B,), labels (B,)) → what the process predicts, (B, C, H, W); with learned sigma
    (B, 2 C, H, W). `gradient_checkpointing` computes blocks again in the backward pass."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config, self.classes = config, config.classes
        self.gradient_checkpointing = False
        dim, pixels = config.dim, config.patch**2
        self.embed = nn.Linear(pixels * config.channels, dim)
        self.register_buffer("positions", positions(dim, config.side // config.patch), persistent=False)
        self.time = nn.Sequential(nn.Linear(FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.labels = nn.Embedding(config.classes + 1, dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.condition = nn.Linear(dim, 2 * dim)
        self.head = nn.Linear(dim, pixels * config.outputs)
        self.init()

    @torch.no_grad()
    def init(self) -> None:
        """The paper's code: Xavier, embeddings N(0, .02), zero where a condition enters and at the end."""
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            module.bias.zero_()
            if name.endswith("condition") or name == "head":
                module.weight.zero_()
            elif name.startswith("time"):
                module.weight.normal_(0, 0.02)
            else:
                nn.init.xavier_uniform_(module.weight)
        self.labels.weight.normal_(0, 0.02)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        dtype = self.head.weight.dtype
        embedded = self.time(frequencies_of(t, self.config.frequency_shift).to(dtype)) + self.labels(labels)
        condition = F.silu(embedded)  # (B, C); every block begins with it
        tokens = self.embed(patchify(x.to(dtype), self.config.patch)) + self.positions  # (B, N, C)
        save_memory = self.gradient_checkpointing and torch.is_grad_enabled()
        for block in self.blocks:
            args: tuple[Any, ...] = (tokens, condition)
            tokens = checkpoint(block, *args, use_reentrant=False) if save_memory else block(*args)
        shift, scale = self.condition(condition).chunk(2, -1)
        patches = self.head(ops.modulate(tokens, shift, scale))  # (B, N, p · p · outputs)
        return unpatchify(patches, self.config).to(x.dtype)


def patchify(x: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) → (B, N, C · p · p): patches row by row; within one the order of a convolution's weights."""
    rows, channels, height, width = x.shape
    cut = x.reshape(rows, channels, height // patch, patch, width // patch, patch)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(rows, -1, channels * patch * patch)


def unpatchify(patches: Tensor, config: DiTConfig) -> Tensor:
    """(B, N, p · p · outputs) → (B, outputs, H, W). Within a patch the channel comes last: not `patchify` backwards."""
    n, p = config.side // config.patch, config.patch
    cut = patches.reshape(-1, n, n, p, p, config.outputs)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(-1, config.outputs, config.side, config.side)
