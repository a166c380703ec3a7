"""BLIP-2 in the names of transformers: Blip2ForImageTextRetrieval (first stage), Blip2ForConditionalGeneration
(second), and Blip2QFormerModel alone.

A run's folder holds the Q-Former, which Blip2QFormerModel opens, and its heads in another file: a Blip2VisionModel can
be an EVA encoder of square RGB images only. `save_whole` writes the whole model where the encoder is one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from finetune.errors import UserError
from finetune.lm.io import hf_llama, hub, weights
from finetune.lm.io.config import Depth, Size, checked, read_json, require
from finetune.lm.llama import Llama
from finetune.runs import checkpoint, reading
from finetune.vision import load as vision
from finetune.vision.vit import ViT, ViTConfig

from .model import QFormerConfig, Stage1, Stage2

RETRIEVAL, GENERATION = "Blip2ForImageTextRetrieval", "Blip2ForConditionalGeneration"
HEADS = "heads.safetensors"
# Ours → theirs.
ATTENTION = {"q": "attention.query", "k": "attention.key", "v": "attention.value", "o": "output.dense",
             "norm": "output.LayerNorm"}  # fmt: skip
PARTS = {
    **{f"attn.{a}": f"attention.{b}" for a, b in ATTENTION.items()},
    **{f"cross.{a}": f"crossattention.{b}" for a, b in ATTENTION.items()},
    **{
        f"{kind}_mlp.{part}": f"{name}{'_query' if kind == 'query' else ''}.{leaf}"
        for kind in ("query", "text")
        for part, name, leaf in (("up", "intermediate", "dense"), ("down", "output", "dense"),
                                 ("norm", "output", "LayerNorm"))
    },
}  # fmt: skip
TOP = {
    "qformer.queries": "query_tokens",
    "qformer.words.weight": "embeddings.word_embeddings.weight",
    "qformer.places.weight": "embeddings.position_embeddings.weight",
    **{f"qformer.norm.{leaf}": f"qformer.layernorm.{leaf}" for leaf in ("weight", "bias")},
    **{f"{ours}.{leaf}": f"{theirs}.{leaf}"
       for ours, theirs in (("image_projection", "vision_projection"), ("text_projection", "text_projection"),
                            ("match", "itm_head"), ("projection", "language_projection"))
       for leaf in ("weight", "bias")},
}  # fmt: skip
# What transformers has no place for, in LAVIS's names: ITC's temperature, and the head that writes.
OWN = {
    "temperature": "temp",
    **{f"write.{leaf}": f"cls.predictions.transform.dense.{leaf}" for leaf in ("weight", "bias")},
    **{f"write_norm.{leaf}": f"cls.predictions.transform.LayerNorm.{leaf}" for leaf in ("weight", "bias")},
    "write_bias": "cls.predictions.bias",
}
EVA = {"attn_norm": "layer_norm1", "attn.o": "self_attn.projection", "mlp_norm": "layer_norm2", "mlp.up": "mlp.fc1",
       "mlp.down": "mlp.fc2"}  # fmt: skip


class QFormerFile(msgspec.Struct):
    """The keys of a Blip2QFormerConfig; the defaults are transformers'."""

    vocab_size: Size = 30522
    hidden_size: Size = 768
    num_hidden_layers: Depth = 12
    num_attention_heads: Size = 12
    intermediate_size: Size = 3072
    hidden_act: str = "gelu"
    max_position_embeddings: Size = 512
    layer_norm_eps: reading.Positive = 1e-12
    cross_attention_frequency: Size = 2
    encoder_hidden_size: Size = 1408
    use_qformer_text_input: bool = False


class Whole(msgspec.Struct):
    """The keys of a Blip2Config that a Q-Former depends on."""

    qformer_config: dict[str, Any] = {}
    text_config: dict[str, Any] = {}
    num_query_tokens: Size = 32
    image_text_hidden_size: Size = 256


def theirs_of(ours: str) -> str:
    """`qformer.blocks.1.cross.q.weight` → `qformer.encoder.layer.1.crossattention.attention.query.weight`."""
    if ours in TOP or ours in OWN:
        return (TOP | OWN)[ours]
    _, _, number, part = ours.split(".", 3)
    part, _, leaf = part.rpartition(".")
    return f"qformer.encoder.layer.{number}.{PARTS[part]}.{leaf}"


def qformer_config(c: QFormerConfig) -> dict[str, Any]:
    """The Blip2QFormerConfig of a shape."""
    found = QFormerFile(
        c.vocab_size or 30522, c.dim, c.layers, c.heads, c.hidden, "gelu", c.max_length, c.norm_eps, c.every,
        c.image_dim, bool(c.vocab_size),
    )  # fmt: skip
    return {"model_type": "blip_2_qformer", **msgspec.to_builtins(found)}


def read_qformer_config(raw: dict[str, Any], queries: int, projection: int, source: object) -> QFormerConfig:
    """The shape of a Blip2QFormerConfig. UserError names what is not supported. Dropout, a setting of training, is
    ignored."""
    read = reading.convert(raw, QFormerFile, source)
    require(raw, source, {"hidden_act": ("gelu",), "chunk_size_feed_forward": (0,)})
    return checked(
        QFormerConfig, source, image_dim=read.encoder_hidden_size, dim=read.hidden_size, layers=read.num_hidden_layers,
        heads=read.num_attention_heads, queries=queries, every=read.cross_attention_frequency,
        hidden=read.intermediate_size, vocab_size=read.vocab_size if read.use_qformer_text_input else 0,
        max_length=read.max_position_embeddings, projection=projection, norm_eps=read.layer_norm_eps,
    )  # fmt: skip


def named(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of a Stage1 or Stage2 in their names."""
    found = {theirs_of(name): p.detach() for name, p in model.named_parameters()}
    found["query_tokens"] = found["query_tokens"][None]
    return found


def own(pairs: Iterable[tuple[str, Tensor]], kind: type[Stage1] | type[Stage2], shape: QFormerConfig) -> Iterator[
    tuple[str, Tensor]
]:  # fmt: skip
    """The tensors in our names. transformers' folders lack those of `OWN`: they begin as in a new model."""
    with torch.device("meta"):
        skeleton = kind(shape) if kind is Stage1 else Stage2(shape, 1)
    ours = {theirs_of(name): name for name, _ in skeleton.named_parameters()}
    left = {OWN[name]: name for name in OWN} if kind is Stage1 else {}
    for theirs, tensor in pairs:
        if theirs == "embeddings.position_ids":  # the numbers 0, 1, 2, …
            continue
        left.pop(theirs, None)
        yield ours.get(theirs, theirs), tensor[0] if theirs == "query_tokens" and tensor.dim() == 3 else tensor
    if left:
        fresh = dict(Stage1(shape).named_parameters())
        for name in left.values():
            yield name, fresh[name].detach()


# --- A run's folder


def save(model: Stage1 | Stage2, folder: Path) -> None:
    """The Q-Former as Blip2QFormerModel opens it, and the heads; each file whole or not at all."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in named(model).items()}
    shape = model.qformer.config
    with checkpoint.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    heads = {"num_query_tokens": shape.queries, "image_text_hidden_size": shape.projection}
    raw = {"architectures": ["Blip2QFormerModel"], **qformer_config(shape), "torch_dtype": "float32", **heads}
    checkpoint.write_json(folder / "config.json", raw)
    core = {name.removeprefix("qformer."): t for name, t in tensors.items() if name.startswith("qformer.")}
    checkpoint.write_tensors(folder / "model.safetensors", core, {"format": "pt"})
    rest = {name: t for name, t in tensors.items() if not name.startswith("qformer.")}
    checkpoint.write_tensors(folder / HEADS, rest, {"format": "pt"})


def load(kind: type[Stage1] | type[Stage2], folder: Path) -> Any:
    """The Stage1 or Stage2 that `save` wrote. UserError names the file that cannot be read."""
    raw = read_json(folder / "config.json")
    require(raw, folder / "config.json", {"model_type": ("blip_2_qformer",)})
    read = reading.convert(raw, Whole, folder / "config.json")
    shape = read_qformer_config(raw, read.num_query_tokens, read.image_text_hidden_size, folder / "config.json")
    pairs = [(f"qformer.{name}", t.clone()) for name, t in weights.read_safetensors(folder)]
    pairs += [(name, t.clone()) for name, t in weights.read_file(folder / HEADS)]
    return assembled(kind, shape, pairs, folder)


def assembled(
    kind: type[Stage1] | type[Stage2], shape: QFormerConfig, pairs: list[tuple[str, Tensor]], source: object
) -> Any:
    """A Stage1 or Stage2 of these tensors; the language model's width is that of its projection."""
    if kind is Stage1 and not shape.vocab_size:
        raise UserError(f"{source}: use_qformer_text_input is false: a Q-Former without text compares nothing")
    width = next((len(t) for name, t in pairs if name == "language_projection.weight" and t.dim() == 2), 1)
    with torch.device("meta"):
        model = Stage1(shape) if kind is Stage1 else Stage2(shape, width)
    weights.fill(model, own(pairs, kind, shape), torch.float32, source)
    return model.eval()


# --- Whole models


def read_whole(path: str | Path, dtype: torch.dtype = torch.float32) -> tuple[ViT, Any, Llama | None]:
    """(encoder, Stage1, None) of a folder of Blip2ForImageTextRetrieval, or (encoder, Stage2, language model) of one of
    Blip2ForConditionalGeneration. UserError names what is missing, damaged or not supported: of the language models
    those that the project has not (OPT, T5)."""
    folder = hub.resolve(path)
    source = folder / "config.json"
    raw = read_json(source)
    encoder = vision.vit(folder, dtype)
    kind = (raw.get("architectures") or [GENERATION])[0]
    require({"architectures": kind}, source, {"architectures": (GENERATION, RETRIEVAL)})
    read = reading.convert(raw, Whole, source)
    inner = {**read.qformer_config, "encoder_hidden_size": encoder.config.dim}
    shape = read_qformer_config(inner, read.num_query_tokens, read.image_text_hidden_size, source)
    pairs = {name: t.clone() for name, t in weights.read_safetensors(folder) if not name.startswith("vision_model.")}
    if kind == RETRIEVAL:
        return encoder, assembled(Stage1, shape, list(pairs.items()), folder), None
    require(raw, source, {"use_decoder_only_language_model": (True,)})
    language_shape = hf_llama.read_config({"model_type": "opt"} | read.text_config, source)
    prefix = "language_model."
    language = {name.removeprefix(prefix): pairs.pop(name) for name in list(pairs) if name.startswith(prefix)}
    model = weights.assemble(
        Llama, language_shape, hf_llama.own_tensors(language.items(), language_shape), dtype, folder
    )
    return encoder, assembled(Stage2, shape, list(pairs.items()), folder), model


def vision_config(c: ViTConfig) -> dict[str, Any]:
    """The Blip2VisionConfig of an encoder. UserError names what such a one cannot be."""
    only = {"height": (c.width,), "channels": (3,), "class_token": (True,), "positions": ("learned",),
            "patch_bias": (True,), "pre_norm": (False,), "activation": ("gelu", "quick_gelu", "gelu_tanh")}  # fmt: skip
    for name, wanted in only.items():
        if getattr(c, name) not in wanted:
            raise UserError(f"Blip2VisionModel has no place for an encoder with {name} = {getattr(c, name)}: "
                            f"it needs {wanted[0]}")  # fmt: skip
    activation = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_tanh": "gelu_pytorch_tanh"}[c.activation]
    return {"model_type": "blip_2_vision_model", "hidden_size": c.dim, "intermediate_size": c.hidden,
            "num_hidden_layers": c.layers, "num_attention_heads": c.heads, "image_size": c.height,
            "patch_size": c.patch, "hidden_act": activation, "layer_norm_eps": c.norm_eps,
            "qkv_bias": True}  # fmt: skip


def vision_tensors(encoder: ViT) -> Iterator[tuple[str, Tensor]]:
    """The encoder in the names of Blip2VisionModel; its queries, keys and values are one layer."""
    c, ours = encoder.config, {name: p.detach() for name, p in encoder.named_parameters()}
    yield "embeddings.class_embedding", ours["class_token"].reshape(1, 1, -1)
    yield "embeddings.position_embedding", ours["positions"][None]
    yield "embeddings.patch_embedding.weight", ours["patch.weight"].reshape(c.dim, c.channels, c.patch, c.patch)
    yield "embeddings.patch_embedding.bias", ours["patch.bias"]
    for leaf in ("weight", "bias"):
        yield f"post_layernorm.{leaf}", ours[f"norm.{leaf}"]
        for i in range(c.layers):
            of, to = f"blocks.{i}", f"encoder.layers.{i}"
            yield f"{to}.self_attn.qkv.{leaf}", torch.cat([ours[f"{of}.attn.{name}.{leaf}"] for name in "qkv"])
            for a, b in EVA.items():
                yield f"{to}.{b}.{leaf}", ours[f"{of}.{a}.{leaf}"]


def save_whole(
    encoder: ViT, model: Stage1 | Stage2, folder: Path, language: Llama | None = None, image_token: int = -1
) -> None:
    """A folder that Blip2ForImageTextRetrieval, or with a language model Blip2ForConditionalGeneration, opens.

    image_token: the id that stands for a query in their prompts, −1 for the last one; a prompt has it nowhere else.
    UserError names what a Blip2VisionModel cannot be."""
    if (language is None) != isinstance(model, Stage1):
        raise UserError("the second stage is saved with its language model, the first without one")
    shape, prefix = replace(model.qformer.config), "vision_model."
    tensors = {name: t for name, t in named(model).items() if name not in OWN.values()}
    tensors |= {prefix + name: t for name, t in vision_tensors(encoder)}
    raw: dict[str, Any] = {
        "architectures": [RETRIEVAL if language is None else GENERATION],
        "model_type": "blip-2",
        "vision_config": vision_config(encoder.config),
        "qformer_config": qformer_config(shape),
        "num_query_tokens": shape.queries,
        "image_text_hidden_size": shape.projection,
        "torch_dtype": "float32",
    }
    if language is not None:
        raw["image_token_index"] = image_token % language.config.vocab_size
        raw["text_config"] = hf_llama.write_config(language.config, torch.float32)
        tensors |= {f"language_model.{name}": t.detach() for name, t in hf_llama.hf_tensors(language)}
    with checkpoint.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(folder / "config.json", raw)
    whole = {name: t.cpu().contiguous() for name, t in tensors.items()}
    checkpoint.write_tensors(folder / "model.safetensors", whole, {"format": "pt"})
