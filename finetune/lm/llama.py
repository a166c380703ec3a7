"""Llama (Touvron et al. 2023, arXiv:2302.13971; grouped-query attention from arXiv:2307.09288) on the project's ops.

Weights come from and go to files by `finetune.lm.io.load` and `finetune.lm.io.save`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from finetune import ops
from finetune.errors import UserError
from finetune.lm.forward import Cache, ForwardContext, forward_context
from finetune.lm.layers import RMSNorm, RopeScaling, RotaryTable, embedding, init_gpt2


@dataclass
class LlamaConfig:
    """Shape of a Llama, or of a family that differs from it in the fields from `family` on, whose defaults are Llama's.

    `head_dim=0` selects `dim // heads`. Layers are counted from 0. `rope_scaling` may be given as a dict.
    """

    vocab_size: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    hidden: int
    max_length: int = 2048
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tied: bool = True
    head_dim: int = 0
    family: str = "llama"  # Hugging Face's model_type
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over head_dim of each head's query and key, before the rotary embedding
    window: int = 0  # tokens that the layers in window_layers see, their own included; 0: all
    window_layers: tuple[int, ...] = ()
    nope_layers: tuple[int, ...] = ()  # layers without rotary embedding
    activation: Literal["silu", "gelu_tanh"] = "silu"
    norm_plus_one: bool = False  # norms multiply by weight + 1
    post_norms: bool = False  # a norm after the attention and after the MLP too
    embedding_scale: float = 1.0
    attention_scale: float = 0.0  # of the scores; 0: 1/√head_dim
    attention_softcap: float = 0.0  # c > 0: scores s become c · tanh(s/c)
    logit_softcap: float = 0.0  # the same of the logits
    local_rope_theta: float = 0.0  # of the window layers, which are then not scaled; 0: rope_theta

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "layers", "heads", "kv_heads", "hidden", "max_length"):
            if getattr(self, name) < 1:
                raise UserError(f"a Llama needs {name} of at least 1, not {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise UserError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if not self.head_dim:
            if self.dim % self.heads:
                raise UserError(f"dim ({self.dim}) must be a multiple of heads ({self.heads})")
            self.head_dim = self.dim // self.heads
        if self.head_dim % 2:
            raise UserError(f"rotary embedding needs an even head size, not {self.head_dim}")
        if isinstance(self.rope_scaling, dict):
            self.rope_scaling = RopeScaling(**self.rope_scaling)
        plain = {each.name: each.default for each in fields(self)[12:]} | {"rope_scaling": RopeScaling()}
        for name, default in plain.items():
            if getattr(self, name) != default:
                raise UserError(f"{name} = {getattr(self, name)} is not supported yet")


class Attention(nn.Module):
    """Causal self-attention with rotary positions; groups of query heads share a key–value head."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.q = nn.Linear(config.dim, config.heads * config.head_dim, bias=False)
        self.k = nn.Linear(config.dim, config.kv_heads * config.head_dim, bias=False)
        self.v = nn.Linear(config.dim, config.kv_heads * config.head_dim, bias=False)
        self.o = nn.Linear(config.heads * config.head_dim, config.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, context: ForwardContext) -> Tensor:
        rows, steps, _ = x.shape
        q = self.q(x).view(rows, steps, -1, self.head_dim)  # (B, T, H, D)
        k = self.k(x).view(rows, steps, -1, self.head_dim)  # (B, T, Hkv, D)
        v = self.v(x).view(rows, steps, -1, self.head_dim)
        q = ops.rope(q, cos, sin, context.positions)
        k = ops.rope(k, cos, sin, context.positions)
        if context.cache is None:
            o = ops.attention(q, k, v, causal=True, lengths=context.lengths, cu_seqlens=context.cu_seqlens)
        else:
            k, v, lengths = context.cache.append(self.layer, k, v, context.lengths)  # (B, Tk, Hkv, D)
            # One query sees all keys of its own row, so rows of different lengths need no padding and no causal mask.
            o = ops.attention(q, k, v, causal=steps > 1, lengths=lengths)
        return self.o(o.reshape(rows, steps, -1))


class MLP(nn.Module):
    """down(silu(gate(x)) · up(x)) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.dim, config.hidden, bias=False)
        self.up = nn.Linear(config.dim, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(ops.swiglu(self.gate(x), self.up(x)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.dim, config.norm_eps)
        self.attn = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, context: ForwardContext) -> Tensor:
        x = x + self.attn(self.attn_norm(x), cos, sin, context)
        return x + self.mlp(self.mlp_norm(x))


class Llama(nn.Module):
    """The language model: embedding, blocks, norm, output projection.

    `gradient_checkpointing = True` keeps only each block's input for the backward pass and computes the rest again.
    `token_ids` holds bos_token_id, eos_token_id and pad_token_id where the model's files name them, `generation_ids`
    those of generation_config.json where they differ; an eos_token_id may be a list.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.token_ids: dict[str, Any] = {}
        self.generation_ids: dict[str, Any] = {}
        self.embed = embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        if not config.tied:
            self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.rotary = RotaryTable(config.head_dim, config.max_length, config.rope_theta)
        if self.embed.weight.device.type != "meta":
            init_gpt2(self, config.layers, residual=("attn.o", "mlp.down"))

    @property
    def head_weight(self) -> Tensor:
        """(V, C): the output projection; the embedding table itself if the two are tied."""
        return self.embed.weight if self.config.tied else self.head.weight

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

        `positions` (B, T): those of the rotary embedding; by default counted from the start of each document.
        `lengths` (B,): rows are padded on the right and only the first lengths[b] tokens are real.
        `cu_seqlens` (N+1,): documents packed into one row; each attends to itself only.
        `cache`: keys and values of earlier calls are attended to, and those of these tokens are added.
        `embedded` (B, T, C): vectors that replace the tokens' embeddings.
        UserError: a token outside the vocabulary, a position beyond the maximum length, contradictory arguments.
        """
        config = self.config
        context = forward_context(
            tokens,
            vocab_size=config.vocab_size,
            max_length=config.max_length,
            positions=positions,
            lengths=lengths,
            cu_seqlens=cu_seqlens,
            cache=cache,
        )
        cos, sin = self.rotary.on(tokens.device)  # (max_length, D/2)
        x = self.embed(tokens) if embedded is None else embedded  # (B, T, C)
        save_memory = self.gradient_checkpointing and torch.is_grad_enabled() and cache is None
        for block in self.blocks:
            if save_memory:
                x = checkpoint(block, x, cos, sin, context, use_reentrant=False)
            else:
                x = block(x, cos, sin, context)
        if cache is not None:
            cache.advance(tokens.shape[1], lengths)
        x = self.norm(x)
        return x if hidden else F.linear(x, self.head_weight)
