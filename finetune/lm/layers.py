"""Layers that the language models share: norms, embeddings, rotary tables, and their initial weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from finetune import ops


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x²) + eps) · weight over the last dimension (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, eps=self.eps)


class LayerNorm(nn.Module):
    """y = (x − mean) / sqrt(var + eps) · weight + bias over the last dimension (Ba et al. 2016, arXiv:1607.06450)."""

    def __init__(self, dim: int, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, eps=self.eps)


def embedding(count: int, dim: int) -> nn.Embedding:
    """An embedding table with unset weights: on the meta device torch's own initialization imports its compiler, which
    takes longer than loading a model."""
    return nn.Embedding(count, dim, _weight=torch.empty(count, dim))


@dataclass(frozen=True)
class RopeScaling:
    """How a model trained on `original_length` tokens was extended to more: what is done to the rotary frequencies.

    none     nothing
    linear   all divided by `factor`                                         Chen et al. 2023, arXiv:2306.15595
    dynamic  theta grows with the sequence once it is longer than original_length (NTK-aware)
    yarn     low frequencies divided by `factor`, high ones kept, a ramp between beta_fast and beta_slow turns over
             original_length; cos and sin times `attention_factor`           Peng et al. 2023, arXiv:2309.00071
    llama3   wavelengths beyond original_length / low_freq_factor divided by `factor`, those below original_length /
             high_freq_factor kept, between them a blend                     Grattafiori et al. 2024, arXiv:2407.21783
    """

    kind: Literal["none", "linear", "dynamic", "yarn", "llama3"] = "none"
    factor: float = 1.0
    original_length: int = 0  # dynamic, yarn, llama3
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float = 0.0  # yarn; 0: computed from factor, mscale and mscale_all_dim
    mscale: float = 0.0  # yarn; 0: not given
    mscale_all_dim: float = 0.0  # yarn; 0: not given
    truncate: bool = True  # yarn: the ends of the ramp are rounded to whole dimensions


class RotaryTable:
    """cos and sin of position · theta^(−2i/D), each (max_length, D/2) in fp32 (Su et al. 2021, arXiv:2104.09864).

    A plain object, not a buffer: `model.to(torch.bfloat16)` must not round the angles.
    """

    def __init__(self, head_dim: int, max_length: int, theta: float) -> None:
        self.head_dim, self.max_length, self.theta = head_dim, max_length, theta
        self.cached: tuple[Tensor, Tensor] | None = None

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if self.cached is None or self.cached[0].device != device:
            exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device) / self.head_dim
            positions = torch.arange(self.max_length, dtype=torch.float32, device=device)
            angles = torch.outer(positions, 1.0 / self.theta**exponents)  # (max_length, D/2)
            self.cached = angles.cos(), angles.sin()
        return self.cached


@torch.no_grad()
def init_gpt2(model: nn.Module, layers: int, residual: tuple[str, ...]) -> None:
    """GPT-2's initial weights (Radford et al. 2019, §2.3): N(0, .02), biases 0, and .02/√(2·layers) for the projections
    that write into the residual stream, named by the endings `residual`."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.dim() == 2:
            small = name.removesuffix(".weight").endswith(residual)
            parameter.normal_(0.0, 0.02 / (2 * layers) ** 0.5 if small else 0.02)
