"""Layers that the language models share: norms, embeddings, rotary tables, and their initial weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from finetune import ops
from finetune.errors import UserError


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x²) + eps) · weight over the last dimension (Zhang & Sennrich 2019, arXiv:1910.07467).

    With `plus_one` (Gemma) the factor is weight + 1, in fp32: bf16 would round the sum.
    """

    def __init__(self, dim: int, eps: float = 1e-5, plus_one: bool = False) -> None:
        super().__init__()
        self.weight, self.eps, self.plus_one = nn.Parameter(torch.full((dim,), 1.0 - plus_one)), eps, plus_one

    def forward(self, x: Tensor) -> Tensor:
        if not self.plus_one:
            return ops.rms_norm(x, self.weight, eps=self.eps)
        wide = torch.promote_types(x.dtype, torch.float32)
        return ops.rms_norm(x.to(wide), self.weight.to(wide) + 1, eps=self.eps).to(x.dtype)


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


RopeKind = Literal["none", "linear", "dynamic", "yarn", "llama3"]


@dataclass(frozen=True)
class RopeScaling:
    """How a model trained on `original_length` tokens was extended to more: what is done to the rotary frequencies.

    none     nothing
    linear   all divided by `factor`                                           Chen et al. 2023, arXiv:2306.15595
    dynamic  theta grows with the longest sequence once that has more than original_length tokens ("NTK-aware"); keys in
             a cache keep the theta of when they were made, as in transformers. The engine, which serves sequences of
             different lengths together, takes for each token the longer of its prompt and its position + 1: what
             transformers does with that sequence alone
    yarn     low ones divided by `factor`, high ones kept, between beta_slow and beta_fast turns in original_length a
             ramp; cos and sin are multiplied by `attention_factor`            Peng et al. 2023, arXiv:2309.00071
    llama3   those of fewer than low_freq_factor turns in original_length divided by `factor`, those of more than
             high_freq_factor kept, between them a ramp                        Grattafiori et al. 2024, arXiv:2407.21783
    """

    kind: RopeKind = "none"
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

    def __post_init__(self) -> None:
        if self.kind not in get_args(RopeKind):
            raise UserError(f"rope scaling of kind {self.kind!r} is not supported")
        if self.kind != "none" and not self.factor >= 1:
            raise UserError(f"{self.kind} rope scaling needs a factor of at least 1, not {self.factor}")
        if self.kind in ("dynamic", "yarn", "llama3") and self.original_length < 1:
            raise UserError(f"{self.kind} rope scaling needs the original length")
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise UserError(f"llama3 rope scaling needs 0 < low_freq_factor < high_freq_factor, not {self}")
        if self.kind == "yarn" and not 0 < self.beta_slow <= self.beta_fast:
            raise UserError(f"yarn rope scaling needs 0 < beta_slow ≤ beta_fast, not {self}")

    @property
    def magnitude(self) -> float:
        """What cos and sin are multiplied by: yarn's attention_factor, 1 for the others."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor:
            return self.attention_factor
        given = self.mscale and self.mscale_all_dim
        over, under = (self.mscale, self.mscale_all_dim) if given else (1.0, 0.0)
        growth = 0.1 * math.log(self.factor)
        return (growth * over + 1) / (growth * under + 1)


def rope_frequencies(
    head_dim: int,
    theta: float,
    scaling: RopeScaling,
    device: torch.device | None = None,
    length: Tensor | None = None,
) -> Tensor:
    """(D/2,) fp32: radians a token of each pair of dimensions, to the last bit those of transformers. `length` () or
    (N, 1): that of the sequence, for dynamic scaling, which then gives (D/2,) or (N, D/2)."""
    s = scaling
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    if s.kind == "dynamic" and length is not None:
        longer = length.clamp(min=s.original_length)
        base = theta * ((s.factor * longer / s.original_length) - (s.factor - 1)) ** (head_dim / (head_dim - 2))
        return 1.0 / base**exponents
    plain = 1.0 / theta**exponents
    if s.kind == "linear":
        return plain / s.factor
    if s.kind == "llama3":
        turns = s.original_length / (2 * math.pi / plain)
        kept = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
        return (1 - kept) * plain / s.factor + kept * plain
    if s.kind == "yarn":
        ends = [
            head_dim * math.log(s.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))
            for turns in (s.beta_fast, s.beta_slow)
        ]  # the pairs of dimensions that turn so often
        low, high = (math.floor(ends[0]), math.ceil(ends[1])) if s.truncate else ends
        low, high = max(low, 0), min(high, head_dim - 1)
        pairs = torch.arange(head_dim // 2, dtype=torch.float32, device=device)
        kept = 1 - ((pairs - low) / ((high - low) or 0.001)).clamp(0, 1)
        return 1.0 / (s.factor * theta**exponents) * (1 - kept) + plain * kept
    return plain


class RotaryTable:
    """cos and sin of position · frequency, each (max_length, D/2) in fp32 (Su et al. 2021, arXiv:2104.09864).

    A plain object, not a buffer: `model.to(torch.bfloat16)` must not round the angles.
    """

    def __init__(self, head_dim: int, max_length: int, theta: float, scaling: RopeScaling | None = None) -> None:
        self.head_dim, self.max_length, self.theta = head_dim, max_length, theta
        self.scaling = scaling or RopeScaling()
        self.cached: tuple[Tensor, Tensor] | None = None

    def on(self, device: torch.device, length: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The tables on a device. `length` (): the longest sequence's, on which they depend if scaling is dynamic."""
        if self.scaling.kind == "dynamic":
            return self.computed(device, length)
        if self.cached is None or self.cached[0].device != device:
            self.cached = self.computed(device)
        return self.cached

    def computed(self, device: torch.device, length: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.turned(torch.arange(self.max_length, device=device), length)

    def turned(self, positions: Tensor, length: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """cos and sin (N, D/2) at positions (N,), for one `length` () of all, or that of each (N, 1)."""
        frequencies = rope_frequencies(self.head_dim, self.theta, self.scaling, positions.device, length)
        angles, magnitude = positions.float()[:, None] * frequencies, self.scaling.magnitude  # (N, D/2)
        return angles.cos() * magnitude, angles.sin() * magnitude


@torch.no_grad()
def init_gpt2(model: nn.Module, layers: int, residual: tuple[str, ...]) -> None:
    """GPT-2's initial weights (Radford et al. 2019, §2.3): N(0, .02), biases 0, and .02/√(2·layers) for the projections
    that write into the residual stream, named by the endings `residual`."""
    for name, parameter in model.named_parameters():
        init_parameter(name, parameter, layers, residual)


def init_parameter(
    name: str, parameter: Tensor, layers: int, residual: tuple[str, ...], generator: torch.Generator | None = None
) -> None:
    """`init_gpt2` of one parameter, in place; the weight of a norm is left as it is."""
    if name.endswith("bias"):
        parameter.zero_()
    elif parameter.dim() == 2:
        small = name.removesuffix(".weight").endswith(residual)
        parameter.normal_(0.0, 0.02 / (2 * layers) ** 0.5 if small else 0.02, generator=generator)
