"""The inputs of one forward pass that all blocks share, and the checks of a model's arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from finetune.errors import UserError


class Cache(Protocol):
    """What a forward pass needs of a key–value cache: contiguous rows (`finetune.lm.cache`, a trained prefix), or the
    blocks of many sequences (`finetune.inference.cache.PagedStep`)."""

    lengths: Tensor  # (B,) tokens stored in each row
    spans: Tensor | None  # (B, T): the length that each new token's theta is of, in dynamic scaling; None: the longest

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, **rules: Any) -> Tensor:
        """Stores the new k, v (B, T, Hkv, D); returns the attention (B, T, H, D) of the new q over all tokens of their
        sequences. rules: scale, window, softcap of ops.attention."""

    def advance(self, new: int, lengths: Tensor | None) -> None:
        """Counts the tokens of a forward pass, after every layer has stored them."""


@dataclass
class ForwardContext:
    """Per-forward inputs shared by all blocks: positions, padding, packing, KV cache."""

    positions: Tensor  # (B, T) int64: the place of each token in its own document
    lengths: Tensor | None = None  # (B,): only the first lengths[b] tokens of row b are real, the rest is padding
    cu_seqlens: Tensor | None = None  # (N+1,): the one row holds N documents, which do not attend to each other
    cache: Cache | None = None  # keys and values of earlier tokens

    def __post_init__(self) -> None:
        self.turns = self.positions  # (B, T): each token's row of the rotary tables

    @property
    def longest(self) -> Tensor:
        """() int64: how many tokens the longest row or document has by now, padding not counted."""
        real = self.positions + 1
        if self.lengths is not None:
            steps = torch.arange(real.shape[1], device=real.device)
            real = real * (steps < self.lengths.to(real.device)[:, None])
        return real.max() if real.numel() else real.new_zeros(())


def forward_context(
    tokens: Tensor,
    *,
    vocab_size: int,
    max_length: int,
    positions: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    cache: Cache | None,
) -> ForwardContext:
    """The checked arguments of a model's forward, with the positions filled in."""
    if tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
        raise UserError(f"tokens must be (batch, time) integers, not {tuple(tokens.shape)} {tokens.dtype}")
    rows, steps = tokens.shape
    if cu_seqlens is not None and (rows != 1 or lengths is not None or cache is not None):
        raise UserError("cu_seqlens packs documents into one row: it needs batch 1, no lengths and no cache")
    if readable(tokens):
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
    if readable(tokens) and positions.numel():
        last = int(positions.max())
        if last >= max_length:
            raise UserError(f"position {last} does not fit the model's maximum length of {max_length}")
    return ForwardContext(positions, lengths, cu_seqlens, cache)


def readable(tokens: Tensor) -> bool:
    """Whether the values can be read at no cost: not on a GPU, which would have to finish first, nor in a compiler."""
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
