"""Contiguous key–value caches, one row a sequence: the plain form of what the engine keeps in blocks
(finetune/inference/cache.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from finetune import ops
from finetune.errors import UserError
from finetune.lm.gpt import GPT
from finetune.lm.llama import Llama


class RowCache:
    """A cache that keeps each row's keys and values in one piece, which `append` returns."""

    spans: Tensor | None = None

    def append(self, layer: int, k: Tensor, v: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Stores the new k, v (B, T, Hkv, D); returns all keys, all values and the number (B,) of real ones."""
        raise NotImplementedError

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, **rules: Any) -> Tensor:
        k, v, real = self.append(layer, k, v, lengths)  # (B, Tk, Hkv, D)
        # One query sees all keys of its own row, so rows of different lengths need no padding and no causal mask.
        return ops.attention(q, k, v, causal=q.shape[1] > 1, lengths=real, **rules)


class KVCache(RowCache):
    """Keys and values of up to `max_length` tokens a row, allocated at once: per layer (B, max_length, Hkv, D) twice.

    Bytes per token: 2 · layers · Hkv · D · bytes of the dtype. Row b holds `lengths[b]` tokens from index 0 on, so no
    row is padded: `lengths` tells the attention where each one ends.
    """

    def __init__(self, model: Llama | GPT, rows: int, max_length: int) -> None:
        config, weight = model.config, model.norm.weight
        if max_length > config.max_length:
            raise UserError(f"{max_length} tokens do not fit the model's maximum length of {config.max_length}")
        shape = (config.layers, rows, max_length, config.kv_heads, config.head_dim)
        self.k = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.v = torch.zeros_like(self.k)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=weight.device)
        self.rows = torch.arange(rows, device=weight.device)
        self.longest = 0
        self.even = True  # all rows hold equally many tokens

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes

    def append(self, layer: int, k: Tensor, v: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Stores the new k, v (B, T, Hkv, D) of a layer behind each row's tokens; returns all keys, all values
        (B, Tk, Hkv, D) and the number (B,) of real ones. With `lengths` only the first lengths[b] of the T count."""
        new = k.shape[1]
        end = self.longest + new
        if end > self.k.shape[2]:
            raise UserError(f"{end} tokens do not fit the cache of {self.k.shape[2]}")
        keys, values = self.k[layer], self.v[layer]
        if self.even:
            keys[:, self.longest : end], values[:, self.longest : end] = k, v
        elif new == 1:
            keys[self.rows, self.lengths], values[self.rows, self.lengths] = k[:, 0], v[:, 0]
        else:
            raise UserError("several tokens at once can be added only while all rows of the cache are equally long")
        return keys[:, :end], values[:, :end], self.lengths + (new if lengths is None else lengths)

    def advance(self, new: int, lengths: Tensor | None) -> None:
        """Counts the tokens of a forward in, once every layer has stored them."""
        self.lengths = self.lengths + (new if lengths is None else lengths)
        if lengths is None:
            self.longest += new
        else:
            self.longest = int(self.lengths.max())
            self.even = bool((self.lengths == self.longest).all())
