"""Models to GGUF files, which llama.cpp and what is built on it open.

What is going to be written is first read as gguf.py and gguf_tokenizer.py would read it: a difference to the model is
an error before the file is begun. Names and metadata: llama.cpp's converters (`conversion/*.py`).
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune.errors import UserError
from finetune.lm.io import gguf_rope, gguf_tokenizer, gguf_vocabulary
from finetune.lm.io.gguf import ARCHITECTURES, GGUFModel, gguf_name, permute, window_layers
from finetune.lm.io.gguf_file import TensorInfo
from finetune.lm.io.gguf_types import TYPES, Array, quantize
from finetune.lm.llama import Llama, LlamaConfig
from finetune.lm.tokenizer import Tokenizer, stop_ids
from finetune.runs import checkpoint, display

# What `finetune export --gguf` takes → ggml's type of the matrices, llama.cpp's number of such a file.
FORMATS: dict[str, tuple[str, int]] = {
    "f16": ("F16", 1),
    "bf16": ("BF16", 32),
    "q8_0": ("Q8_0", 7),
    "q4_0": ("Q4_0", 2),
    "q4_1": ("Q4_1", 3),
}
MARGIN = 64 << 20  # bytes that stay free on the disk


@dataclass(frozen=True)
class Part:
    """A tensor that is going to be written."""

    kind: str  # ggml's name of the type
    shape: tuple[int, ...]
    values: Callable[[], Array]  # fp32

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // TYPES[self.kind].weights * TYPES[self.kind].nbytes


class Planned(GGUFModel):
    """A file that is going to be written, as its reader will see it."""

    def __init__(self, path: Path, metadata: dict[str, Any], parts: dict[str, Part]) -> None:
        self.parts_by_name = parts
        infos = {name: TensorInfo(part.kind, part.shape, 0, part.nbytes, path) for name, part in parts.items()}
        super().__init__(path, (metadata, infos))

    def tensor(self, name: str) -> Array:
        return self.parts_by_name[name].values()


def write(
    model: Any,
    tokenizer: Tokenizer,
    path: Path,
    form: str,
    *,
    name: str = "",
    report: Callable[[int, dict[str, float]], None] | None = None,
) -> list[str]:
    """Writes a Llama and its tokenizer as a GGUF file of a form of FORMATS, whole or not at all; returns what the file
    cannot hold, a line each. `report` is called with the number of tensors written.

    Norms and biases stay fp32; a matrix whose rows are not whole blocks of the form is F16. With q4_0 and q4_1 the
    matrix that makes the logits is Q8_0, as it decides most (llama.cpp keeps more bits of it, too). UserError for a
    model or tokenizer that llama.cpp does not have, a weight that does not fit the form, and a full disk.
    """
    if not isinstance(model, Llama):
        raise UserError("GPT-2 is not written as GGUF: export a Llama, Mistral, Qwen, SmolLM or Gemma")
    config = model.config
    architecture = architecture_of(config)
    if architecture == "gemma2" and not config.tied:
        raise UserError("GGUF's gemma2 has no output matrix of its own: its logits are made by the embedding")
    metadata, notes = shape_metadata(config, architecture)
    scaling, factors = gguf_rope.metadata(config.rope_scaling, architecture, config.rope_theta, config.head_dim)
    vocabulary, more = gguf_vocabulary.metadata(tokenizer, config.vocab_size, stop_ids(model, tokenizer))
    metadata |= {"general.name": name or path.stem, "general.file_type": FORMATS[form][1]} | scaling | vocabulary
    if TYPES[FORMATS[form][0]].weights > 1:
        metadata["general.quantization_version"] = 2
    parts = model_parts(model, architecture, form)
    if factors is not None:
        parts = {gguf_rope.FREQS: Part("F32", factors.shape, lambda: factors)} | parts
    check(model, tokenizer, Planned(path, metadata, parts))
    need = sum(part.nbytes for part in parts.values())
    with checkpoint.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
    if free < need + MARGIN:
        raise UserError(
            f"{path} needs {display.size(need)}, {path.parent} has {display.size(free)} free: free some space, or "
            "choose another folder with --out"
        )
    with checkpoint.atomic_write(path) as temporary:
        write_file(temporary, architecture, metadata, parts, report)
    return notes + more


def architecture_of(config: LlamaConfig) -> str:
    """GGUF's name of a model's architecture."""
    names = {one.family: name for name, one in ARCHITECTURES.items()} | {"mistral": "llama"}
    if config.family not in names:
        raise UserError(f"models of type {config.family} are not written as GGUF (only {', '.join(names)})")
    return names[config.family]


def shape_metadata(config: LlamaConfig, name: str) -> tuple[dict[str, Any], list[str]]:
    """The metadata of a model's shape, and what of it llama.cpp passes over."""
    architecture, notes = ARCHITECTURES[name], []
    found: dict[str, Any] = {
        "block_count": config.layers,
        "context_length": config.max_length,
        "embedding_length": config.dim,
        "feed_forward_length": config.hidden,
        "vocab_size": config.vocab_size,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
    }
    if config.window and config.window_layers:
        everywhere = config.window_layers == tuple(range(config.layers))
        if architecture.pattern or (name == "llama" and everywhere):
            found["attention.sliding_window"] = config.window
        if architecture.pattern and config.window_layers != window_layers(architecture.pattern, config.layers):
            found["attention.sliding_window_pattern"] = [i in config.window_layers for i in range(config.layers)]
        if architecture.local_theta:
            found["rope.freq_base_swa"] = float(config.local_rope_theta or config.rope_theta)
        if name == "llama":
            notes.append(
                f"llama.cpp has no sliding window for this architecture: beyond {config.window} tokens it sees more "
                "than the model did"
            )
    if config.attention_softcap:
        found["attn_logit_softcapping"] = float(config.attention_softcap)
    if config.logit_softcap:
        found["final_logit_softcapping"] = float(config.logit_softcap)
    general = {"general.architecture": name, "general.type": "model"}
    return general | {f"{name}.{key}": value for key, value in found.items()}, notes


def model_parts(model: Llama, name: str, form: str) -> dict[str, Part]:
    """The tensors under GGUF's names."""
    config, architecture = model.config, ARCHITECTURES[name]
    logits = "embed.weight" if config.tied else "head.weight"
    parts = {}
    for ours, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        kind = "F32" if len(shape) < 2 else FORMATS[form][0]
        if kind in ("Q4_0", "Q4_1") and ours == logits:
            kind = "Q8_0"
        if shape[-1] % TYPES[kind].weights:
            kind = "F16"
        heads = 0
        if architecture.paired and ".attn.q." in ours:
            heads = config.heads
        elif architecture.paired and ".attn.k." in ours:
            heads = config.kv_heads
        add = 1 if config.norm_plus_one and ours.endswith("norm.weight") else 0

        def values(parameter: torch.Tensor = parameter, heads: int = heads, add: int = add) -> Array:
            array = parameter.detach().cpu().float().numpy()
            array = permute(array, heads) if heads else array
            return array + np.float32(add) if add else array

        parts[gguf_name(ours)] = Part(kind, shape, values)
    return parts


def check(model: Llama, tokenizer: Tokenizer, planned: Planned) -> None:
    """UserError if another model or another tokenizer would be read from the file."""
    ours, theirs = model.config, planned.llama_config()
    for field in dataclasses.fields(LlamaConfig):
        if field.name in ("family", "rope_scaling"):
            continue
        one, other = effective(ours, field.name), effective(theirs, field.name)
        same = math.isclose(one, other, rel_tol=1e-6) if isinstance(one, float) else one == other
        if not same:
            raise UserError(
                f"{field.name} = {one} cannot be written: GGUF's architecture {planned.name} has {other} there"
            )
    again = gguf_tokenizer.read(planned)
    for text in gguf_vocabulary.PROBES:
        if again.encode(text) != tokenizer.encode(text):
            raise UserError(f"the tokenizer cannot be written as GGUF: {text!r} would be read as other tokens")


def effective(config: LlamaConfig, name: str) -> Any:
    """A field's value with its defaults filled in."""
    windows = config.window and config.window_layers
    if name == "attention_scale":
        return config.attention_scale or config.head_dim**-0.5
    if name in ("window", "window_layers"):
        return getattr(config, name) if windows else None
    if name == "local_rope_theta":
        return (config.local_rope_theta or config.rope_theta) if windows else None
    return getattr(config, name)


def write_file(
    path: Path,
    architecture: str,
    metadata: dict[str, Any],
    parts: dict[str, Part],
    report: Callable[[int, dict[str, float]], None] | None,
) -> None:
    """Header, metadata and tensors, one at a time."""
    from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

    types = {
        bool: GGUFValueType.BOOL,
        int: GGUFValueType.UINT32,
        float: GGUFValueType.FLOAT32,
        str: GGUFValueType.STRING,
    }
    writer = GGUFWriter(path, architecture)
    try:
        for key, value in metadata.items():
            if isinstance(value, list):
                writer.add_array(key, value)
            elif key != "general.architecture":  # which the writer has put first
                writer.add_key_value(key, value, types[type(value)])
        for name, part in parts.items():
            kind = GGMLQuantizationType[part.kind]
            writer.add_tensor_info(name, part.shape, np.dtype(np.float32), part.nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, (name, part) in enumerate(parts.items(), 1):
            try:
                writer.write_tensor_data(quantize(part.values(), part.kind))
            except UserError as error:
                hint = "; bf16 holds them" if "too large" in str(error) else ""
                raise UserError(f"tensor {name} {error}{hint}") from None
            if report is not None:
                report(done, {})
    finally:
        writer.close()
