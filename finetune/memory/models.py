"""The model that `python -m finetune memory` is asked about: of a module, well known, of a file, the hub, by sizes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from finetune.errors import UserError, nearest
from finetune.lm import presets
from finetune.memory.formulas import predict
from finetune.memory.possible import check_shape
from finetune.memory.setup import Setup, Shape, Term, shape_of

PRESETS: dict[str, dict[str, Any]] = {**presets.LLAMA, **presets.GPT}
GIVEN = "a model of these sizes"


@dataclass(frozen=True)
class Model:
    """A model's configuration and where it is from."""

    name: str
    config: Any  # LlamaConfig, GPTConfig, or a dict with the fields of one
    stored: dict[str, int] = field(default_factory=dict)  # bytes of a GGUF file's tensors by their type
    weights: str = ""  # what `run sft --model` finds its weights by
    module: bool = False  # whether a module names it
    words: str = ""  # what it is called by on the command line, if not by its name

    @property
    def shape(self) -> Shape:
        return shape_of(self.config)

    def predict(self, setup: Setup) -> list[Term]:
        """`formulas.predict`; inference of a GGUF file in its own types has the file's bytes as weights."""
        terms = predict(self.shape, setup)
        if not self.stored or setup.training:
            return terms
        weights = [Term(f"weights, {kind}", size, f"{size:,}", self.name) for kind, size in self.stored.items()]
        peak = sum(self.stored.values()) - terms[0].bytes + terms[-1].bytes
        return [*weights, *terms[1:-1], dataclasses.replace(terms[-1], bytes=peak)]


@dataclass(frozen=True)
class Sized(Setup):
    """A setup of a model that is given by its sizes."""

    layers: int = 0  # number of blocks
    dim: int = 0  # width of the hidden state
    heads: int = 0  # query heads; 0: of 128 numbers each
    kv_heads: int = 0  # key and value heads; 0: as many as query heads
    head_dim: int = 0  # numbers of a head; 0: dim / heads
    hidden: int = 0  # width of the MLP; 0: 8/3 of dim up to a multiple of 256, in gpt 4 times dim
    vocab_size: int = 32000  # tokens of the vocabulary
    max_length: int = 0  # positions; 0: as many as --seq
    tied: bool = False  # one table for the embedding and the projection to the vocabulary
    qkv_bias: bool = False  # as Qwen2
    qk_norm: bool = False  # as Qwen3
    model: Literal["llama", "gpt"] = "llama"  # whose layers: also Mistral's and Qwen's, or GPT-2's


def find(name: str, argv: list[str]) -> tuple[Model, Setup, set[str]]:
    """The model of that name, the setup that argv describes, and the settings that argv names. UserError for an unknown
    name, option or kind of model, and for a setup that the model cannot have."""
    from finetune.runs import config, registry

    if name in {info.name for info in registry.modules()}:
        shape, setup = plan_of(name, argv)
        return Model(name, shape, module=True), setup, set()
    argv = switches(argv)
    if name == GIVEN:
        values = config.given(Sized, argv)  # type: ignore[arg-type]  # it has a Config's comments
        own = {f.name for f in dataclasses.fields(Setup)}
        sizes = {key: values.pop(key) for key in list(values) if key not in own}
        model = sized(sizes, values.get("seq", Setup.seq))
    else:
        values = config.given(Setup, argv)  # type: ignore[arg-type]
        model = named(name)
    values.setdefault("seq", min(Setup.seq, model.shape.max_length))
    if model.stored:
        if values.get("optimizer", "adamw") != "none" or {"dtype", "quantized", "tp", "pp", "offload"} & set(values):
            model = dataclasses.replace(model, stored={})  # dequantized
        else:
            values["dtype"] = "fp16"  # of the cache, as llama.cpp has it
    setup = Setup(**values)
    check_shape(name, model.shape, setup)
    return model, setup, set(values)


def plan_of(name: str, argv: list[str]) -> Any:
    """What `memory_plan` of the module gives under the settings in argv: (config of a language model, Setup), or a
    Plan; None if there is no such module."""
    from finetune.runs import config, registry

    modules = {info.name: info for info in registry.modules()}
    if name not in modules:
        return None
    module = registry.load(modules[name])
    if not hasattr(module, "memory_plan"):
        raise UserError(f"module '{name}' has no memory plan; `memory` without a name lists the models it knows")
    toy, given = "--toy" in argv, config.given(module.Config, [word for word in argv if word != "--toy"], ["toy"])
    return module.memory_plan(dataclasses.replace(module.Config.toy() if toy else module.Config(), **given))


def switches(words: list[str]) -> list[str]:
    """`--checkpointing` alone, or with true or false, as it was a switch once: block or none."""
    words, made = list(words), []
    while words:
        word = words.pop(0)
        if word == "--no-checkpointing":
            made += ["--checkpointing", "none"]
        elif word == "--checkpointing":
            value = words.pop(0) if words and not words[0].startswith("--") else "true"
            made += [word, {"true": "block", "false": "none"}.get(value.lower(), value)]
        else:
            made.append(word)
    return made


def named(name: str) -> Model:
    """A well-known model, a config.json, a model folder, a .gguf file, or a model of the hub."""
    from finetune.runs import reading, registry

    if name in PRESETS:
        return Model(name, PRESETS[name])
    if name == "smollm2":
        return Model(name, PRESETS["smollm2-135m"], weights=name)
    path = reading.home_path(name)
    try:
        folder, file = path.is_dir(), path.is_file()
    except OSError as error:
        raise UserError(f"the model {name[:80]} cannot be read: {error.strerror}") from None
    if folder:
        return from_json(path / "config.json", name, name)
    if file and path.suffix == ".gguf":
        return from_gguf(path, name)
    if file and path.suffix == ".json":
        return from_json(path, name)
    if file:
        raise UserError(f"{name} is neither a config.json, nor a model folder, nor a .gguf file")
    parts = name.split("/")
    if len(parts) == 2 and all(parts) and parts[0] not in (".", "..", "~") and path.suffix not in (".json", ".gguf"):
        from finetune.lm.io import hub

        return from_json(hub.fetch_config(name), name, name)
    if path.suffix in (".json", ".gguf") or len(parts) > 1:
        raise UserError(
            f"there is no {name}: give a config.json, a model folder, a .gguf file or a hub id (owner/name)"
        )
    if day := registry.planned_day(name):
        raise UserError(f"module '{name}' is planned (day {day} of the path) and does not exist yet")
    hint = nearest(name, [*(info.name for info in registry.modules()), *PRESETS]) or "; `memory` alone lists them"
    raise UserError(f"unknown module or model '{name}'{hint}")


def from_json(path: Path, name: str, weights: str = "") -> Model:
    """The model of a Hugging Face config.json; UserError for a family that the formulas do not know."""
    from finetune.lm.io import hf_gpt2, hf_llama, load
    from finetune.lm.io.config import read_json

    raw = load.config_json(path.parent) if path.name == "config.json" else read_json(path)
    reader = hf_gpt2 if raw.get("model_type") == "gpt2" else hf_llama
    return Model(name, reader.read_config(raw, path), weights=weights)


def from_gguf(path: Path, name: str) -> Model:
    """The model of a GGUF file, and the bytes of its tensors by their type."""
    from finetune.lm.io.gguf import GGUFModel

    file = GGUFModel(path)
    stored: dict[str, int] = {}
    for info in file.tensor_infos.values():
        stored[info.kind] = stored.get(info.kind, 0) + info.nbytes
    largest_first = dict(sorted(stored.items(), key=lambda pair: -pair[1]))
    return Model(name, file.llama_config(), largest_first, weights=name)


def sized(sizes: dict[str, Any], seq: int) -> Model:
    """The model of the given sizes; what is not given follows from the width, as in Llama or GPT-2."""
    for key in ("layers", "dim"):
        if sizes.get(key, 0) < 1:
            raise UserError(f"a model by its sizes needs --layers and --dim; --{key} is missing or below 1")
    for key, value in sizes.items():
        if isinstance(value, int) and not 0 <= value <= 1 << 26:
            raise UserError(f"--{key.replace('_', '-')} {value} is not between 0 and {1 << 26}")
    plain: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(Sized)}
    get = {key: plain[key] for key in plain if key not in Setup.__dataclass_fields__} | sizes
    words = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in sizes.items())
    dim, kind = get["dim"], get.pop("model")
    get["heads"] = get["heads"] or max(1, dim // (get["head_dim"] or (64 if kind == "gpt" else 128)))
    get["max_length"] = get["max_length"] or max(seq, 1024)
    if kind == "gpt":
        for key in ("kv_heads", "head_dim", "qkv_bias", "qk_norm", "tied"):
            if sizes.get(key):
                raise UserError(f"--{key.replace('_', '-')}: a gpt has no such choice")
        from finetune.lm.gpt import GPTConfig

        keys = ("vocab_size", "dim", "layers", "heads", "max_length", "hidden")
        return Model(GIVEN, GPTConfig(**{key: get[key] for key in keys}), words=words)
    from finetune.lm.llama import LlamaConfig

    get["kv_heads"] = get["kv_heads"] or get["heads"]
    get["hidden"] = get["hidden"] or -(-8 * dim // 3 // 256) * 256
    return Model(GIVEN, LlamaConfig(**get), words=words)
