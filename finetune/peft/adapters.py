"""Adapter folders in peft's format, read and written: LoRA, rsLoRA, DoRA, PiSSA (finetune/peft/lora.py) with modules
that are held whole (finetune/peft/whole.py), prompts and prefixes (finetune/peft/virtual_tokens.py). A folder holds
adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import torch
from torch import Tensor, nn

from finetune.errors import UserError
from finetune.lm.io import save, weights
from finetune.lm.io.config import read_json, require
from finetune.lm.io.hf_llama import from_hf
from finetune.lm.io.load import ADAPTER_CONFIG as CONFIG
from finetune.lm.llama import Llama
from finetune.lm.tokenizer import Tokenizer
from finetune.peft import whole
from finetune.peft.adapter_modules import TABLES, Modules
from finetune.peft.lora import TARGETS, LoRA, LoRALinear, adapters, apply_lora, first_fit, linear_layers, merge, unmerge
from finetune.peft.virtual_tokens import Prefix, Prompt
from finetune.peft.whole import hf_module
from finetune.runs import checkpoint, reading

TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # what peft puts before a Hugging Face name
PARTS = {"lora_A.weight": "lora_A", "lora_B.weight": "lora_B", "lora_magnitude_vector": "magnitude"}
# Of a module that an adapter holds whole, or has changed otherwise. peft writes some weights twice: those of
# original_module and modules_to_save are there without these words too.
OTHERS = ("weight", "bias", "base_layer.weight", "base_layer.bias", "token_adapter.base_layer.weight",
          "token_adapter.trainable_tokens_delta", "lora_embedding_A", "lora_embedding_B")  # fmt: skip
TWICE = ("original_module.weight", "original_module.bias", "modules_to_save.weight", "modules_to_save.bias")
VECTORS = "prompt_embeddings"
# The kinds of adapter folders that are read, by peft's name.
KINDS = {
    "LORA": "LoRA, rsLoRA, DoRA, PiSSA, with modules_to_save, a resized vocabulary, trained tokens, biases",
    "PROMPT_TUNING": "prompt tuning: trained embeddings before every text",
    "PREFIX_TUNING": "prefix tuning: trained keys and values in every layer, without projection",
}
Rank = Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]


class LoRAConfig(msgspec.Struct):
    """The keys of adapter_config.json that are read; for those of `UNSUPPORTED` only some values are accepted."""

    r: Rank
    lora_alpha: reading.Positive
    lora_dropout: Annotated[float, msgspec.Meta(ge=0, lt=1)] | None = 0.0
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, reading.Positive] | None = None
    use_rslora: bool | None = False
    use_dora: bool | None = False
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None


def kind(folder: str | Path) -> str:
    """Which of KINDS the adapter in this folder is. UserError if it is none of them."""
    found = read_json(Path(folder) / CONFIG).get("peft_type")
    if not isinstance(found, str) or found not in KINDS:
        raise UserError(f"{Path(folder) / CONFIG}: peft_type is {found!r}; those that can be read: {', '.join(KINDS)}")
    return found


@dataclass(frozen=True)
class Description:
    """What an adapter folder trains: the usual rank and alpha, the layers by the last part of their names, the modules
    that it holds whole; the rows of embedding or head if it holds them, and whether it holds the same for both."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    kind: Literal["lora", "dora", "pissa"] = "lora"
    whole: tuple[str, ...] = ()
    rows: int = 0
    joint: bool = False


def describe(folder: str | Path) -> Description:
    """The shape of a LoRA adapter, from its configuration and the names of its tensors."""
    folder = Path(folder)
    if (found := kind(folder)) != "LORA":
        raise UserError(f"{folder / CONFIG}: peft_type is {found!r}: only LoRA adapters are trained further")
    raw = read_json(folder / CONFIG)
    config = reading.convert(raw, LoRAConfig, folder / CONFIG)
    names: set[str] = set()
    held: dict[str, Tensor] = {}
    for key, tensor in weights.read_safetensors(folder, TENSORS):
        at, part = adapted(key, folder)
        if part == "lora_A.weight":
            names.add(at.rpartition(".")[2])
        elif part == "weight":
            held[at] = tensor
    saved = tuple(config.modules_to_save or ())
    tables = [held[at] for at in TABLES if at in held]
    return Description(
        config.r,
        config.lora_alpha,
        tuple(sorted(names, key=order)),
        "dora" if config.use_dora else "pissa" if raw.get("init_lora_weights") == "pissa" else "lora",
        tuple(at for at in held if hf_module(at).endswith(saved)) if saved else (),
        len(tables[0]) if tables else 0,
        len(tables) == 2 and torch.equal(*tables),
    )


def order(target: str) -> int:
    """The place of a target in the usual order."""
    return TARGETS.index(target) if target in TARGETS else len(TARGETS)


def save_trained(
    model: Llama, tokenizer: Tokenizer, folder: str | Path, base: str | None, name: str = "default"
) -> None:
    """What a run trained, with the tokenizer: the adapter as `save_adapter` writes it, of the base model found at
    `base`; without one the whole model, the active adapters merged, as transformers opens it. `model` is left as it
    is."""
    if base is not None:
        save_adapter(model, folder, base, name)
        save.tokenizer(tokenizer, folder)
        return
    merge(model, keep=True)
    save.model(model, folder, tokenizer)
    unmerge(model)


def save_adapter(model: nn.Module, folder: str | Path, base: str = "", name: str = "default") -> None:
    """Writes a Llama's adapter as peft.PeftModel.from_pretrained opens it. `base`: where the base model is found.

    PiSSA is written as LoRA of twice the rank, B A − B₀ A₀. peft can also have the folder say "pissa" and take the base
    apart again, but where two singular values are close the parts depend on the last bit of the weights.
    """
    layers = {at: plain_lora(layer.part(name)) for at, layer in adapters(model) if name in layer.parts}
    if not layers:
        raise UserError(f"the model has no adapter '{name}' to save")
    first = next(iter(layers.values()))
    ranks = Counter(part.rank for part in layers.values())
    alphas = Counter(part.alpha for part in layers.values())
    (rank, _), (alpha, _) = ranks.most_common(1)[0], alphas.most_common(1)[0]
    tensors = {
        f"{PREFIX}{hf_module(at)}.{theirs}": tensor
        for at, part in layers.items()
        for theirs, mine in PARTS.items()
        if (tensor := getattr(part, mine)) is not None
    }
    plain = {at for at, m in linear_layers(model).items() if not (isinstance(m, LoRALinear) and name in m.parts)}
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {hf_module(at): part.rank for at, part in layers.items() if part.rank != rank},
        "alpha_pattern": {hf_module(at): part.alpha for at, part in layers.items() if part.alpha != alpha},
        "lora_dropout": first.dropout,
        "target_modules": sorted(shortest(set(layers), plain)),
        **saved_whole(model, name, tensors),
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": first.rslora,
        "use_dora": first.magnitude is not None,
    }
    write(Path(folder), config, tensors, base)


def saved_whole(model: nn.Module, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Adds the modules that the adapter holds whole to the tensors of its file; returns what its configuration says of
    them. An embedding that the head shares is written as both, which peft holds apart."""
    state = whole.kept(model)
    modules, saved, bias = state.parts.get(name, {}), set(), "none"
    for at, module in modules.items():
        layer, inner = (at.removesuffix(".base"), "base_layer.") if at.endswith(".base") else (at, "")
        base = dict(state.base[at].named_parameters(recurse=False))
        for key, tensor in module.named_parameters(recurse=False):
            if key == "weight" and tensor is not base["weight"]:
                saved.add(hf_module(layer, model))
            if tensor is not base[key]:
                tensors[f"{PREFIX}{hf_module(layer, model)}.{inner}{key}"] = tensor
                bias = "all" if key == "bias" else bias
        if at == "embed" and isinstance(model, Llama) and model.config.tied:
            saved.add("lm_head")
            tensors[f"{PREFIX}lm_head.weight"] = model.head_weight
    named = sorted("embed_tokens" if at == "model.embed_tokens" else at for at in saved)
    return {"bias": bias, "modules_to_save": named or None}


@torch.no_grad()
def plain_lora(part: LoRA) -> LoRA:
    """The same change of W without what PiSSA started from: the part itself, or a copy of twice the rank."""
    if part.start_A is None or part.start_B is None:
        return part
    made = copy.copy(part)
    made.rank = 2 * part.rank
    made.alpha = part.scale * (math.sqrt(made.rank) if made.rslora else made.rank)
    made._parameters = {
        "lora_A": nn.Parameter(torch.cat([part.lora_A, part.start_A])),
        "lora_B": nn.Parameter(torch.cat([part.lora_B, -part.start_B], 1)),
        "magnitude": part.magnitude,
    }
    return made


def save_prompt(model: Llama, part: Prompt | Prefix, folder: str | Path, base: str = "") -> None:
    """Writes a trained prompt or prefix as peft.PeftModel.from_pretrained opens it."""
    shape, prefix = model.config, isinstance(part, Prefix)
    config = {
        "peft_type": "PREFIX_TUNING" if prefix else "PROMPT_TUNING",
        "num_virtual_tokens": len(part.vectors),
        "token_dim": shape.kv_heads * shape.head_dim if prefix else shape.dim,
        "num_transformer_submodules": 1,
        "num_attention_heads": shape.kv_heads if prefix else shape.heads,
        "num_layers": shape.layers,
        **({"encoder_hidden_size": shape.dim, "prefix_projection": False} if prefix else {}),
    }
    write(Path(folder), config, {VECTORS: part.vectors}, base)


def write(folder: Path, config: dict[str, Any], tensors: Mapping[str, Tensor], base: str) -> None:
    """Writes the two files of an adapter folder."""
    config = {"task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True, **config}
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if len({tensor.data_ptr() for tensor in own.values()}) < len(own):  # the format has no shared tensors
        own = {name: tensor.clone() for name, tensor in own.items()}
    with checkpoint.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write_tensors(folder / TENSORS, own, {"format": "pt"})
    checkpoint.write_json(folder / CONFIG, config)


@dataclass(frozen=True)
class Held:
    """What the folder of a LoRA adapter holds: its configuration; the tensors by layer and LoRA's name for them, with
    each layer's rank and alpha; others by module and `OTHERS`. The tensors live in the mapped file."""

    config: LoRAConfig
    pissa: bool
    tensors: dict[tuple[str, str], Tensor]
    others: dict[str, dict[str, Tensor]]
    ranks: dict[str, int]
    alphas: dict[str, float]


def read_lora(folder: Path, post_norms: bool = False) -> Held:
    """Reads the folder of a LoRA adapter, for a model with norms after attention and MLP too or without. UserError
    names what is missing, damaged, or a variant that is not supported."""
    raw = read_json(folder / CONFIG)
    init = raw.get("init_lora_weights")
    if isinstance(init, str) and init not in UNSUPPORTED["init_lora_weights"]:
        raise UserError(
            f"{folder / CONFIG}: init_lora_weights = {init!r} changed the base weights when training began, and the "
            "folder does not hold them: save the adapter as plain LoRA (peft: path_initial_model_for_weight_conversion)"
        )
    if (found := kind(folder)) != "LORA":
        raise UserError(
            f"{folder / CONFIG}: peft_type is {found!r}, which puts trained tokens before the text and changes no "
            "weights: it cannot be merged, only generated with"
        )
    require(raw, folder / CONFIG, UNSUPPORTED)
    config = reading.convert(raw, LoRAConfig, folder / CONFIG)
    tensors: dict[tuple[str, str], Tensor] = {}
    others: dict[str, dict[str, Tensor]] = {}
    for key, tensor in weights.read_safetensors(folder, TENSORS):
        at, part = adapted(key, folder, post_norms)
        if not tensor.isfinite().all():
            raise UserError(f"{folder}: tensor {key} holds NaN or infinite numbers")
        if part in PARTS:
            tensors[at, PARTS[part]] = tensor
        elif part not in TWICE:
            others.setdefault(at, {})[part] = tensor
    if not tensors and not others:
        raise UserError(f"{folder / TENSORS} holds no tensors")
    targets = sorted({at for at, _ in tensors})
    ranks = {at: first_fit(config.rank_pattern or {}, hf_module(at), config.r) for at in targets}
    alphas = {at: first_fit(config.alpha_pattern or {}, hf_module(at), config.lora_alpha) for at in targets}
    for at in targets:  # before anything of that size is made
        down = tensors.get((at, "lora_A"))
        if down is None or down.dim() != 2 or len(down) != ranks[at]:
            got = "missing" if down is None else f"{tuple(down.shape)} instead of ({ranks[at]}, …)"
            raise UserError(f"{folder}: lora_A of {at} is {got}: is it an adapter of this model?")
    return Held(config, init == "pissa", tensors, others, ranks, alphas)


def load_adapter(model: nn.Module, folder: str | Path, name: str = "default", train: bool = False) -> None:
    """Puts the LoRA adapter of a peft folder on a Llama and makes it the active one. UserError names what is missing,
    damaged, of another model, or a variant that is not supported; with `train` also what can be read only.

    A module that the adapter holds whole takes the place of the base's, also with another number of rows. Tokens that
    were trained alone, LoRA of an embedding and biases become such modules too.
    """
    folder = Path(folder)
    held = read_lora(folder, whole.has_post_norms(model))
    config, tensors, ranks, alphas = held.config, held.tensors, held.ranks, held.alphas
    targets = list(ranks)
    modules = Modules(model, folder, config, held.others)
    known = linear_layers(model)
    for at in targets:
        if at not in known and not (at == "head" and modules.tied):
            raise UserError(f"{folder}: the adapter is for a layer {at}, which this model does not have")
    if "head" in modules.values and "head" in targets:  # LoRA of a head with more rows
        modules.merge_head(tensors, alphas["head"] / (ranks["head"] ** (0.5 if config.use_rslora else 1)))
        targets.remove("head")
    modules.check(train, adapts_head="head" in targets)
    apply_lora(
        model,
        config.r,
        config.lora_alpha,
        0.0 if "head" in targets else config.lora_dropout or 0.0,
        [re.escape(at) for at in targets],
        name=name,
        rslora=bool(config.use_rslora),
        dora=bool(config.use_dora),
        pissa=held.pissa,
        rank_pattern={re.escape(at): ranks[at] for at in targets},
        alpha_pattern={re.escape(at): alphas[at] for at in targets},
    )
    for at, layer in list(adapters(model)):
        if at in targets:
            fill(layer.part(name), at, tensors, folder)
    modules.put(name)


def fill(part: LoRA, at: str, tensors: Mapping[tuple[str, str], Tensor], folder: Path) -> None:
    """Copies the tensors of layer `at` into the adapter. UserError if one is missing or wrongly shaped."""
    for key in PARTS.values():
        mine, given = getattr(part, key), tensors.get((at, key))
        if mine is not None:
            if given is None or given.shape != mine.shape:
                shape = "missing" if given is None else f"{tuple(given.shape)} instead of {tuple(mine.shape)}"
                raise UserError(f"{folder}: {key} of {at} is {shape}: is it an adapter of this model?")
            mine.data.copy_(given)


def load_prompt(model: Llama, folder: str | Path) -> Prompt | Prefix:
    """The prompt or prefix of a peft folder, for this Llama."""
    folder, shape = Path(folder), model.config
    config, found_kind = read_json(folder / CONFIG), kind(folder)
    if found_kind == "LORA":
        raise UserError(f"{folder / CONFIG}: peft_type is 'LORA', not that of a prompt or prefix")
    require(config, folder / CONFIG, {"prefix_projection": (False,), "num_transformer_submodules": (1, None)})
    found = dict(weights.read_safetensors(folder, TENSORS))
    prefix = found_kind == "PREFIX_TUNING"
    width = 2 * shape.layers * shape.kv_heads * shape.head_dim if prefix else shape.dim
    vectors = found.get(VECTORS)
    if vectors is None or vectors.dim() != 2 or vectors.shape[1] != width:
        got = "missing" if vectors is None else f"{tuple(vectors.shape)} instead of (virtual tokens, {width})"
        raise UserError(f"{folder}: {VECTORS} is {got}: is it an adapter of this model?")
    if config.get("num_virtual_tokens", len(vectors)) != len(vectors):
        raise UserError(
            f"{folder}: num_virtual_tokens is {config['num_virtual_tokens']!r}, {VECTORS} has {len(vectors)}"
        )
    return (Prefix if prefix else Prompt)(vectors.float().clone())


UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "fan_in_fan_out": (False,),
    # Others change the base weights when they begin, in ways that the folder does not tell.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "pissa"),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None,),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
}


def shortest(chosen: set[str], plain: set[str]) -> set[str]:
    """Hugging Face names of the adapted layers: `q_proj` if every layer of that name is adapted, else whole names."""
    partly = {at.rpartition(".")[2] for at in plain}
    return {
        full if at.rpartition(".")[2] in partly else full.rpartition(".")[2]
        for at, full in ((at, hf_module(at)) for at in chosen)
    }


def adapted(key: str, folder: Path, post_norms: bool = False) -> tuple[str, str]:
    """`base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight` → (`blocks.3.attn.q`, `lora_A.weight`)."""
    parts = "|".join(re.escape(part) for part in (*PARTS, *OTHERS, *TWICE))
    match = re.fullmatch(re.escape(PREFIX) + rf"(.+?)\.({parts})", key)
    if not match:
        raise UserError(f"{folder}: tensor {key} is not one of a LoRA adapter")
    return from_hf(f"{match[1]}.weight", post_norms).removesuffix(".weight"), match[2]
