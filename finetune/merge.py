"""An adapter merged into its base model, as a model folder: what `python -m finetune merge` runs."""

import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError
from finetune.runs import checkpoint, machine

if TYPE_CHECKING:
    from rich.console import Console

DTYPES = ("float32", "bfloat16", "float16")


def merge(
    names: Sequence[str],
    out: Path,
    *,
    base: str | None = None,
    weights: Sequence[float] = (),
    dtype: str | None = None,
    gguf: str | None = None,
    console: "Console | None" = None,
) -> dict[str, Any]:
    """Merges adapters into their base model and writes the result to the new folder `out`, which transformers opens.

    names: adapters or runs that made them; several are added, each times its weight (default 1). base: the base model,
    if it is not where the first adapter says. dtype: of the result; None: that of the base. gguf: a form of
    gguf_write.FORMATS in which the folder also holds the model as one file. Sums are computed in fp32,
    then rounded. The folder is complete or not there at all. UserError for what cannot be merged: prompts and
    prefixes, an adapter of another model, too little memory or disk.
    """
    from finetune.lm import template_tokens
    from finetune.lm.io import gguf_write, load, save
    from finetune.memory import check_disk, parameters, room, shape_of
    from finetune.peft import adapters, bases, lora

    if weights and len(weights) != len(names):
        raise UserError(f"--weight: {len(weights)} weights for {len(names)} adapters: give one for each, or none")
    if not all(math.isfinite(weight) for weight in weights):
        raise UserError("--weight: weights are finite numbers")
    folders = [bases.adapter_folder(name, console) for name in names]
    if twice := next((name for name in names if list(names).count(name) > 1), None):
        raise UserError(f"{twice} is given twice: give it once, with --weight")
    for folder in folders:
        if (found := adapters.kind(folder)) != "LORA":
            raise UserError(f"{folder} is a {adapters.KINDS[found].partition(':')[0]} adapter ({found}), which adds "
                            "tokens before the text: there are no weights to merge it into")  # fmt: skip
    refuse_filled(out)
    origin = bases.base_folder(folders[0], base, console)
    shape, kind = load.llama_config(origin), dtype or base_dtype(origin)
    needed = parameters(shape_of(shape)) * (4 if kind == "float32" else 2)
    free = machine.available_memory_bytes()
    if free is not None and needed > free:
        raise UserError(f"merging needs {room.size(needed)} of memory in {kind}, {room.size(free)} are free: "
                        "give a smaller --dtype, or close other programs")  # fmt: skip
    check_disk(existing(out), needed, "the merged model")
    import torch

    model = load.llama(origin, getattr(torch, kind))
    tokenizer = load.tokenizer(bases.tokenizer_source(origin, *folders))
    with bases.of(origin):
        for i, folder in enumerate(folders):
            adapters.load_adapter(model, folder, f"adapter{i}")
        lora.activate(model, {f"adapter{i}": w for i, w in enumerate(weights or [1.0] * len(folders))})
    lora.merge(model)
    template_tokens.end_ids(model, tokenizer)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"the tokenizer of {folders[0]} has {tokenizer.vocab_size} tokens, the merged model "
            f"{model.config.vocab_size}: is {origin} its base model?"
        )
    made, notes = f"{out.name}-{gguf}.gguf", []
    with new_folder(out) as temporary:
        save.model(model, temporary, tokenizer)
        if gguf:
            notes = gguf_write.write(model, tokenizer, temporary / made, gguf, name=out.name)
    return {
        "out": str(out),
        "gguf": str(out / made) if gguf else None,
        "notes": notes,
        "base": str(origin),
        "adapters": [str(folder) for folder in folders],
        "dtype": kind,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def base_dtype(origin: Path) -> str:
    """The dtype of a base model's weights: that of its largest tensor; float32 for a GGUF, whose weights are
    dequantized."""
    from finetune.lm.io import weights

    if origin.suffix == ".gguf":
        return "float32"
    largest = max(weights.read_safetensors(origin), key=lambda pair: pair[1].numel())[1]
    name = str(largest.dtype).removeprefix("torch.")
    return name if name in DTYPES else "float32"


def refuse_filled(out: Path) -> None:
    """UserError if something is at `out` already: nothing is overwritten."""
    with checkpoint.writing(out):
        if out.is_dir() and (there := next((p.name for p in out.iterdir()), None)):
            raise UserError(f"{out} is not empty ({there}): the merged model needs a new folder; choose another --out")
        if out.exists() and not out.is_dir():
            raise UserError(f"{out} is a file: the merged model needs a new folder; choose another --out")


def existing(path: Path) -> Path:
    """The nearest folder that exists."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.is_dir())


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Context that yields a temporary folder next to `out`, which becomes `out` if the block succeeds."""
    temporary = checkpoint.temporary_name(out.absolute())
    try:
        with checkpoint.writing(out):
            temporary.mkdir(parents=True)
        yield temporary
        with checkpoint.writing(out):
            os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
