"""Frozen weights in 4 and 8 bits: NF4 with double quantization (Dettmers et al. 2023, arXiv:2305.14314, QLoRA) and
int8 by rows (Dettmers et al. 2022, arXiv:2208.07339, without its outlier columns).

    NF4:   w ≈ NF4[code] · absmax of its block of 64 weights            4 bits + 32 / 64 = 4.5 bits a weight
    twice: absmax ≈ map[code] · absmax of 256 of them + their mean      4 bits + 8 / 64 + 32 / (64 · 256) = 4.127
    int8:  w ≈ code · absmax of its row / 127                           8 bits + 32 / in

Codes and scales are bitsandbytes', bit for bit. A layer dequantizes its weight in the forward and again in the
backward pass, and drops it: at most one layer's weight is dense at a time.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.ops.adamw8bit import dynamic_map
from finetune.ops.quantized_linear import NF4

BLOCK, MAXIMA = 64, 256  # weights that share an absmax; absmax that share one when quantized again
Format = Literal["nf4", "nf4_double", "int8"]

# Both numbers of each byte, the high half first. Looked up as one float64 they cost a third of two fp32.
PAIRS = torch.stack([NF4.repeat_interleave(16), NF4.repeat(16)], 1).view(torch.float64).flatten()


def nearest(x: Tensor, values: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """For each block of x (n,) its largest magnitude (fp32), and for each element the index (uint8) of the one of the
    rising `values` that is nearest to x / absmax. The product with 1 / absmax is bitsandbytes' too."""
    rows = F.pad(x.float(), (0, -len(x) % block)).view(-1, block)
    absmax = rows.abs().amax(1)
    scaled = (rows * (1 / absmax.clamp(min=1e-38))[:, None]).flatten()[: len(x)]
    return torch.bucketize(scaled, ((values[1:] + values[:-1]) / 2).to(x.device)).to(torch.uint8), absmax


def nf4_quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Any shape → packed codes (⌈n / 2⌉,) uint8 and absmax (⌈n / 64⌉,) fp32. An odd one out is paired with a 0."""
    codes, absmax = nearest(weight.detach().flatten(), NF4, BLOCK)
    codes = F.pad(codes, (0, len(codes) % 2), value=7)
    return codes[::2] << 4 | codes[1::2], absmax


def nf4_dequantize(codes: Tensor, absmax: Tensor, count: int) -> Tensor:
    """(count,) fp32."""
    pairs = PAIRS.to(codes.device).index_select(0, codes.int()).view(torch.float32)
    whole = count // BLOCK * BLOCK
    pairs[:whole].view(-1, BLOCK).mul_(absmax[: whole // BLOCK, None])
    pairs[whole:].mul_(absmax[-1])
    return pairs[:count]


def double_quantize(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """absmax of blocks → uint8 codes of the 8-bit optimizer's map, the largest of each 256, the mean of all."""
    offset = absmax.mean()
    return *nearest(absmax - offset, dynamic_map(True), MAXIMA), offset


def double_dequantize(codes: Tensor, maxima: Tensor, offset: Tensor) -> Tensor:
    """The absmax (fp32) of `double_quantize`'s result."""
    values = dynamic_map(True).to(codes.device)[codes.int()]
    return values * maxima.repeat_interleave(MAXIMA)[: len(codes)] + offset


def int8_quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) → codes of the same shape and absmax (out,) fp32."""
    absmax = weight.detach().abs().amax(1).float()
    return (weight.detach() * (127 / absmax.clamp(min=1e-38))[:, None]).round().to(torch.int8), absmax


class FrozenProduct(torch.autograd.Function):
    """x Wᵀ + bias with a weight that is not kept: dx = g W, with W dequantized again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.layer.weight, None


class FrozenLinear(nn.Module):
    """A linear layer whose weight is stored in few bits, and its bias as it was. `weight` is a new dense tensor each
    time."""

    in_features: int
    out_features: int
    bias: Tensor | None  # (out,)
    dtype: torch.dtype  # of the original weight and of `weight`

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = linear.weight.dtype
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    @property
    def weight(self) -> Tensor:
        """(out, in)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return FrozenProduct.apply(x, self)


class NF4Linear(FrozenLinear):
    """A frozen linear layer in NF4, with double quantization unless `double` is false."""

    codes: Tensor  # (out · in / 2,) uint8
    absmax: Tensor  # (blocks,) fp32, or uint8 codes with `double`
    maxima: Tensor  # (⌈blocks / 256⌉,) fp32
    offset: Tensor  # () fp32

    def __init__(self, linear: nn.Linear, double: bool = True) -> None:
        super().__init__(linear)
        codes, absmax = nf4_quantize(linear.weight)
        self.double_quantized = double
        self.register_buffer("codes", codes)
        if double:
            absmax, maxima, offset = double_quantize(absmax)
            self.register_buffer("maxima", maxima)
            self.register_buffer("offset", offset)
        self.register_buffer("absmax", absmax)

    @property
    def weight(self) -> Tensor:
        absmax = self.absmax
        if self.double_quantized:
            absmax = double_dequantize(absmax, self.maxima, self.offset)
        dense = nf4_dequantize(self.codes, absmax, self.out_features * self.in_features)
        return dense.to(self.dtype).view(self.out_features, self.in_features)


class Int8Linear(FrozenLinear):
    """A frozen linear layer in int8 with one absmax a row."""

    codes: Tensor  # (out, in) int8
    absmax: Tensor  # (out,) fp32

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        codes, absmax = int8_quantize(linear.weight)
        self.register_buffer("codes", codes)
        self.register_buffer("absmax", absmax)

    @property
    def weight(self) -> Tensor:
        return self.codes.float().mul_(self.absmax[:, None] / 127).to(self.dtype)


def quantize_linears(model: nn.Module, format: Format, skip: tuple[str, ...] = ("head",)) -> None:
    """Quantizes every linear layer of the model in place, except those named in `skip`. Embeddings, norms and the head
    are not quantized, as in QLoRA."""
    for name, linear in [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]:
        if name in skip:
            continue
        owner, _, leaf = name.rpartition(".")
        made = Int8Linear(linear) if format == "int8" else NF4Linear(linear, double=format == "nf4_double")
        setattr(model.get_submodule(owner), leaf, made)
