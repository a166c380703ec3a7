"""Answers to questions about image files: what `python -m finetune generate --image` runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

SEEING = {"llava": "llava"}  # model_type of a folder's config.json → the module that opens it (code/ask.py: Seer)
ALONE = ("adapters", "compare", "base", "quantize", "top_k", "top_p")  # options that models with images lack
PLAIN: dict[str, Any] = {"top_p": 1.0}  # their values where they are not given; else nothing


def answers(
    source: str | None,
    prompts: Sequence[str],
    images: Sequence[str],
    *,
    chat: bool | None = None,
    system: str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    threads: int = 0,
    console: Console | None = None,
    **others: Any,
) -> list[str]:
    """The answer to each prompt about all the images, which stand before it, or where it says `<image>`.

    source: the folder of a run or of a model, or a hub id. UserError for a model that does not see, an option that does
    not go with images, and a file that is no image."""
    import torch

    from finetune.lm.io import hub
    from finetune.lm.io.config import read_json
    from finetune.runs import machine, reading, registry

    for name in ALONE:
        if others.get(name) and others[name] != PLAIN.get(name):
            raise UserError(f"--{'adapter' if name == 'adapters' else name.replace('_', '-')} does not go with --image")
    if source is None:
        raise UserError("which model? give --model, the folder of a run of a module that sees (llava)")
    torch.set_num_threads(threads or machine.physical_cores())
    folder = hub.resolve(source, console)
    kind = read_json(folder / "config.json").get("model_type") if folder.is_dir() else "gguf"
    if kind not in SEEING:
        raise UserError(f"{source}: a model of type {kind!r} takes no images; those that do: {', '.join(SEEING)}")
    paths: list[Path] = [reading.home_path(image) for image in images]
    seer = registry.part(SEEING[kind], "ask").Seer(folder)
    return seer.answers(prompts, paths, max_new_tokens, temperature, seed, chat, system)
