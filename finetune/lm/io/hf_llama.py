"""Names and configuration of Hugging Face's Llama, to and from those of finetune/lm/llama.py."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
import torch
from torch import Tensor

from finetune.errors import UserError
from finetune.lm.io.config import Depth, Size, checked, require
from finetune.lm.llama import Llama, LlamaConfig
from finetune.runs import reading

# Names of the parts of a block: ours → Hugging Face's.
HF_NAMES = {
    "attn_norm": "input_layernorm",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
OWN_NAMES = {theirs: ours for ours, theirs in HF_NAMES.items()}
TOP_NAMES = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
OWN_TOP_NAMES = {theirs: ours for ours, theirs in TOP_NAMES.items()}


def to_hf(name: str) -> str:
    """`blocks.3.attn.q.weight` → `model.layers.3.self_attn.q_proj.weight`."""
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    prefix, layer, part = ([*name.split(".", 2), "", ""])[:3]
    part, _, leaf = part.rpartition(".")
    if prefix != "blocks" or part not in HF_NAMES or leaf != "weight":
        raise UserError(f"parameter {name} is not a Llama's own: merge the adapter before saving the model")
    return f"model.layers.{layer}.{HF_NAMES[part]}.{leaf}"


def from_hf(name: str) -> str:
    """The inverse of `to_hf`; a name that it does not know comes back as it is."""
    if name in OWN_TOP_NAMES:
        return OWN_TOP_NAMES[name]
    prefix, layer, part = ([*name.removeprefix("model.").split(".", 2), "", ""])[:3]
    part, _, leaf = part.rpartition(".")
    return f"blocks.{layer}.{OWN_NAMES[part]}.{leaf}" if prefix == "layers" and part in OWN_NAMES else name


def own_tensors(pairs: Iterable[tuple[str, Tensor]], config: LlamaConfig) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a Hugging Face folder under this project's names."""
    for name, tensor in pairs:
        # Old folders hold the rotary frequencies, and some tied ones the embedding a second time.
        if name.endswith("rotary_emb.inv_freq") or (config.tied and name == "lm_head.weight"):
            continue
        yield from_hf(name), tensor


def hf_tensors(model: Llama) -> Iterator[tuple[str, Tensor]]:
    """The parameters under Hugging Face's names."""
    for name, parameter in model.named_parameters():
        yield to_hf(name), parameter


def read_config(raw: dict[str, Any], source: object) -> LlamaConfig:
    """LlamaConfig of a Hugging Face config.json. Dropout is a setting of training and is ignored; anything else that
    would change the result and is not supported raises UserError."""
    require(
        raw,
        source,
        {
            "model_type": ("llama",),
            "hidden_act": ("silu", "swish"),
            "attention_bias": (False,),
            "mlp_bias": (False,),
            "sliding_window": (None,),
            "quantization_config": (None,),
            "partial_rotary_factor": (1.0, None),
            "rope_interleaved": (False,),
        },
    )
    if "model_type" not in raw:
        raise UserError(f"{source}: model_type is missing (only 'llama' is supported)")
    read = reading.convert(raw, HFConfig, source)
    theta = read.rope_theta
    for key in ("rope_scaling", "rope_parameters"):  # the second name since transformers 5, with theta inside
        scaling = raw.get(key) or {}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind != "default":
            raise UserError(f"{source}: {key} of type {kind!r} is not supported (only 'default')")
        require(scaling, f"{source}: {key}", {"partial_rotary_factor": (1.0, None)})
        theta = reading.convert(scaling.get("rope_theta", theta), reading.Positive, f"{source}: {key}.rope_theta")
    return checked(
        LlamaConfig,
        source,
        **{ours: getattr(read, key) for key, ours in NUMBERS.items()},
        kv_heads=read.num_key_value_heads or read.num_attention_heads,
        rope_theta=theta,
        norm_eps=read.rms_norm_eps,
        tied=read.tie_word_embeddings,
        head_dim=read.head_dim or 0,
    )


class HFConfig(msgspec.Struct):
    """The keys of config.json that the shape depends on."""

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
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None


# Keys of config.json → fields of LlamaConfig.
NUMBERS = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "intermediate_size": "hidden",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "max_position_embeddings": "max_length",
}


def write_config(config: LlamaConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The config.json that transformers reads."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{key: getattr(config, ours) for key, ours in NUMBERS.items()},
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": config.tied,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
