"""Images drawn from a finished run of diffusion or dit: what `python -m finetune sample` runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from finetune.diffusion import draw, images
from finetune.diffusion.trained import Trained
from finetune.errors import UserError, nearest
from finetune.runs import config, machine, reading, registry, run_folder

EACH = 8  # images of each class, unless labels are given
MOST = 100_000  # images


def opened(source: str | Path) -> tuple[Trained, dict[str, Any]]:
    """The network of a finished run, and the run's settings. A module draws images if its main.py has
    `opened(folder, cfg) -> Trained`. UserError for another module's run, or one that has not saved its model yet."""
    folder = reading.home_path(source)
    if not (folder / run_folder.SETTINGS).is_file():
        raise UserError(f"{folder} is not the folder of a run: `python -m finetune run diffusion --toy` makes one")
    saved = run_folder.read(folder)
    info = registry.find(saved.module)
    module = registry.load(info)
    if not hasattr(module, "opened"):
        raise UserError(f"{folder} is a run of {saved.module}, which draws no images; diffusion and dit do")
    if not (folder / "model").is_dir():
        raise UserError(
            f"the run in {folder} is not finished: python -m finetune run {saved.module} --resume --out {folder}"
        )
    return module.opened(folder, config.from_json(module.Config, saved.config)), saved.config


def wanted(text: str | None, classes: tuple[str, ...]) -> torch.Tensor:
    """Labels (N,) of "3,cat,none": names or numbers of classes, or none for no class; without text, eight of each.

    UserError names a label outside the classes."""
    if text is None:
        return torch.arange(len(classes)).repeat(EACH)
    found = []
    for word in text.split(","):
        word = word.strip()
        if word in classes:
            found.append(classes.index(word))
        elif word == "none":
            found.append(len(classes))
        elif word.isdecimal() and len(word) < 10 and int(word) < len(classes):
            found.append(int(word))
        else:
            names = f"0 to {len(classes) - 1}" if len(classes) > 20 else ", ".join(classes)
            raise UserError(f"--labels {word!r} is not among the classes ({names}){nearest(word, classes)}")
    return torch.tensor(found)


def sample(
    source: str,
    labels: str | None = None,
    *,
    each: int = 1,
    steps: int | None = None,
    sampler: str | None = None,
    spacing: str = "trailing",
    eta: float = 0.0,
    guidance: float | None = None,
    seed: int = 0,
    out: str | None = None,
    animate: bool = False,
    threads: int = 0,
) -> dict[str, Any]:
    """Draws images and writes them as one picture; returns its path, and what was drawn how. What is not given is as in
    the run.

    Image k of the picture has the seed `seed` + k, whatever the others are."""
    torch.set_num_threads(threads or machine.physical_cores())
    model, settings = opened(source)
    asked = wanted(labels, model.classes).repeat_interleave(each)
    if len(asked) > MOST:
        raise UserError(f"{len(asked):,} images are more than the {MOST:,} that are drawn at once")
    chosen = sampler or settings.get("sampler") or "auto"
    how: dict[str, Any] = {
        "sampler": draw.suiting(model.process) if chosen == "auto" else chosen,
        "steps": steps or min(int(settings.get("sample_steps") or 50), model.process.T),
        "spacing": spacing,
        "eta": eta,
    }
    draw.check(model.process, **how)
    path = (
        reading.home_path(out)
        if out
        else reading.home_path(source) / f"sample_seed{seed}{'.gif' if animate else '.png'}"
    )
    if path.suffix.lower() not in ((".gif", ".png") if animate else (".png",)):
        raise UserError(
            f"--out {path}: {'an animation is .gif or .png (APNG)' if animate else 'the picture is a .png'}"
        )
    w = float(settings.get("guidance", 1.0)) if guidance is None else guidance
    trace: list[torch.Tensor] | None = [] if animate else None
    batch = len(asked) if animate else 128
    drawn = model.draw(asked, seed=seed, guidance=w, batch=batch, trace=trace, **how)
    columns = len(model.classes) if labels is None and len(model.classes) <= 16 else None
    enlarge = max(1, 48 // max(drawn.shape[-2:]))
    frames = [images.grid(x, columns, enlarge=enlarge) for x in (*map(model.pictures, trace or ()), drawn)]
    path.parent.mkdir(parents=True, exist_ok=True)
    images.animation(path, frames) if animate else images.save(path, frames[-1])
    names = [*model.classes, "none"]
    return {"path": str(path), "labels": [names[i] for i in asked.tolist()], "seed": seed, "guidance": w, **how}
