"""Vision encoders from folders that transformers writes: CLIP's, SigLIP's and BLIP-2's (EVA-CLIP: Sun et al. 2023,
arXiv:2303.15389), the encoder alone or in the whole model, whose other parts are not read. UserError names the key,
file or tensor that is missing, damaged or not supported."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from finetune.errors import UserError
from finetune.lm.io import hub, weights
from finetune.lm.io.config import Depth, Size, checked, read_json, require
from finetune.runs import reading
from finetune.vision.vit import ViT, ViTConfig

# model_type of config.json → the family, and the classes of transformers whose tensors are read.
FOLDERS = {
    "clip": ("clip", ("CLIPModel",)),
    "clip_vision_model": ("clip", ("CLIPVisionModel", "CLIPVisionModelWithProjection")),
    "siglip": ("siglip", ("SiglipModel",)),
    "siglip_vision_model": ("siglip", ("SiglipVisionModel",)),
    "blip-2": ("eva", ("Blip2ForConditionalGeneration", "Blip2Model", "Blip2ForImageTextRetrieval")),
    "blip_2_vision_model": ("eva", ("Blip2VisionModel",)),
}
ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
# What transformers takes for keys that a file lacks, as many on the hub do.
DEFAULTS: dict[str, dict[str, Any]] = {
    "clip": {"patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "siglip": {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
    "eva": {
        "patch_size": 14,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "hidden_size": 1408,
        "intermediate_size": 6144,
        "num_hidden_layers": 39,
        "num_attention_heads": 16,
    },
}
TOP_NAMES = {
    "embeddings.class_embedding": "class_token",
    "embeddings.patch_embedding.weight": "patch.weight",
    "embeddings.patch_embedding.bias": "patch.bias",
    "embeddings.position_embedding.weight": "positions",
    "embeddings.position_embedding": "positions",  # EVA
    "pre_layrnorm.weight": "pre_norm.weight",  # so spelled in every checkpoint
    "pre_layrnorm.bias": "pre_norm.bias",
    "post_layernorm.weight": "norm.weight",
    "post_layernorm.bias": "norm.bias",
    "visual_projection.weight": "projection.weight",
    "head.probe": "pool.probe",
}
PARTS = {  # of a block, and of SigLIP's head
    "layer_norm1": "attn_norm", "layer_norm2": "mlp_norm", "layernorm": "norm",
    "self_attn.q_proj": "attn.q", "self_attn.k_proj": "attn.k", "self_attn.v_proj": "attn.v",
    "self_attn.out_proj": "attn.o", "mlp.fc1": "mlp.up", "mlp.fc2": "mlp.down",
    "attention.in_proj": "attn.qkv", "attention.out_proj": "attn.o",  # of SigLIP's head
    "self_attn.qkv": "attn.qkv", "self_attn.projection": "attn.o",  # EVA
}  # fmt: skip


class VisionConfig(msgspec.Struct):
    """The keys of config.json, or of its `vision_config`, on which the result depends."""

    patch_size: Size
    hidden_act: str
    layer_norm_eps: reading.Positive
    hidden_size: Size = 768
    intermediate_size: Size = 3072
    num_hidden_layers: Depth = 12
    num_attention_heads: Size = 12
    num_channels: Size = 3
    image_size: Size = 224
    projection_dim: Size = 512
    vision_use_head: bool = True


def vit(path: str | Path, dtype: torch.dtype = torch.float32) -> ViT:
    """The encoder in a model folder, or of a hub id."""
    folder = hub.resolve(path)
    if not folder.is_dir():
        raise UserError(f"{path} is not a folder: encoders are read from folders with config.json and safetensors")
    raw = read_json(folder / "config.json")
    shape = read_config(raw, folder / "config.json")
    pairs = own_tensors(weights.read_safetensors(folder), shape, whole(raw))
    return weights.assemble(ViT, shape, pairs, dtype, folder)


def whole(raw: dict[str, Any]) -> bool:
    """Whether the config.json is that of a model of which the encoder is a part."""
    return not str(raw.get("model_type")).endswith("_vision_model")


def read_config(raw: dict[str, Any], source: object) -> ViTConfig:
    """The shape that a config.json of transformers describes."""
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FOLDERS:
        raise UserError(f"{source}: model_type = {kind!r} is not supported (only {', '.join(FOLDERS)})")
    family, classes = FOLDERS[kind]
    written = raw.get("architectures") or list(classes[:1])
    if not isinstance(written, list) or written[0] not in classes:
        raise UserError(f"{source}: architectures = {written!r} is not supported (only {' and '.join(classes)})")
    require(raw, source, {"quantization_config": (None,)})
    inner = of_whole(raw, source) if whole(raw) else raw
    require(inner, source, {"qkv_bias": (True,)})
    read = reading.convert(DEFAULTS[family] | dict(inner), VisionConfig, source)
    if read.hidden_act not in ACTIVATIONS:
        raise UserError(f"{source}: hidden_act = {read.hidden_act!r} is not supported (only {', '.join(ACTIVATIONS)})")
    projection = 0
    if kind == "clip":
        projection = reading.convert({"projection_dim": 512} | raw, Projection, source).projection_dim
    elif written[0] == "CLIPVisionModelWithProjection":
        projection = read.projection_dim
    clip, siglip = family == "clip", family == "siglip"
    pooling = "class" if clip else "attention" if siglip and read.vision_use_head else "none"
    return checked(
        ViTConfig,
        source,
        height=read.image_size,
        width=read.image_size,
        patch=read.patch_size,
        dim=read.hidden_size,
        layers=read.num_hidden_layers,
        heads=read.num_attention_heads,
        channels=read.num_channels,
        hidden=read.intermediate_size,
        class_token=not siglip,
        pooling=pooling,
        activation=ACTIVATIONS[read.hidden_act],
        patch_bias=not clip,
        pre_norm=clip,
        projection=projection,
        norm_eps=read.layer_norm_eps,
    )


class Projection(msgspec.Struct):
    """The key of a whole CLIP's config.json that its encoder alone lacks."""

    projection_dim: Size


class Towers(msgspec.Struct):
    """The vision part of a whole model's config.json. Old files repeat it in `vision_config_dict`, which prevails."""

    vision_config: dict[str, Any] | None = None
    vision_config_dict: dict[str, Any] | None = None


def of_whole(raw: dict[str, Any], source: object) -> dict[str, Any]:
    """The keys of the encoder in the config.json of a whole model."""
    towers = reading.convert(raw, Towers, source)
    found = towers.vision_config if towers.vision_config_dict is None else towers.vision_config_dict
    return found or {}


def own_name(theirs: str) -> str:
    """`vision_model.encoder.layers.3.mlp.fc1.weight` → `blocks.3.mlp.up.weight`; a name that it does not know stays as
    it is."""
    name = theirs.removeprefix("vision_model.")
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    name = name.replace("encoder.layers.", "blocks.", 1) if name.startswith("encoder.layers.") else name
    begin, split = ("pool", name.removeprefix("head.")) if name.startswith("head.") else ("", "")
    if not begin:
        first, number, split = ([*name.split(".", 2), "", ""])[:3]
        begin = f"{first}.{number}" if first == "blocks" else ""
    part, _, leaf = split.replace("in_proj_", "in_proj.").rpartition(".")
    return f"{begin}.{PARTS[part]}.{leaf}" if begin and part in PARTS else theirs


def own_tensors(
    pairs: Iterable[tuple[str, Tensor]], config: ViTConfig, whole: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """The encoder's tensors of a folder under this project's names; of a `whole` model the others are passed over. A
    tensor of a wrong shape stays as it is: whoever fills the model with it refuses it."""
    shapes = {
        "patch.weight": (config.dim, config.channels, config.patch, config.patch),
        "pool.probe": (1, 1, config.dim),
        "class_token": (1, 1, config.dim),  # EVA
        "positions": (1, config.grid[0] * config.grid[1] + config.class_token, config.dim),  # EVA
    }
    for theirs, tensor in pairs:
        if whole and not theirs.startswith(("vision_model.", "visual_projection.")):
            continue
        if theirs.endswith(".position_ids"):  # the numbers 0, 1, 2, …
            continue
        name = own_name(theirs)
        if tuple(tensor.shape) == shapes.get(name):
            tensor = tensor.flatten(1) if name == "patch.weight" else tensor.reshape(-1, config.dim).squeeze(0)
        owner, _, leaf = name.rpartition(".")
        if owner.endswith("attn.qkv") and tensor.dim() and len(tensor) == 3 * config.dim:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                yield f"{owner.removesuffix('qkv')}{part}.{leaf}", rows
        else:
            yield name, tensor
