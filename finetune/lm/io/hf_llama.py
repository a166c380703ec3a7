"""Names and configuration of Hugging Face's Llama and of the families like it, to and from those of
finetune/lm/llama.py."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from finetune.errors import UserError
from finetune.lm.io import hf_rope
from finetune.lm.io.config import checked, require
from finetune.lm.io.hf_families import COMMON, FAMILIES, REFUSED, Family, HFConfig
from finetune.lm.llama import Llama, LlamaConfig
from finetune.runs import reading

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
    for key, spare in (("layer_types", 0), ("no_rope_layers", 1 << 12)):  # entries of layers that are not there
        named, count = getattr(read, key), read.num_hidden_layers
        if named is not None and not count <= len(named) <= count + spare:
            raise UserError(f"{source}: {key} names {len(named)} layers, num_hidden_layers is {count}")
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
    listed = tuple(layer for layer, kind in enumerate(read.layer_types) if kind == "sliding_attention")
    if listed and not on:
        raise UserError(f"{source}: layer_types names sliding_attention, but sliding_window is not in use")
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
        value, kept = getattr(config, each.name), getattr(again, each.name)
        if value != kept and not (isinstance(value, float) and math.isclose(value, kept)):
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
