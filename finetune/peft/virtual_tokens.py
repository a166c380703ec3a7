"""Trained context instead of trained weights: virtual tokens before every row, of a frozen Llama.

    prompt tuning  P vectors before the embeddings of each row's tokens     Lester et al. 2021, arXiv:2104.08691
    prefix tuning  P keys and values in every layer                         Li & Liang 2021, arXiv:2101.00190

Both start as what the model makes of P real tokens (`from_tokens`), which learns far sooner than a random start: at
step 0 they are the model with those tokens before the row. The vectors are fp32 whatever the dtype of the model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from finetune.lm.cache import KVCache, RowCache
from finetune.lm.llama import Llama


class Prompt(nn.Module):
    """Prompt tuning: `vectors` (P, C) before every row."""

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.vectors = nn.Parameter(vectors)

    @classmethod
    def from_tokens(cls, model: Llama, tokens: Tensor) -> Prompt:
        """tokens (P,)."""
        return cls(model.embeddings(tokens).detach().float().clone())

    def forward(
        self, model: Llama, tokens: Tensor, *, cu_seqlens: Tensor | None = None, hidden: bool = False
    ) -> Tensor:
        """The model's output for tokens (B, T) alone: rows, or the documents of a packed one, that each come after the
        vectors."""
        (rows, steps), count, device = tokens.shape, len(self.vectors), tokens.device
        bounds = torch.arange(0, rows * steps + 1, steps) if cu_seqlens is None else cu_seqlens.cpu().long()
        longer = bounds + count * torch.arange(len(bounds))  # of the documents with their vectors
        place = torch.arange(int(longer[-1]))
        document = torch.searchsorted(longer, place, right=True) - 1
        real = (place - longer[document] >= count).to(device)
        long = tokens.new_zeros(len(place)).masked_scatter(real, tokens)
        vectors = self.vectors.to(model.embed.weight.dtype).repeat(len(longer) - 1, 1)
        embedded = model.embeddings(long).index_copy(0, (~real).nonzero()[:, 0], vectors)
        packed = None if cu_seqlens is None else longer.to(cu_seqlens)
        out = model(long.view(rows, -1), embedded=embedded.view(rows, -1, embedded.shape[-1]), cu_seqlens=packed,
                    hidden=hidden)  # fmt: skip
        return out.flatten(0, 1)[real].view(rows, steps, -1)


class Prefix(nn.Module):
    """Prefix tuning: `vectors` (P, 2 · layers · Hkv · D), for each token and layer its key, then its value, in peft's
    order."""

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.vectors = nn.Parameter(vectors)

    @classmethod
    @torch.no_grad()
    def from_tokens(cls, model: Llama, tokens: Tensor) -> Prefix:
        """tokens (P,)."""
        cache = KVCache(model, 1, len(tokens))
        model(tokens[None], cache=cache, hidden=True)
        both = torch.stack([cache.k[:, 0], cache.v[:, 0]], 1)  # (layers, 2, P, Hkv, D)
        return cls(both.permute(2, 0, 1, 3, 4).flatten(1).float().clone())

    def forward(self, model: Llama, tokens: Tensor, *, lengths: Tensor | None = None, hidden: bool = False) -> Tensor:
        """The model's output for tokens (B, T), each row after the prefix; `lengths` (B,): rows are padded on the
        right."""
        return model(tokens, lengths=lengths, cache=Prefixed(self, model, len(tokens)), hidden=hidden)


def keys_and_values(prefix: Prefix, model: Llama) -> Tensor:
    """(layers, 2, P, Hkv, D) in the model's dtype."""
    shape, weight = model.config, model.norm.weight
    kv = prefix.vectors.to(weight.dtype).view(-1, shape.layers, 2, shape.kv_heads, shape.head_dim)
    return kv.permute(1, 2, 0, 3, 4)


class Prefixed(RowCache):
    """A prefix as the cache of one forward pass, through which gradients flow; it stores nothing."""

    def __init__(self, prefix: Prefix, model: Llama, rows: int) -> None:
        kv = keys_and_values(prefix, model)
        self.kv = kv[:, :, None].expand(-1, -1, rows, -1, -1, -1)  # (L, 2, B, P, Hkv, D)
        self.lengths = torch.full((rows,), len(prefix.vectors), device=kv.device)

    def append(self, layer: int, k: Tensor, v: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        before = self.kv[layer]
        real = self.lengths + (k.shape[1] if lengths is None else lengths)
        return torch.cat([before[0], k], 1), torch.cat([before[1], v], 1), real

    def advance(self, new: int, lengths: Tensor | None) -> None:
        pass
