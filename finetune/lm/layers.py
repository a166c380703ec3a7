"""What the language models share: normalization modules over the ops, rotary tables, the checks before a forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from finetune import ops
from finetune.errors import UserError


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
    """An embedding whose weights are not set yet: torch's own initialization would import its compiler on the meta
    device, which takes longer than loading a model."""
    return nn.Embedding(count, dim, _weight=torch.empty(count, dim))


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


class Cache(Protocol):
    """What a model needs of a key–value cache; `finetune.generate.KVCache` is the one."""

    lengths: Tensor  # (B,) tokens stored in each row

    def append(self, layer: int, k: Tensor, v: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor]: ...
    def advance(self, new: int, lengths: Tensor | None) -> None: ...


@dataclass
class Context:
    """Everything beside the activations that the blocks of one forward need."""

    positions: Tensor  # (B, T) int64
    lengths: Tensor | None = None  # (B,)
    cu_seqlens: Tensor | None = None  # (N+1,)
    cache: Cache | None = None
    rotary: tuple[Tensor, Tensor] | None = None  # cos, sin, each (max_length, D/2); rotary models only

    def rotate(self, x: Tensor) -> Tensor:
        """Rotary embedding of queries or keys (B, T, H, D) at this forward's positions."""
        assert self.rotary is not None
        return ops.rope(x, *self.rotary, self.positions)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention of q (B, T, H, D) over k, v (B, T, Hkv, D) and whatever the cache holds before them."""
        if self.cache is None:
            return ops.attention(q, k, v, causal=True, lengths=self.lengths, cu_seqlens=self.cu_seqlens)
        k, v, lengths = self.cache.append(layer, k, v, self.lengths)
        # One query sees all the keys of its own row: rows may then have different lengths without any padding.
        return ops.attention(q, k, v, causal=q.shape[1] > 1, lengths=lengths)


def prepare(
    tokens: Tensor,
    *,
    vocab_size: int,
    max_length: int,
    positions: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    cache: Cache | None,
) -> Context:
    """Checks the arguments of a model's forward and fills in the positions."""
    if tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
        raise UserError(f"tokens must be (batch, time) integers, not {tuple(tokens.shape)} {tokens.dtype}")
    rows, steps = tokens.shape
    if cu_seqlens is not None and (rows != 1 or lengths is not None or cache is not None):
        raise UserError("cu_seqlens packs documents into one row: it takes batch 1, no lengths and no cache")
    if at_hand(tokens):
        check_tokens(tokens, vocab_size)
    if positions is None:
        if cu_seqlens is not None:
            positions = packed_positions(cu_seqlens, steps, tokens.device)
        else:
            positions = torch.arange(steps, device=tokens.device).expand(rows, steps)
            if cache is not None:
                positions = positions + cache.lengths.to(tokens.device)[:, None]
            elif steps > max_length:
                raise UserError(f"{steps} tokens do not fit the model's maximum length of {max_length}")
    if at_hand(tokens) and positions.numel():
        last = int(positions.max())
        if last >= max_length:
            raise UserError(f"position {last} does not fit the model's maximum length of {max_length}")
    return Context(positions, lengths, cu_seqlens, cache)


def at_hand(tokens: Tensor) -> bool:
    """Can the values be looked at for nothing? Not on a GPU, which one would wait for, nor where only shapes exist."""
    return tokens.device.type == "cpu" and type(tokens) is Tensor and not torch.compiler.is_compiling()


def check_tokens(tokens: Tensor, vocab_size: int) -> None:
    """UserError naming the first token outside 0 … vocab_size − 1."""
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
        bad = tokens[(tokens < 0) | (tokens >= vocab_size)][0].item()
        raise UserError(f"token {bad} is not in the vocabulary of {vocab_size}: is this the model's own tokenizer?")


def packed_positions(cu_seqlens: Tensor, steps: int, device: torch.device) -> Tensor:
    """Positions (1, T) that start again at 0 with each document of a packed row; cu_seqlens (N+1,)."""
    bounds = cu_seqlens.to(device=device, dtype=torch.int64)
    if int(bounds[0]) != 0 or int(bounds[-1]) != steps or bool((bounds.diff() < 0).any()):
        raise UserError(f"cu_seqlens must rise from 0 to {steps}, the number of packed tokens: {bounds.tolist()}")
    starts = torch.repeat_interleave(bounds[:-1], bounds.diff(), output_size=steps)  # (T,)
    return (torch.arange(steps, device=device) - starts)[None]


@torch.no_grad()
def init_gpt2(model: nn.Module, layers: int, residual: tuple[str, ...]) -> None:
    """GPT-2's scheme (Radford et al. 2019, §2.3): N(0, .02), biases 0, and .02/√(2·layers) for the projections that
    write into the residual stream, named by the endings `residual`."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.dim() == 2:
            small = name.removesuffix(".weight").endswith(residual)
            parameter.normal_(0.0, 0.02 / (2 * layers) ** 0.5 if small else 0.02)
