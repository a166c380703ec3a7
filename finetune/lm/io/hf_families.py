"""The families of models that a Hugging Face config.json may name: how each sets a LlamaConfig and is written again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from finetune.lm.io import hf_rope
from finetune.lm.io.config import Depth, Size
from finetune.lm.llama import LlamaConfig
from finetune.runs import reading


class HFConfig(msgspec.Struct):
    """The keys of config.json that the shape depends on, of all families."""

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Depth
    num_attention_heads: Size
    max_position_embeddings: Size
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    rope_theta: reading.Positive = 10000.0
    rms_norm_eps: reading.Positive = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    use_sliding_window: bool = False
    sliding_window: Size | None = None
    max_window_layers: reading.Index = 28
    layer_types: list[hf_rope.LayerType] | None = None
    sliding_window_pattern: Size = 6
    no_rope_layers: list[int] | None = None
    no_rope_layer_interval: Size = 4
    query_pre_attn_scalar: Size = 256
    attn_logit_softcapping: reading.Positive | None = None
    final_logit_softcapping: reading.Positive | None = None
    rope_local_base_freq: reading.Positive = 10000.0

    def nope(self) -> list[int]:
        """The layers without rotary embedding, of SmolLM3."""
        every = range(self.num_hidden_layers)
        turning = self.no_rope_layers or [(layer + 1) % self.no_rope_layer_interval for layer in every]
        return [layer for layer in every if not turning[layer]]


@dataclass(frozen=True)
class Family:
    """A family of models: how its config.json becomes a LlamaConfig and is written again."""

    title: str
    architecture: str  # transformers' class
    read: Callable[[HFConfig], dict[str, Any]]  # fields of LlamaConfig that differ from a Llama's
    write: Callable[[LlamaConfig], dict[str, Any]]  # the keys of config.json from which `read` has them
    windows: Callable[[HFConfig], Iterable[int]] = lambda _: ()  # the window layers where layer_types is absent
    defaults: dict[str, Any] = field(default_factory=dict)  # of transformers, for keys that config.json omits
    only: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # keys and the values that are supported


def biases(read: HFConfig) -> dict[str, Any]:
    return {"qkv_bias": read.attention_bias, "o_bias": read.attention_bias, "mlp_bias": read.mlp_bias}


def written_biases(config: LlamaConfig) -> dict[str, Any]:
    return {"attention_bias": config.o_bias, "mlp_bias": config.mlp_bias}


def written_windows(config: LlamaConfig) -> dict[str, Any]:
    layers = range(config.layers)
    return {
        "use_sliding_window": bool(config.window_layers),
        "sliding_window": config.window or None,
        "max_window_layers": config.layers,
        "layer_types": ["sliding_attention" if n in config.window_layers else "full_attention" for n in layers],
    }


def gemma(read: HFConfig) -> dict[str, Any]:
    return {
        "qkv_bias": read.attention_bias,
        "o_bias": read.attention_bias,
        "activation": "gelu_tanh",
        "norm_plus_one": True,
        "post_norms": True,
        "embedding_scale": read.hidden_size**0.5,
        "attention_scale": read.query_pre_attn_scalar**-0.5,
    }


def written_gemma(config: LlamaConfig) -> dict[str, Any]:
    return {
        "attention_bias": config.o_bias,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": round(config.attention_scale**-2) if config.attention_scale else config.head_dim,
        "sliding_window": config.window or None,
        "layer_types": written_windows(config)["layer_types"],
    }


GEMMA = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "sliding_window": 4096,
    "use_sliding_window": True,
}
ONLY_GEMMA = {
    "hidden_activation": ("gelu_pytorch_tanh",),
    "use_bidirectional_attention": (False, None),
    "use_sliding_window": (True,),
}
SILU = {"hidden_act": ("silu", "swish")}
UNIFORM = {"layer_types": (None,)}

FAMILIES = {
    "llama": Family(
        "Llama 1 to 3.3 and models of its architecture, such as SmolLM2 and TinyLlama",
        "LlamaForCausalLM",
        biases,
        written_biases,
        only={**SILU, **UNIFORM, "sliding_window": (None,)},
    ),
    "mistral": Family(
        "Mistral 7B: a sliding window in all layers, or in none",
        "MistralForCausalLM",
        lambda _: {},
        lambda config: {"sliding_window": config.window or None},
        lambda read: range(read.num_hidden_layers),
        defaults={"num_key_value_heads": 8, "sliding_window": 4096, "use_sliding_window": True},
        only={**SILU, **UNIFORM, "use_sliding_window": (True,)},
    ),
    "qwen2": Family(
        "Qwen2 and Qwen2.5: biases of queries, keys and values",
        "Qwen2ForCausalLM",
        lambda _: {"qkv_bias": True},
        written_windows,
        lambda read: range(read.max_window_layers, read.num_hidden_layers),
        defaults={"num_key_value_heads": 32, "sliding_window": 4096},
        only={**SILU, "use_mrope": (False, None)},
    ),
    "qwen3": Family(
        "Qwen3: norms of each head's query and key",
        "Qwen3ForCausalLM",
        lambda read: biases(read) | {"qk_norm": True, "mlp_bias": False},
        lambda config: written_biases(config) | written_windows(config),
        lambda read: range(read.max_window_layers, read.num_hidden_layers),
        defaults={"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096},
        only=SILU,
    ),
    "smollm3": Family(
        "SmolLM3: layers without rotary embedding (NoPE)",
        "SmolLM3ForCausalLM",
        lambda read: biases(read) | {"nope_layers": tuple(read.nope())},
        lambda config: (
            written_biases(config)
            | written_windows(config)
            | {"no_rope_layers": [int(n not in config.nope_layers) for n in range(config.layers)]}
        ),
        HFConfig.nope,
        defaults={"num_key_value_heads": 4, "rope_theta": 2e6, "tie_word_embeddings": True},
        only=SILU,
    ),
    "gemma2": Family(
        "Gemma 2: local and global layers, norms with weight + 1 on both sides, soft caps of scores and logits",
        "Gemma2ForCausalLM",
        lambda read: (
            gemma(read)
            | {
                "attention_softcap": read.attn_logit_softcapping or 0.0,
                "logit_softcap": read.final_logit_softcapping or 0.0,
            }
        ),
        lambda config: (
            written_gemma(config)
            | {
                "attn_logit_softcapping": config.attention_softcap or None,
                "final_logit_softcapping": config.logit_softcap or None,
            }
        ),
        lambda read: range(0, read.num_hidden_layers, 2),
        defaults={**GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        only=ONLY_GEMMA,
    ),
    "gemma3_text": Family(
        "Gemma 3 without vision: as Gemma 2, with norms of queries and keys in the place of soft caps",
        "Gemma3ForCausalLM",
        lambda read: gemma(read) | {"qk_norm": True, "local_rope_theta": read.rope_local_base_freq},
        lambda config: written_gemma(config) | {"rope_local_base_freq": config.local_rope_theta},
        lambda read: [n for n in range(read.num_hidden_layers) if (n + 1) % read.sliding_window_pattern],
        defaults={**GEMMA, "rope_theta": 1e6, "vocab_size": 262208, "max_position_embeddings": 131072},
        only={**ONLY_GEMMA, "attn_logit_softcapping": (None,), "final_logit_softcapping": (None,)},
    ),
}

# Known families that are refused, and why.
REFUSED = {
    "gemma": "its first generation is not supported",
    "gemma3": "its vision tower is not supported: take a folder of the text model alone (gemma3_text)",
}

# Keys that change the result in families made from these, and the values that do not.
COMMON = {
    "quantization_config": (None,),
    "partial_rotary_factor": (1.0, None),
    "rope_interleaved": (False,),
    "attention_multiplier": (None,),
    "residual_multiplier": (1.0, None),
    "embedding_multiplier": (1.0, None),
    "logits_scaling": (1.0, None),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
}
