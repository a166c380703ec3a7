"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm before each part, GELU, tied head; on the project's ops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from finetune import ops
from finetune.errors import UserError
from finetune.lm.forward import Cache, ForwardContext, forward_context
from finetune.lm.head import logits
from finetune.lm.layers import LayerNorm, embedding, init_gpt2


@dataclass
class GPTConfig:
    """Shape of a GPT-2. `hidden=0` selects `4 · dim`."""

    vocab_size: int
    dim: int
    layers: int
    heads: int
    max_length: int = 1024
    hidden: int = 0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "layers", "heads", "max_length"):
            if getattr(self, name) < 1:
                raise UserError(f"a GPT-2 needs {name} of at least 1, not {getattr(self, name)}")
        if self.dim % self.heads:
            raise UserError(f"dim ({self.dim}) must be a multiple of heads ({self.heads})")
        self.hidden = self.hidden or 4 * self.dim

    @property
    def kv_heads(self) -> int:
        return self.heads

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


class Attention(nn.Module):
    """Causal self-attention; one matrix makes queries, keys and values."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.heads = layer, config.heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.o = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # (B, T, H, D)
        if context.cache is None:
            o = ops.attention(q, k, v, causal=True, lengths=context.lengths, cu_seqlens=context.cu_seqlens)
        else:
            o = context.cache.attend(self.layer, q, k, v, context.lengths)
        return self.o(o.flatten(2))


class MLP(nn.Module):
    """down(gelu(up(x))) (Hendrycks & Gimpel 2016, arXiv:1606.08415)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.dim, config.hidden)
        self.down = nn.Linear(config.hidden, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activate(self.up(x)))

    def activate(self, up: Tensor) -> Tensor:
        return ops.gelu(up)


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm = LayerNorm(config.dim, config.norm_eps)
        self.attn = Attention(config, layer)
        self.mlp_norm = LayerNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        x = x + self.attn(self.attn_norm(x), context)
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """The language model: token and position embeddings, blocks, norm, output projection. There is no dropout.

    `gradient_checkpointing`, `token_ids` and `generation_ids` are as in `finetune.lm.llama.Llama`.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.token_ids: dict[str, Any] = {}
        self.generation_ids: dict[str, Any] = {}
        self.embed = embedding(config.vocab_size, config.dim)
        self.positions = embedding(config.max_length, config.dim)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = LayerNorm(config.dim, config.norm_eps)
        if self.embed.weight.device.type != "meta":
            init_gpt2(self, config.layers, residual=("attn.o", "mlp.down"))

    @property
    def head_weight(self) -> Tensor:
        """(V, C): the output projection, which is the embedding table itself."""
        return self.embed.weight

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: Cache | None = None,
        embedded: Tensor | None = None,
        hidden: bool = False,
    ) -> Tensor:
        """Logits (B, T, V) of tokens (B, T), or with `hidden` the state after the last norm (B, T, C).

        `embedded` (B, T, C): vectors that replace the sum of token and position embeddings. The other arguments, and
        the errors, are those of `Llama.forward`.
        """
        context = forward_context(
            tokens,
            vocab_size=self.config.vocab_size,
            max_length=self.config.max_length,
            positions=positions,
            lengths=lengths,
            cu_seqlens=cu_seqlens,
            cache=cache,
        )
        x = self.embed(tokens) + self.positions(context.positions) if embedded is None else embedded  # (B, T, C)
        again = getattr(cache, "stateless", cache is None)  # whether a block may run twice: it adds no keys to a cache
        save_memory = self.gradient_checkpointing and torch.is_grad_enabled() and again
        for block in self.blocks:
            x = checkpoint(block, x, context, use_reentrant=False) if save_memory else block(x, context)
        if cache is not None:
            cache.advance(tokens.shape[1], lengths)
        x = self.norm(x)
        return x if hidden else logits(self, x)
