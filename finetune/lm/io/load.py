"""Models, configurations and tokenizers from a model folder, a .gguf file, the name `smollm2`, or a hub id.

A folder holds a GPT-2 or a model of one of `hf_families.FAMILIES`: Llama, Mistral, Qwen, SmolLM3, Gemma. Every
function raises UserError naming what is missing, damaged, or not supported (a family, a kind of rope scaling, …).
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import msgspec
import torch

from finetune.errors import UserError
from finetune.lm import presets
from finetune.lm.gpt import GPT, GPTConfig
from finetune.lm.io import gguf_tokenizer, hf_gpt2, hf_llama, hf_tokenizer, hub, weights
from finetune.lm.io.config import TokenIds, read_json, read_token_ids
from finetune.lm.io.gguf import GGUFModel
from finetune.lm.llama import Llama, LlamaConfig
from finetune.lm.tokenizer import Tokenizer
from finetune.runs import reading

M = TypeVar("M", Llama, GPT)

ADAPTER_CONFIG = "adapter_config.json"  # marks the folder of an adapter (finetune/peft/adapters.py)


def model(path: str | Path, dtype: torch.dtype = torch.float32) -> Llama | GPT:
    """The Llama or GPT-2 at `path`, whichever it is."""
    return gpt(path, dtype) if isinstance(config(path), GPTConfig) else llama(path, dtype)


def llama(path: str | Path, dtype: torch.dtype = torch.float32) -> Llama:
    """The model at `path`, of Llama's or a similar family."""
    source = hub.resolve(path)
    if source.suffix == ".gguf":
        return gguf_llama(GGUFModel(source), dtype)
    return from_folder(Llama, hf_llama, source, dtype)


def gguf_llama(file: GGUFModel, dtype: torch.dtype) -> Llama:
    """The Llama of an opened GGUF file."""
    loaded = weights.assemble(Llama, file.llama_config(), file.tensors(), dtype, file.path)
    special_tokens(loaded, file)
    return loaded


def special_tokens(loaded: Llama, file: GGUFModel) -> None:
    """Gives the model the special tokens that the file names."""
    known = TokenIds.__struct_fields__
    loaded.token_ids = {key: value for key, value in file.token_ids().items() if key in known}
    if len(stops := file.stop_ids()) > 1:
        loaded.generation_ids = loaded.token_ids | {"eos_token_id": stops}


def gpt(path: str | Path, dtype: torch.dtype = torch.float32) -> GPT:
    """The GPT-2 at `path`."""
    source = hub.resolve(path)
    if source.suffix == ".gguf":
        raise UserError(f"{source}: GPT-2 is read from a safetensors folder, not from GGUF")
    return from_folder(GPT, hf_gpt2, source, dtype)


def from_folder(kind: type[M], names: ModuleType, source: Path, dtype: torch.dtype) -> M:
    """The model in a folder of safetensors; `names` is hf_llama or hf_gpt2, which knows the folder's configuration."""
    raw = config_json(source)
    shape = names.read_config(raw, source / "config.json")
    tensors = names.own_tensors(weights.read_safetensors(source), shape)
    loaded = weights.assemble(kind, shape, tensors, dtype, source)
    loaded.token_ids, loaded.generation_ids = read_token_ids(source, raw)
    return loaded


def tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer at `path`. SmolLM's own chat template is replaced by ours, which renders the same text and marks
    what the assistant says."""
    source = hub.resolve(path)
    return gguf_tokenizer.read(GGUFModel(source)) if source.suffix == ".gguf" else hf_tokenizer.read(source)


def config(path: str | Path) -> LlamaConfig | GPTConfig:
    """The shape of the model at `path`, without its weights."""
    source = hub.resolve(path)
    if source.suffix == ".gguf":
        return GGUFModel(source).llama_config()
    raw = config_json(source)
    names = hf_gpt2 if raw.get("model_type") == "gpt2" else hf_llama
    return names.read_config(raw, source / "config.json")


def llama_config(path: str | Path) -> LlamaConfig:
    """The shape of the model at `path`, of Llama's or a similar family; `smollm2`'s is known before it is fetched."""
    if str(path) == "smollm2" and not Path("smollm2").exists():
        return LlamaConfig(**presets.LLAMA["smollm2-135m"])
    source = hub.resolve(path)
    if source.suffix == ".gguf":
        return GGUFModel(source).llama_config()
    return hf_llama.read_config(config_json(source), source / "config.json")


def config_json(folder: Path) -> dict[str, Any]:
    """config.json of a model folder; UserError for the folder of an adapter, which is not a whole model."""
    if not (folder / "config.json").exists() and (folder / ADAPTER_CONFIG).exists():
        base = adapter_base(folder) or "which it does not name"
        raise UserError(f"{folder} is an adapter, not a model: give its base model ({base})")
    return read_json(folder / "config.json")


class AdapterConfig(msgspec.Struct):
    """The key of adapter_config.json that names the base model."""

    base_model_name_or_path: str | None = None


def adapter_base(folder: str | Path) -> str:
    """The name of the base model in an adapter's folder; an empty string if there is none."""
    return reading.json_file(Path(folder) / ADAPTER_CONFIG, AdapterConfig).base_model_name_or_path or ""
