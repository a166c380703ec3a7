"""Captions of image files by a finished run of blip2, or which of some texts fit them: `python -m finetune caption`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from finetune.errors import UserError
from finetune.runs import config, machine, reading, registry, run_folder


def caption(
    source: str, files: Sequence[str], texts: Sequence[str] = (), data_set: str | None = None, threads: int = 0
) -> list[dict[str, Any]]:
    """For each file {"image", "caption"}; with `texts` {"image", "scores"}, of each text its similarity.

    A module describes images if its main.py has `seeing(folder, cfg, data_set)`, whose result has images(files),
    captions(images) and scores(images, texts). UserError for another module's run, an unfinished one, and a file that
    is no image."""
    torch.set_num_threads(threads or machine.physical_cores())
    folder = reading.home_path(source)
    if not (folder / run_folder.SETTINGS).is_file():
        raise UserError(f"{folder} is not the folder of a run: `python -m finetune run blip2 --toy` makes one")
    saved = run_folder.read(folder)
    module = registry.load(registry.find(saved.module))
    if not hasattr(module, "seeing"):
        raise UserError(f"{folder} is a run of {saved.module}, which describes no images; blip2 does")
    if not (folder / run_folder.SUMMARY).is_file():
        raise UserError(
            f"the run in {folder} is not finished: python -m finetune run {saved.module} --resume --out {folder}"
        )
    told = module.seeing(folder, config.from_json(module.Config, saved.config), data_set)
    shown = told.images(files)
    if not texts:
        return [{"image": f, "caption": text} for f, text in zip(files, told.captions(shown), strict=True)]
    scores = told.scores(shown, texts).tolist()
    return [{"image": f, "scores": dict(zip(texts, row, strict=True))} for f, row in zip(files, scores, strict=True)]
