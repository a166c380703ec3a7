"""A small KL-regularized autoencoder: images to a quarter of their side and back, so that a DiT can work on latents
(Rombach et al. 2022, arXiv:2112.10752, section 3.1).

    z = mean(x) + deviation(x) · noise        loss = |x − decode(z)|² + weight · KL(N(mean, deviation²) ‖ N(0, 1))

The weight is tiny: it only keeps the latents from drifting apart. They are divided by their standard deviation over
the training images, so that the noise schedule, made for unit variance, fits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune import ops
from finetune.lm.io import weights
from finetune.runs import checkpoint, reading

LATENTS, FACTOR = 4, 4  # channels of a latent; pixels of a side to one of its places
KL_WEIGHT = 1e-6
NAME = "vae.safetensors"


class Shape(msgspec.Struct):
    """vae.json"""

    channels: Annotated[int, msgspec.Meta(ge=1, le=64)]
    width: Annotated[int, msgspec.Meta(ge=8, le=4096, multiple_of=8)]


class NormConv(nn.Module):
    """GroupNorm and SiLU (the op), then a convolution."""

    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.conv = nn.Conv2d(channels, out, 3, stride, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(ops.group_norm_silu(x, self.norm.weight, self.norm.bias, self.norm.num_groups))


class VAE(nn.Module):
    """Images (N, C, H, W) in [−1, 1] ↔ latents (N, 4, H/4, W/4) of unit variance."""

    def __init__(self, channels: int, width: int = 32) -> None:
        super().__init__()
        self.shape = Shape(channels, width)
        wide = 2 * width
        self.encoder = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1), NormConv(width, wide, 2), NormConv(wide, wide, 2),
            NormConv(wide, 2 * LATENTS),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Conv2d(LATENTS, wide, 3, padding=1), NormConv(wide, wide), nn.Upsample(scale_factor=2),
            NormConv(wide, wide), nn.Upsample(scale_factor=2), NormConv(wide, width), NormConv(width, channels),
        )  # fmt: skip
        self.deviation = nn.Parameter(torch.ones(()), requires_grad=False)  # of the raw latents

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the raw latents."""
        mean, log_variance = self.encoder(x).chunk(2, 1)
        return mean, log_variance.clamp(-30, 20)

    def loss(self, x: Tensor, noise: Tensor) -> Tensor:
        mean, log_variance = self.moments(x)
        error = F.mse_loss(self.decoder(mean + (0.5 * log_variance).exp() * noise), x)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum((1, 2, 3)).mean()
        return error + KL_WEIGHT * kl

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """The means, in units of their standard deviation."""
        return torch.cat([self.moments(part)[0] for part in x.split(256)]) / self.deviation

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        return torch.cat([self.decoder(part * self.deviation) for part in z.split(256)])


def save(vae: VAE, folder: Path) -> None:
    """Its weights and shape, next to the DiT's."""
    with checkpoint.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(folder / "vae.json", msgspec.to_builtins(vae.shape))
    checkpoint.write_tensors(folder / NAME, {name: p.detach().contiguous() for name, p in vae.named_parameters()})


def load(folder: Path) -> VAE:
    """UserError for what is missing, damaged or of another shape."""
    shape = reading.json_file(folder / "vae.json", Shape)
    with torch.device("meta"):
        vae = VAE(shape.channels, shape.width)
    weights.fill(vae, weights.read_safetensors(folder, NAME), torch.float32, folder)
    return vae
