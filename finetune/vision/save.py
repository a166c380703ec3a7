"""Vision encoders to folders that transformers opens, as CLIP's or SigLIP's: the inverse of `finetune.vision.load`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.errors import UserError
from finetune.runs import checkpoint
from finetune.vision import load
from finetune.vision.vit import ViT, ViTConfig

OWN_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
TOP_NAMES = {
    "class_token": "embeddings.class_embedding",
    "positions": "embeddings.position_embedding.weight",
    "patch.weight": "embeddings.patch_embedding.weight",
    "patch.bias": "embeddings.patch_embedding.bias",
    "pre_norm.weight": "pre_layrnorm.weight",
    "pre_norm.bias": "pre_layrnorm.bias",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
    "pool.probe": "head.probe",
}
BLOCK = {
    "attn_norm": "layer_norm1", "mlp_norm": "layer_norm2", "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj", "attn.o": "self_attn.out_proj", "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2",
}  # fmt: skip
HEAD = {"norm": "layernorm", "attn.o": "attention.out_proj", "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"}


def vit(model: ViT, folder: str | Path) -> None:
    """Writes config.json and model.safetensors, each whole or not at all. UserError for a shape that neither CLIP nor
    SigLIP has, and if the disk refuses."""
    folder = Path(folder)
    config = write_config(model.config, model.patch.weight.dtype)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in hf_tensors(model, "vision_model.")}
    with checkpoint.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(folder / "config.json", config)
    checkpoint.write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})


def write_config(config: ViTConfig, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The config.json of CLIP's or SigLIP's encoder. UserError that names the field for which it has no place."""
    clip = config.class_token
    written: dict[str, Any] = {
        "architectures": [("CLIPVisionModelWithProjection" if config.projection else "CLIPVisionModel")]
        if clip
        else ["SiglipVisionModel"],
        "model_type": "clip_vision_model" if clip else "siglip_vision_model",
        "hidden_size": config.dim,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_channels": config.channels,
        "image_size": config.height,
        "patch_size": config.patch,
        "hidden_act": OWN_ACTIVATIONS[config.activation],
        "layer_norm_eps": config.norm_eps,
        "attention_dropout": 0.0,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **({"projection_dim": config.projection or 512} if clip else {}),
        **({} if clip else {"vision_use_head": config.pooling == "attention"}),
    }
    again = load.read_config(written, "the written config.json")
    for name, kept in vars(again).items():
        if (value := getattr(config, name)) != kept:
            raise UserError(
                f"an encoder with {name} = {value!r} cannot be saved: {'CLIP' if clip else 'SigLIP'}'s has {kept!r}"
            )
    return written


def to_hf(name: str) -> str:
    """`blocks.3.mlp.up.weight` → `encoder.layers.3.mlp.fc1.weight`."""
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    begin, split, parts = "head.", name.removeprefix("pool."), HEAD
    if name.startswith("blocks."):
        _, number, split = name.split(".", 2)
        begin, parts = f"encoder.layers.{number}.", BLOCK
    part, _, leaf = split.rpartition(".")
    return f"{begin}{parts[part]}.{leaf}"


def hf_tensors(model: ViT, begin: str = "vision_model.") -> Iterator[tuple[str, Tensor]]:
    """The parameters under transformers' names, which start with `begin`; the projection's does not."""
    config = model.config
    tensor: Tensor
    for name, tensor in model.named_parameters():
        if name == "projection.weight":
            yield "visual_projection.weight", tensor
        elif name.startswith("pool.attn.") and not name.startswith("pool.attn.o."):
            if name.startswith("pool.attn.q."):  # one matrix of the queries', keys' and values'
                leaf = name.rpartition(".")[2]
                parts = tuple(model.get_parameter(f"pool.attn.{part}.{leaf}") for part in "qkv")
                yield f"{begin}head.attention.in_proj_{leaf}", torch.cat(parts)
        else:
            if name == "patch.weight":
                tensor = tensor.unflatten(1, (config.channels, config.patch, config.patch))
            elif name == "pool.probe":
                tensor = tensor.view(1, 1, -1)
            yield begin + to_hf(name), tensor
