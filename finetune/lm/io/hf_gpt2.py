"""Names and configuration of Hugging Face's GPT-2, to and from those of finetune/lm/gpt.py.

Its linear layers are stored transposed (Conv1D).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
import torch
from torch import Tensor

from finetune.errors import UserError
from finetune.lm.gpt import GPT, GPTConfig
from finetune.lm.io.config import Depth, Size, checked, require
from finetune.runs import reading

# Names of the parts of a block: ours → Hugging Face's.
HF_NAMES = {
    "attn_norm": "ln_1",
    "attn.qkv": "attn.c_attn",
    "attn.o": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}
OWN_NAMES = {theirs: ours for ours, theirs in HF_NAMES.items()}
TOP_NAMES = {"embed": "wte", "positions": "wpe", "norm": "ln_f"}
OWN_TOP_NAMES = {theirs: ours for ours, theirs in TOP_NAMES.items()}


def transposed(name: str) -> bool:
    """Whether Hugging Face stores this tensor as (in, out): the blocks' linear layers."""
    return name.endswith(".weight") and name.startswith("blocks.") and "norm" not in name


def to_hf(name: str) -> str:
    """`blocks.3.attn.qkv.weight` → `transformer.h.3.attn.c_attn.weight`."""
    part, leaf = name.rsplit(".", 1)
    if part in TOP_NAMES:
        return f"transformer.{TOP_NAMES[part]}.{leaf}"
    prefix, layer, part = ([*part.split(".", 2), "", ""])[:3]
    if prefix != "blocks" or part not in HF_NAMES or leaf not in ("weight", "bias"):
        raise UserError(f"parameter {name} is not a GPT-2's own: merge the adapter before saving the model")
    return f"transformer.h.{layer}.{HF_NAMES[part]}.{leaf}"


def from_hf(name: str) -> str:
    """The inverse of `to_hf`, with or without `transformer.`; a name that it does not know comes back as it is."""
    part, _, leaf = name.removeprefix("transformer.").rpartition(".")
    if part in OWN_TOP_NAMES:
        return f"{OWN_TOP_NAMES[part]}.{leaf}"
    prefix, layer, part = ([*part.split(".", 2), "", ""])[:3]
    return f"blocks.{layer}.{OWN_NAMES[part]}.{leaf}" if prefix == "h" and part in OWN_NAMES else name


def own_tensors(pairs: Iterable[tuple[str, Tensor]], config: GPTConfig) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a Hugging Face folder under this project's names, the linear layers as (out, in)."""
    for theirs, tensor in pairs:
        # The causal mask of old folders, and the tied head where it is stored a second time.
        if theirs.endswith((".attn.bias", ".attn.masked_bias")) or theirs == "lm_head.weight":
            continue
        name = from_hf(theirs)
        yield name, tensor.t() if transposed(name) else tensor


def hf_tensors(model: GPT) -> Iterator[tuple[str, Tensor]]:
    """The parameters under Hugging Face's names, the linear layers as (in, out)."""
    for name, parameter in model.named_parameters():
        yield to_hf(name), parameter.t() if transposed(name) else parameter


def read_config(raw: dict[str, Any], source: object) -> GPTConfig:
    """GPTConfig of a Hugging Face config.json. Dropout is a setting of training and is ignored; anything else that
    would change the result and is not supported raises UserError."""
    require(
        raw,
        source,
        {
            "model_type": ("gpt2",),
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "tie_word_embeddings": (True,),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "reorder_and_upcast_attn": (False,),
            "add_cross_attention": (False,),
            "quantization_config": (None,),
        },
    )
    if "model_type" not in raw:
        raise UserError(f"{source}: model_type is missing (only 'gpt2' is supported)")
    read = reading.convert(raw, HFConfig, source)
    return checked(
        GPTConfig,
        source,
        **{ours: getattr(read, key) for key, ours in NUMBERS.items()},
        hidden=read.n_inner or 0,
        norm_eps=read.layer_norm_epsilon,
    )


class HFConfig(msgspec.Struct):
    """The keys of config.json that the shape depends on."""

    vocab_size: Size
    n_embd: Size
    n_layer: Depth
    n_head: Size
    n_positions: Size
    n_inner: Size | None = None
    layer_norm_epsilon: reading.Positive = 1e-5


# Keys of config.json → fields of GPTConfig.
NUMBERS = {
    "vocab_size": "vocab_size",
    "n_embd": "dim",
    "n_layer": "layers",
    "n_head": "heads",
    "n_positions": "max_length",
}


def write_config(config: GPTConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The config.json that transformers reads."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{key: getattr(config, ours) for key, ours in NUMBERS.items()},
        "n_inner": config.hidden,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": 0.02,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "tie_word_embeddings": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
