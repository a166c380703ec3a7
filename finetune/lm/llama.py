"""Llama (Touvron et al. 2023, arXiv:2302.13971; grouped-query attention from arXiv:2307.09288) on the project's ops,
and the families that differ from it in a few places: Mistral, Qwen, SmolLM3, Gemma. The differences are fields of
LlamaConfig, which `finetune.lm.io.hf_llama` reads from a model's files.

Weights come from and go to files by `finetune.lm.io.load` and `finetune.lm.io.save`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from finetune import ops
from finetune.errors import UserError
from finetune.lm.forward import Cache, ForwardContext, forward_context
from finetune.lm.head import logits
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
        if self.rope_scaling.kind == "dynamic" and self.head_dim < 4:
            raise UserError(f"dynamic rope scaling needs a head size of at least 4, not {self.head_dim}")
        self.window_layers, self.nope_layers = tuple(self.window_layers), tuple(self.nope_layers)
        for layer in (*self.window_layers, *self.nope_layers):
            if not 0 <= layer < self.layers:
                raise UserError(f"layer {layer} is named, but there are {self.layers} (0 to {self.layers - 1})")
        if self.window < (1 if self.window_layers else 0):
            raise UserError(f"the window of attention must be at least 1 token, not {self.window}")
        if self.activation not in ("silu", "gelu_tanh"):
            raise UserError(f"activation {self.activation!r} is not supported (only silu and gelu_tanh)")


class Attention(nn.Module):
    """Causal self-attention with rotary positions; groups of query heads share a key–value head."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.rotates = layer not in config.nope_layers
        self.scale, self.softcap = config.attention_scale or None, config.attention_softcap
        self.window = config.window if layer in config.window_layers else 0
        self.q = nn.Linear(config.dim, config.heads * config.head_dim, bias=config.qkv_bias)
        self.k = nn.Linear(config.dim, config.kv_heads * config.head_dim, bias=config.qkv_bias)
        self.v = nn.Linear(config.dim, config.kv_heads * config.head_dim, bias=config.qkv_bias)
        self.o = nn.Linear(config.heads * config.head_dim, config.dim, bias=config.o_bias)
        self.q_norm = norm(config, config.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = norm(config, config.head_dim) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, context: ForwardContext) -> Tensor:
        q = self.q_norm(self.q(x).unflatten(-1, (-1, self.head_dim)))  # (B, T, H, D)
        k = self.k_norm(self.k(x).unflatten(-1, (-1, self.head_dim)))  # (B, T, Hkv, D)
        v = self.v(x).unflatten(-1, (-1, self.head_dim))
        if self.rotates:
            q = ops.rope(q, cos, sin, context.turns)
            k = ops.rope(k, cos, sin, context.turns)
        rules: dict[str, Any] = {"scale": self.scale, "window": self.window, "softcap": self.softcap}
        if context.cache is None:
            o = ops.attention(q, k, v, causal=True, lengths=context.lengths, cu_seqlens=context.cu_seqlens, **rules)
        else:
            o = context.cache.attend(self.layer, q, k, v, context.lengths, **rules)
        return self.o(o.flatten(2))


class MLP(nn.Module):
    """down(silu(gate(x)) · up(x)), or with gelu in the place of silu (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.gate = nn.Linear(config.dim, config.hidden, bias=config.mlp_bias)
        self.up = nn.Linear(config.dim, config.hidden, bias=config.mlp_bias)
        self.down = nn.Linear(config.hidden, config.dim, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activate(self.gate(x), self.up(x)))

    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        return ops.swiglu(gate, up) if self.activation == "silu" else ops.gelu(gate) * up


def norm(config: LlamaConfig, dim: int) -> RMSNorm:
    return RMSNorm(dim, config.norm_eps, config.norm_plus_one)


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); with `post_norms` the two terms are normed as well."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm = norm(config, config.dim)
        self.attn = Attention(config, layer)
        self.attn_post_norm = norm(config, config.dim) if config.post_norms else nn.Identity()
        self.mlp_norm = norm(config, config.dim)
        self.mlp = MLP(config)
        self.mlp_post_norm = norm(config, config.dim) if config.post_norms else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, context: ForwardContext) -> Tensor:
        x = x + self.attn_post_norm(self.attn(self.attn_norm(x), cos, sin, context))
        return x + self.mlp_post_norm(self.mlp(self.mlp_norm(x)))


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
        self.norm = norm(config, config.dim)
        if not config.tied:
            self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.rotary = RotaryTable(config.head_dim, config.max_length, config.rope_theta, config.rope_scaling)
        self.local_rotary = self.rotary  # of the window layers
        if config.local_rope_theta:
            self.local_rotary = RotaryTable(config.head_dim, config.max_length, config.local_rope_theta)
        if self.embed.weight.device.type != "meta":
            init_gpt2(self, config.layers, residual=("attn.o", "mlp.down"))

    @property
    def head_weight(self) -> Tensor:
        """(V, C): the output projection; the embedding table itself if the two are tied."""
        return self.embed.weight if self.config.tied else self.head.weight

    def embeddings(self, tokens: Tensor) -> Tensor:
        """Tokens (…) → (…, C): their embeddings, scaled as the blocks take them."""
        x = self.embed(tokens)
        scale = self.config.embedding_scale
        return x if scale == 1 else x * torch.tensor(scale, dtype=x.dtype)  # rounded first, as in transformers

    def rotations(self, context: ForwardContext) -> list[tuple[Tensor, Tensor]]:
        """cos and sin for the layers that see everything, and for those with a window: of each position, or where
        dynamic scaling has a length for each token, of each token, whose row is `context.turns`."""
        tables = (self.rotary, self.local_rotary)
        dynamic = self.config.rope_scaling.kind == "dynamic"
        if not dynamic or context.cache is None or context.cache.spans is None:
            longest = context.longest if dynamic else None
            return [table.on(context.positions.device, longest) for table in tables]
        places = context.positions.flatten()
        context.turns = torch.arange(len(places), device=places.device).view_as(context.positions)
        return [table.turned(places, context.cache.spans.view(-1, 1)) for table in tables]

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
        `embedded` (B, T, C): vectors that replace those of `embeddings`.
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
        everywhere, local = self.rotations(context)
        x = self.embeddings(tokens) if embedded is None else embedded  # (B, T, C)
        again = getattr(cache, "stateless", cache is None)  # whether a block may run twice: it adds no keys to a cache
        save_memory = self.gradient_checkpointing and torch.is_grad_enabled() and again
        block: Any
        for block in self.blocks:
            cos, sin = local if block.attn.layer in config.window_layers else everywhere
            if save_memory:
                x = checkpoint(block, x, cos, sin, context, use_reentrant=False)
            else:
                x = block(x, cos, sin, context)
        if cache is not None:
            cache.advance(tokens.shape[1], lengths)
        x = self.norm(x)
        return x if hidden else logits(self, x)
