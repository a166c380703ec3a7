"""A model, a run or an adapter as one file for other programs: what `python -m finetune export` runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError
from finetune.runs import display, reading

if TYPE_CHECKING:
    from rich.console import Console


def export(
    source: str, out: str, form: str, *, base: str | None = None, force: bool = False, console: "Console"
) -> dict[str, Any]:
    """Writes the model at `source` as a GGUF file `out` of a form of gguf_write.FORMATS.

    `source`: a run's folder (its model or adapter), a model folder, the folder of a LoRA adapter (merged in memory; its
    base model is `base`, or the one that it names), a .gguf file, `smollm2`, or a hub id. Returns path, bytes, format,
    architecture and notes (what the file cannot hold). An existing file is replaced only with `force`.
    """
    from finetune.lm.io import gguf_write

    path = reading.home_path(out)
    if path.suffix != ".gguf":
        raise UserError(f"--out {out}: the name of a GGUF file ends in .gguf")
    if path.is_dir():
        raise UserError(f"--out {out} is a folder: give the name of a file")
    if path.exists() and not force:
        raise UserError(f"--out {out} exists: choose another name, or replace it with --force")
    model, tokenizer, name = opened(source, base, console)
    total = sum(1 for _ in model.parameters())
    with display.progress(console, f"write {path.name}", 0, total) as show:
        notes = gguf_write.write(model, tokenizer, path, form, name=name, report=show)
    architecture = gguf_write.architecture_of(model.config)
    return {
        "path": str(path), "bytes": path.stat().st_size, "format": form, "architecture": architecture, "notes": notes
    }  # fmt: skip


def opened(source: str, base: str | None, console: "Console") -> tuple[Any, Any, str]:
    """The model, its tokenizer and its name; an adapter is merged into its base model, in fp32."""
    import torch

    from finetune.lm import template_tokens
    from finetune.lm.io import hub, load
    from finetune.merge import base_dtype
    from finetune.peft import adapters, bases, lora

    path, name = hub.resolve(source, console), Path(source).name.removesuffix(".gguf")
    if not bases.is_adapter(path):
        if base:
            raise UserError(f"--base {base}: {path} is not an adapter, so it has no base model")
        return load.model(path, getattr(torch, base_dtype(path))), load.tokenizer(path), name
    origin = bases.base_folder(path, base, console)
    tokenizer = load.tokenizer(bases.tokenizer_source(origin, path))
    model = load.llama(origin)
    with bases.of(origin):
        adapters.load_adapter(model, path)
    lora.merge(model)
    template_tokens.end_ids(model, tokenizer)
    return model, tokenizer, name
