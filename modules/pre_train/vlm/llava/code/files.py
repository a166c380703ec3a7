"""LLaVA's folders as transformers writes and opens them (LlavaForConditionalGeneration), both ways."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import tokenizers
import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.data.image_rows import PLACEHOLDER
from finetune.errors import UserError
from finetune.lm.io import hf_llama, hf_tokenizer, hub, weights
from finetune.lm.io.config import checked, read_json, require
from finetune.lm.io.load import read_token_ids
from finetune.lm.tokenizer import Tokenizer
from finetune.runs import checkpoint, reading
from finetune.vision import load, save
from finetune.vision.vit import ViTConfig

from .model import Llava, LlavaConfig, Projector

ONLY = {
    "projector_hidden_act": ("gelu",),
    "multimodal_projector_bias": (True,),
    "vision_feature_select_strategy": ("default", "full"),
    "quantization_config": (None,),
}
CLIP_L = {  # transformers' encoder where the file names no size
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14,
}  # fmt: skip


class HFConfig(msgspec.Struct):
    """The keys of a LLaVA's config.json that are not its parts'."""

    vision_config: dict[str, Any]
    text_config: dict[str, Any]
    image_token_index: reading.Index | None = None
    image_token_id: reading.Index | None = None  # the later name
    vision_feature_layer: int = -2
    vision_feature_select_strategy: str = "default"
    columns: reading.Index = 0  # ours: transformers has no such pooling
    tie_word_embeddings: bool = False


def read_config(raw: dict[str, Any], source: object) -> LlavaConfig:
    """The shape that a config.json describes; UserError names the key that is missing or not supported."""
    if raw.get("model_type") != "llava":
        raise UserError(f"{source}: model_type = {raw.get('model_type')!r} is not supported (only llava)")
    require(raw, source, ONLY)
    if isinstance(raw.get("vision_feature_layer"), list):
        raise UserError(f"{source}: vision_feature_layer names several layers: only one is supported")
    read = reading.convert(raw, HFConfig, source)
    token = read.image_token_id if read.image_token_index is None else read.image_token_index
    if token is None:
        raise UserError(f"{source}: image_token_index is missing")
    vision = {"model_type": "clip_vision_model"} | read.vision_config
    if vision["model_type"] == "clip_vision_model":
        vision = CLIP_L | vision
    vision.pop("architectures", None)  # of the model that the encoder was taken from
    text = {"model_type": "llama"} | read.text_config | {"tie_word_embeddings": read.tie_word_embeddings}
    return checked(
        LlavaConfig,
        source,
        vision=load.read_config(vision, f"{source}, vision_config"),
        text=hf_llama.read_config(text, f"{source}, text_config"),
        image_token=token,
        layer=read.vision_feature_layer,
        class_token=read.vision_feature_select_strategy == "full",
        columns=read.columns,
    )


def write_config(config: LlavaConfig, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The config.json that transformers reads. UserError if the encoder or language model has a field without a key."""
    vision = save.write_config(config.vision, dtype)
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "vision_config": {key: value for key, value in vision.items() if key != "architectures"},
        "text_config": hf_llama.write_config(config.text, dtype),
        "image_token_index": config.image_token,
        "image_seq_length": config.each,
        "vision_feature_layer": config.layer,
        "vision_feature_select_strategy": "full" if config.class_token else "default",
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "tie_word_embeddings": config.text.tied,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **({"columns": config.columns} if config.columns else {}),
    }


def own_tensors(pairs: Iterable[tuple[str, Tensor]], config: LlavaConfig) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a folder under this project's names."""
    for theirs, tensor in pairs:
        name = theirs.removeprefix("model.")
        part, _, rest = name.partition(".")
        if part == "vision_tower":
            for own, each in load.own_tensors([(rest, tensor)], config.vision):
                yield f"encoder.{own}", each
        elif part == "multi_modal_projector":
            yield f"projector.{rest}", tensor
        elif part == "language_model" or name == "lm_head.weight":
            for own, each in hf_llama.own_tensors([(rest if part == "language_model" else name, tensor)], config.text):
                yield f"language.{own}", each
        else:
            yield theirs, tensor


def hf_tensors(model: Llava) -> Iterator[tuple[str, Tensor]]:
    """The parameters under the names that transformers writes."""
    for name, tensor in save.hf_tensors(model.encoder, ""):
        yield f"vision_tower.{name}", tensor
    for name, tensor in model.projector.named_parameters():
        yield f"multi_modal_projector.{name}", tensor
    for name, tensor in hf_llama.hf_tensors(model.language):
        yield f"language_model.{name}", tensor


def write(
    model: Llava,
    folder: str | Path,
    tokenizer: Tokenizer | None = None,
    images: dict[str, Any] | None = None,
) -> None:
    """Writes a folder that LlavaForConditionalGeneration and, with a tokenizer, LlavaProcessor open. The tokenizer's
    files get `<image>` as a token of its own; UserError if its number is not the model's image token. Where it lies
    behind the vocabulary, the tables get rows of zeros up to it, since transformers looks it up. images: the
    preprocessor_config.json that the encoder came with; by default that of `finetune.vision.pretrain.inputs`."""
    folder = Path(folder)
    ids = (tokenizer.token_ids() if tokenizer else {}) | model.language.token_ids
    rows = max(model.config.text.vocab_size, model.config.image_token + 1)
    shape = replace(model.config, text=replace(model.config.text, vocab_size=rows))
    config = write_config(shape, model.language.embed.weight.dtype)
    tensors = {name: with_rows(name, tensor, rows).detach().cpu().contiguous() for name, tensor in hf_tensors(model)}
    with checkpoint.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(folder / "config.json", config | ids)
    checkpoint.write_json(folder / "generation_config.json", {"_from_model_config": True} | ids)
    checkpoint.write_json(folder / "preprocessor_config.json", images or processor(model.config.vision))
    checkpoint.write_json(folder / "processor_config.json", {
        "processor_class": "LlavaProcessor", "image_token": PLACEHOLDER, "patch_size": model.config.vision.patch,
        "num_additional_image_tokens": int(model.config.vision.class_token),
        "vision_feature_select_strategy": config["vision_feature_select_strategy"],
    })  # fmt: skip
    if tokenizer is not None:
        hf_tokenizer.write(with_image(tokenizer, model.config.image_token), folder)
    checkpoint.write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})


def with_rows(name: str, tensor: Tensor, rows: int) -> Tensor:
    """A table of the vocabulary with zeros behind its rows; any other tensor as it is."""
    table = name.endswith(("embed_tokens.weight", "lm_head.weight"))
    return F.pad(tensor, (0, 0, 0, rows - len(tensor))) if table and len(tensor) < rows else tensor


def with_image(tokenizer: Tokenizer, token: int) -> Tokenizer:
    """A copy of the tokenizer that reads `<image>` as one token of the given number."""
    copy = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    if copy.token_to_id(PLACEHOLDER) is None:
        copy.add_special_tokens([tokenizers.AddedToken(PLACEHOLDER, special=True, normalized=False)])
    if (found := copy.token_to_id(PLACEHOLDER)) != token:
        raise UserError(f"the tokenizer gives {PLACEHOLDER} the number {found}, the model's image token is {token}")
    return Tokenizer(
        copy,
        bos=tokenizer.bos,
        eos=tokenizer.eos,
        pad=tokenizer.pad,
        chat_template=tokenizer.chat_template,
        others=tokenizer.others,
    )


def processor(config: ViTConfig) -> dict[str, Any]:
    """preprocessor_config.json of images of the encoder's size, in [−1, 1], padded with black to a square: what
    `finetune.vision.pretrain.inputs` does, in the words of transformers' LlavaImageProcessor."""
    size = {"height": config.height, "width": config.width}
    return {
        "image_processor_type": "LlavaImageProcessor", "do_pad": True, "background_color": [0, 0, 0],
        "do_resize": True, "size": size, "do_center_crop": False, "crop_size": size, "resample": 3,
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_convert_rgb": True,
    }  # fmt: skip


def read(path: str | Path, dtype: torch.dtype = torch.float32) -> Llava:
    """The model in a folder, or of a hub id."""
    folder = hub.resolve(path)
    raw = read_json(folder / "config.json")
    config = read_config(raw, folder / "config.json")
    model = weights.assemble(Llava, config, own_tensors(weights.read_safetensors(folder), config), dtype, folder)
    model.language.token_ids, model.language.generation_ids = read_token_ids(folder, raw)
    return model


def write_projector(projector: Projector, file: Path) -> None:
    """The projector alone, in the names of LLaVA's folders."""
    tensors = {f"multi_modal_projector.{name}": p.detach().contiguous() for name, p in projector.named_parameters()}
    checkpoint.write_tensors(file, tensors, {"format": "pt"})


def read_projector(projector: Projector, file: str | Path) -> None:
    """Puts the weights of a file into the projector. UserError for a tensor that is missing, strange or of another
    shape."""
    path = reading.home_path(file)
    found = {name.removeprefix("multi_modal_projector."): tensor for name, tensor in weights.read_file(path)}
    for name, parameter in projector.named_parameters():
        tensor = found.pop(name, None)
        if tensor is None or tensor.shape != parameter.shape:
            has = "no" if tensor is None else f"shape {tuple(tensor.shape)} for"
            raise UserError(f"{path} has {has} {name}; the projector's is {tuple(parameter.shape)}")
        parameter.data.copy_(tensor)
    if found:
        raise UserError(f"{path} holds {next(iter(found))}, which is no part of a projector")
