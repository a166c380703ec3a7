"""Which adapter and which base model a name on the command line means, and how an adapter's folder names its base."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import UserError
from finetune.lm.io import hub, load, smollm2
from finetune.runs import reading

if TYPE_CHECKING:
    from rich.console import Console

    from finetune.runs.run import Run


def model_of(run: Run, name: str) -> Path:
    """The folder or file of the model that a run begins from: what the run depends on, but for SmolLM2, whose files are
    known by their hash already. UserError if it is not found."""
    source = hub.resolve(name, run.console)
    if source != smollm2.cached():
        run.depends_on("model", source)
    return source


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter and not a whole model."""
    whole = ("model.safetensors", "model.safetensors.index.json")
    return os.path.exists(folder / load.ADAPTER_CONFIG) and not any(os.path.exists(folder / name) for name in whole)


def adapter_folder(name: str, console: Console | None = None) -> Path:
    """The folder of an adapter: itself, the one of a run, or one on the hub. UserError if it holds none."""
    folder = hub.resolve(name, console)
    if not is_adapter(folder):
        what = "a whole model" if (folder / "config.json").exists() or folder.is_file() else "nothing that is one"
        raise UserError(f"{name} is not an adapter: {folder} holds {what} ({load.ADAPTER_CONFIG} marks an adapter)")
    return folder


def base_folder(adapter: Path, base: str | None = None, console: Console | None = None, option: str = "--base") -> Path:
    """The base model of an adapter's folder: `base`, which `option` gives, or the one that the folder names. UserError
    if that is not found."""
    name = base or load.adapter_base(adapter)
    if not name:
        raise UserError(f"the adapter {adapter} does not name its base model: give it with {option}")
    try:
        found = hub.resolve(name, console)
    except UserError as error:
        if base:
            raise
        raise UserError(
            f"the base model of the adapter {adapter} is not found ({error}): give it with {option}"
        ) from None
    if is_adapter(found):
        raise UserError(f"{name} is an adapter, not the base model of {adapter}: give that with {option}")
    return found


def tokenizer_source(base: Path, *adapters: Path | None) -> Path:
    """Where the tokenizer is: in the first of the adapters' folders that holds one, else with the base model."""
    return next((folder for folder in adapters if folder and (folder / "tokenizer.json").exists()), base)


def base_name(model: str) -> str:
    """What an adapter's folder says of its base: a hub id as it is, of a folder or file its whole path."""
    if not reading.home_path(model).exists() and model != "smollm2":
        return model
    return str(hub.resolve(model).absolute())


def next_commands(run: Path) -> list[tuple[str, str]]:
    """What one does next with the adapter of a run: (what for, words of the command line), for a shell."""
    name, merged = (shlex.quote(str(path)) for path in (run, run.with_name(f"{run.name}-merged")))
    ask = f"generate --model {name} --prompt 'What can you do?'"
    return [
        ("ask it", ask),
        ("next to the model that it was trained on", f"{ask} --compare"),
        ("a model that needs no adapter", f"merge {name} --out {merged}"),
    ]


@contextmanager
def of(base: Path) -> Iterator[None]:
    """Context in which an adapter is put on this model: an error names it too."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error} (the base model is {base})") from None
