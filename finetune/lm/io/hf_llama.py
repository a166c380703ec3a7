"""Names and configuration of Hugging Face's Llama and of the families like it, to and from those of
finetune/lm/llama.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import msgspec
import torch
from torch import Tensor

from finetune.errors import UserError
from finetune.lm.io import hf_rope
from finetune.lm.io.config import Depth, Size, checked, require
from finetune.lm.llama import Llama, LlamaConfig
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
        every, count = self.no_rope_layer_interval, self.num_hidden_layers
        turning = self.no_rope_layers or [(layer + 1) % every for layer in range(count)]
        return [layer for layer, turns in enumerate(turning[:count]) if not turns]


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

# Keys of config.json → fields of LlamaConfig.
NUMBERS = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "intermediate_size": "hidden",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "max_position_embeddings": "max_length",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tied",
}


def family_of(name: object, source: object) -> Family:
    """The family of this model_type; UserError that lists the supported ones."""
    if isinstance(name, str) and name in FAMILIES:
        return FAMILIES[name]
    known = f"supported are {', '.join(FAMILIES)}"
    if name is None:
        raise UserError(f"{source}: model_type is missing: {known}")
    reason = f": {REFUSED[name]}" if isinstance(name, str) and name in REFUSED else ""
    raise UserError(f"{source}: model_type {name!r} cannot be read as a Llama{reason}; {known}")


def read_config(raw: dict[str, Any], source: object) -> LlamaConfig:
    """LlamaConfig of a Hugging Face config.json, as transformers 4 and 5 write it. Dropout is a setting of training and
    is ignored; anything else that would change the result and is not supported raises UserError."""
    name = raw.get("model_type")
    family = family_of(name, source)
    require(raw, source, COMMON | family.only)
    read = reading.convert(family.defaults | raw, HFConfig, source)
    sizes = {ours: getattr(read, key) for key, ours in NUMBERS.items()} | family.read(read)
    nested = "local_rope_theta" in sizes
    theta, scaling, local_theta = hf_rope.read(raw, read, source, nested)
    if nested:
        sizes["local_rope_theta"] = local_theta
    if scaling.kind == "dynamic":  # the others' max_position_embeddings is the extended length
        sizes["max_length"] = int(scaling.factor * scaling.original_length)
    layers = window_layers(family, read, source)
    return checked(
        LlamaConfig,
        source,
        **sizes,
        kv_heads=read.num_key_value_heads or read.num_attention_heads,
        head_dim=read.head_dim or 0,
        family=name,
        rope_theta=theta,
        rope_scaling=scaling,
        window=read.sliding_window if layers else 0,
        window_layers=layers,
    )


def window_layers(family: Family, read: HFConfig, source: object) -> tuple[int, ...]:
    """The layers with a sliding window."""
    on = read.use_sliding_window and read.sliding_window is not None
    if read.layer_types is None:
        return tuple(family.windows(read)) if on else ()
    if len(read.layer_types) != read.num_hidden_layers:
        count = len(read.layer_types)
        raise UserError(f"{source}: layer_types names {count} layers, num_hidden_layers is {read.num_hidden_layers}")
    listed = tuple(layer for layer, kind in enumerate(read.layer_types) if kind == "sliding_attention")
    if listed and not on:
        raise UserError(f"{source}: layer_types names sliding_attention, but there is no sliding_window in use")
    return listed


def write_config(config: LlamaConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The config.json that transformers 4 and 5 read. UserError if the family's has no place for a field's value."""
    family = family_of(config.family, "this model")
    written = {
        "architectures": [family.architecture],
        "model_type": config.family,
        **{key: getattr(config, ours) for key, ours in NUMBERS.items()},
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "rope_theta": config.rope_theta,
        "rope_scaling": hf_rope.written(config.rope_scaling),
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **({"hidden_act": "silu"} if config.activation == "silu" else {}),
        **family.write(config),
    }
    if config.rope_scaling.kind == "dynamic":
        written["max_position_embeddings"] = config.rope_scaling.original_length
    again = read_config(written, "the written config.json")
    for each in fields(config):
        if getattr(config, each.name) != (kept := getattr(again, each.name)):
            value = getattr(config, each.name)
            raise UserError(f"a {config.family} model cannot be saved with {each.name} = {value}, only {kept}")
    return written


# Names of the parts of a block: ours → Hugging Face's.
HF_NAMES = {
    "attn_norm": "input_layernorm",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "attn_post_norm": "post_attention_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
    "mlp_post_norm": "post_feedforward_layernorm",
}
# Of a family with norms after attention and MLP too, where Hugging Face's name of mlp_norm is attn_post_norm's.
POST_NORM_NAMES = HF_NAMES | {"mlp_norm": "pre_feedforward_layernorm"}
TOP_NAMES = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
OWN_TOP_NAMES = {theirs: ours for ours, theirs in TOP_NAMES.items()}


def to_hf(name: str, post_norms: bool = False) -> str:
    """`blocks.3.attn.q.weight` → `model.layers.3.self_attn.q_proj.weight`."""
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    known = POST_NORM_NAMES if post_norms else HF_NAMES
    prefix, layer, part = ([*name.split(".", 2), "", ""])[:3]
    part, _, leaf = part.rpartition(".")
    if prefix != "blocks" or part not in known or leaf not in ("weight", "bias"):
        raise UserError(f"parameter {name} is not a Llama's own: merge the adapter before saving the model")
    return f"model.layers.{layer}.{known[part]}.{leaf}"


def from_hf(name: str, post_norms: bool = False) -> str:
    """The inverse of `to_hf`; a name that it does not know comes back as it is."""
    if name in OWN_TOP_NAMES:
        return OWN_TOP_NAMES[name]
    known = {theirs: ours for ours, theirs in (POST_NORM_NAMES if post_norms else HF_NAMES).items()}
    prefix, layer, part = ([*name.removeprefix("model.").split(".", 2), "", ""])[:3]
    part, _, leaf = part.rpartition(".")
    return f"blocks.{layer}.{known[part]}.{leaf}" if prefix == "layers" and part in known else name


def own_tensors(pairs: Iterable[tuple[str, Tensor]], config: LlamaConfig) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a Hugging Face folder under this project's names."""
    for name, tensor in pairs:
        # Old folders hold the rotary frequencies, and some tied ones the embedding a second time.
        if name.endswith("rotary_emb.inv_freq") or (config.tied and name == "lm_head.weight"):
            continue
        yield from_hf(name, config.post_norms), tensor


def hf_tensors(model: Llama) -> Iterator[tuple[str, Tensor]]:
    """The parameters under Hugging Face's names."""
    for name, parameter in model.named_parameters():
        yield to_hf(name, model.config.post_norms), parameter
