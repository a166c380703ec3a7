"""A vision transformer (ViT: Dosovitskiy et al. 2021, arXiv:2010.11929) on the project's ops, with what CLIP (Radford
et al. 2021, arXiv:2103.00020) and SigLIP (Zhai et al. 2023, arXiv:2303.15343) change in it as fields of ViTConfig.

    image → patches of p × p pixels → one linear layer → + positions → blocks → LayerNorm → pooling → one vector

Weights of checkpoints come from files by `finetune.vision.load`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune import ops
from finetune.errors import UserError
from finetune.lm.layers import LayerNorm, init_gpt2

Positions = Literal["learned", "sincos"]
Activation = Literal["quick_gelu", "gelu", "gelu_tanh"]
Pooling = Literal["class", "mean", "attention", "none"]


@dataclass
class ViTConfig:
    """Shape of a vision transformer. `hidden=0` selects `4 · dim`.

    pooling: class      the state of the class token
             mean       the mean of the patches' states
             attention  one learned query attends to all states, then an MLP (SigLIP's head)
             none       there is no vector of the whole image
    """

    height: int  # of an image, in pixels
    width: int
    patch: int  # side of a patch, in pixels; those that are left over at the right and the bottom are not seen
    dim: int
    layers: int
    heads: int
    channels: int = 3
    hidden: int = 0
    class_token: bool = True
    positions: Positions = "learned"
    pooling: Pooling = "class"
    activation: Activation = "gelu_tanh"
    patch_bias: bool = True
    pre_norm: bool = False  # a LayerNorm before the first block (CLIP)
    projection: int = 0  # dimensions of the space in which images and texts are compared; 0: there is none
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("height", "width", "patch", "dim", "layers", "heads", "channels"):
            if getattr(self, name) < 1:
                raise UserError(f"a vision transformer needs {name} of at least 1, not {getattr(self, name)}")
        if self.dim % self.heads:
            raise UserError(f"dim ({self.dim}) must be a multiple of heads ({self.heads})")
        if self.patch > min(self.height, self.width):
            raise UserError(f"patches of {self.patch} pixels do not fit into images of {self.height}×{self.width}")
        for name, kinds in (("positions", Positions), ("activation", Activation), ("pooling", Pooling)):
            if getattr(self, name) not in get_args(kinds):
                known = ", ".join(get_args(kinds))
                raise UserError(f"{name} {getattr(self, name)!r} is not supported (only {known})")
        if self.pooling == "class" and not self.class_token:
            raise UserError("pooling 'class' needs a class token")
        if self.positions == "sincos" and self.dim % 4:
            raise UserError(f"2-D sin-cos positions need a dim that is a multiple of 4, not {self.dim}")
        self.hidden = self.hidden or 4 * self.dim

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.height // self.patch, self.width // self.patch


def patches(images: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) → (B, rows · columns, C · patch²), row by row, as a convolution with stride `patch` takes them."""
    batch, channels, height, width = images.shape
    rows, columns = height // patch, width // patch
    x = images[:, :, : rows * patch, : columns * patch].reshape(batch, channels, rows, patch, columns, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * patch**2)


def sincos_2d(dim: int, rows: int, columns: int) -> Tensor:
    """(rows · columns, dim) fp32: sines and cosines of the column in the first half, of the row in the second, as MAE
    has them (He et al. 2022, arXiv:2111.06377; their `get_2d_sincos_pos_embed`)."""
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [place.reshape(-1, 1) * frequencies for place in (column, row)]  # each (rows · columns, dim / 4)
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], 1).float()


def activate(x: Tensor, kind: Activation) -> Tensor:
    """GELU as the checkpoint has it: x · σ(1.702 x) (OpenAI's CLIP), with erf, or in the tanh form (SigLIP)."""
    if kind == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x) if kind == "gelu" else ops.gelu(x)


class Attention(nn.Module):
    """Every query sees every key. Queries come from x, keys and values from `states`, which are x itself in a block."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q, self.k, self.v, self.o = (nn.Linear(config.dim, config.dim) for _ in range(4))

    def forward(self, x: Tensor, states: Tensor | None = None) -> Tensor:
        states = x if states is None else states
        q, k, v = (
            part(of).unflatten(-1, (self.heads, -1))  # (B, T, H, D)
            for part, of in ((self.q, x), (self.k, states), (self.v, states))
        )
        return self.o(ops.attention(q, k, v, causal=False).flatten(-2))


class MLP(nn.Module):
    """down(GELU(up(x)))."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.activation: Activation = config.activation
        self.up = nn.Linear(config.dim, config.hidden)
        self.down = nn.Linear(config.hidden, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(activate(self.up(x), self.activation))


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.attn_norm = LayerNorm(config.dim, config.norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = LayerNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class AttentionPool(nn.Module):
    """SigLIP's head: y = attention(probe, states), then y + MLP(norm(y))."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.empty(config.dim))
        self.attn = Attention(config)
        self.norm = LayerNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, states: Tensor) -> Tensor:
        y = self.attn(self.probe.expand(len(states), 1, -1), states)  # (B, 1, C)
        return (y + self.mlp(self.norm(y)))[:, 0]


class ViT(nn.Module):
    """The encoder. `features` gives the patches' states of a layer; the model itself gives one vector of the image."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        tokens = config.grid[0] * config.grid[1] + config.class_token
        self.patch = nn.Linear(config.channels * config.patch**2, config.dim, bias=config.patch_bias)
        self.class_token = nn.Parameter(torch.empty(config.dim)) if config.class_token else None
        if config.positions == "learned":
            self.positions = nn.Parameter(torch.empty(tokens, config.dim))
        else:
            table = sincos_2d(config.dim, *config.grid)
            self.register_buffer("positions", F.pad(table, (0, 0, int(config.class_token), 0)), persistent=False)
        self.pre_norm = LayerNorm(config.dim, config.norm_eps) if config.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = LayerNorm(config.dim, config.norm_eps)
        self.pool = AttentionPool(config) if config.pooling == "attention" else None
        self.projection = nn.Linear(config.dim, config.projection, bias=False) if config.projection else None
        if self.patch.weight.device.type != "meta":
            self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """GPT-2's initial weights; N(0, .02) for the tokens too, and the patches' layer by its number of inputs."""
        init_gpt2(self, self.config.layers, residual=("attn.o", "mlp.down"))
        nn.init.normal_(self.patch.weight, std=self.patch.in_features**-0.5)
        for token in (self.class_token, None if self.pool is None else self.pool.probe):
            if token is not None:
                nn.init.normal_(token, std=0.02)

    def embed(self, images: Tensor, interpolate: bool = False) -> Tensor:
        """The state before the first block, (B, tokens, C), of images (B, channels, H, W); the class token is first."""
        config, (height, width) = self.config, images.shape[-2:]
        if images.dim() != 4 or images.shape[1] != config.channels:
            raise UserError(f"images have the shape {tuple(images.shape)}, not (batch, {config.channels}, H, W)")
        if not interpolate and (height, width) != (config.height, config.width):
            raise UserError(
                f"images are {height}×{width}, the encoder takes {config.height}×{config.width}: scale them, or let it "
                "interpolate its positions"
            )
        x = self.patch(patches(images.to(self.patch.weight.dtype), config.patch))  # (B, N, C)
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(len(x), 1, -1), x], 1)
        return self.pre_norm(x + self.positions_of(height // config.patch, width // config.patch))

    def positions_of(self, rows: int, columns: int) -> Tensor:
        """(tokens, C): the table, bicubically scaled if the grid is another; the class token's stays as it is."""
        table, first = self.positions, int(self.config.class_token)
        if (rows, columns) == self.config.grid:
            return table
        old = table[first:].unflatten(0, self.config.grid).permute(2, 0, 1)[None]
        new = F.interpolate(old, (rows, columns), mode="bicubic", align_corners=False)
        return torch.cat([table[:first], new[0].flatten(1).T])

    def states(self, images: Tensor, layer: int = -1, interpolate: bool = False) -> Tensor:
        """(B, tokens, C): what block number `layer` gives, 0 the input of the first; −1 the last block's, −2 that of
        the last but one. Later blocks are not computed. Nothing is normalized after the block."""
        count = layer if layer >= 0 else self.config.layers + 1 + layer
        if not 0 <= count <= self.config.layers:
            raise UserError(f"layer {layer}: the encoder has the layers 0 to {self.config.layers}, or −1 for the last")
        x = self.embed(images, interpolate)
        for block in self.blocks[:count]:
            x = block(x)
        return x

    def features(self, images: Tensor, layer: int = -2, interpolate: bool = False) -> Tensor:
        """(B, rows · columns, C): `states` without the class token, as LLaVA takes them."""
        return self.states(images, layer, interpolate)[:, int(self.config.class_token) :]

    def forward(self, images: Tensor, interpolate: bool = False) -> Tensor:
        """(B, C): the pooled, normalized state of the last block."""
        x, config = self.states(images, -1, interpolate), self.config
        if config.pooling == "class":
            return self.norm(x[:, 0])
        if config.pooling == "mean":
            return self.norm(x)[:, int(config.class_token) :].mean(1)
        if self.pool is None:
            raise UserError("the encoder has no pooling: take its features")
        return self.pool(self.norm(x))

    def compared(self, images: Tensor) -> Tensor:
        """(B, projection), of length 1: what is compared with a text's, as CLIP does; without a projection (SigLIP)
        the pooled state itself."""
        pooled = self(images)
        return F.normalize(pooled if self.projection is None else self.projection(pooled), dim=-1)
