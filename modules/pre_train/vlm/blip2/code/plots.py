"""The pictures of a run: where the queries look, the three masks, retrieval, captions before and after, confusions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.runs.plots import INK, figure, save
from finetune.runs.run import Run
from finetune.vision import pictures

from .model import Mask, Stage1, visible
from .pairs import Pairs

EXAMPLES = 12
RIGHT, WRONG, NEUTRAL = "#1a7f37", "#b42318", "#6b7280"


SIDE = 96  # pixels of an image in a picture
GAP = 8


def tile(image: Tensor) -> Tensor:
    """(SIDE, SIDE, 3) in [0, 1] of an image (1 or 3, H, W) uint8, padded with white to a square."""
    height, width = image.shape[-2:]
    side = max(height, width)
    x = image.expand(3, -1, -1).float() / 255
    over = side - width, side - height
    x = F.pad(x, (over[0] // 2, over[0] - over[0] // 2, over[1] // 2, over[1] - over[1] // 2), value=1.0)
    return F.interpolate(x[None], (SIDE, SIDE), mode="nearest")[0].permute(1, 2, 0)


def heat(image: Tensor, weights: Tensor) -> Tensor:
    """The tile, darker where `weights` (rows, columns) of the padded square are small, red where they are large."""
    share = F.interpolate((weights / weights.max())[None, None], (SIDE, SIDE), mode="nearest")[0, 0, ..., None]
    red = torch.tensor([0.85, 0.1, 0.1])
    return 0.35 * tile(image) + 0.65 * (share * red + (1 - share) * torch.tensor([0.12, 0.12, 0.2]))


def sheet(tiles: Sequence[Sequence[Tensor]], below: int = 0) -> Tensor:
    """Rows of tiles on white; `below`: pixels for text under each row."""
    step, columns = SIDE + GAP, max(map(len, tiles))
    out = torch.ones(len(tiles) * (step + below), columns * step, 3)
    for i, row in enumerate(tiles):
        for j, one in enumerate(row):
            top = i * (step + below)
            out[top : top + SIDE, j * step : j * step + SIDE] = one
    return out


def shown_as(out: Tensor) -> tuple[Any, Any]:
    """A figure of exactly the sheet, and its axes, whose units are pixels."""
    made, (axes,) = figure(out.shape[1] / 80, out.shape[0] / 80)
    axes.imshow(out)
    axes.set_axis_off()
    return made, axes


def readable(text: str, longest: int = 22) -> str:
    """What a font can draw of it, in one line."""
    return "".join(letter if letter.isprintable() else "·" for letter in text)[:longest]


def masks(run: Run, queries: int = 4, tokens: int = 5) -> None:
    """masks.png: who sees whom."""
    made, panels = figure(9.6, 3.6, columns=3)
    names = [f"query {i + 1}" for i in range(queries)] + ["[begin]", *[f"word {i + 1}" for i in range(tokens - 1)]]
    kinds: dict[str, Mask] = {"contrast": "itc", "match": "itm", "text": "itg"}
    for axes, (title, kind) in zip(panels, kinds.items(), strict=True):
        axes.imshow(visible(kind, queries, tokens)[0], cmap="Blues", vmin=0, vmax=1.6)
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8, color=INK)
        axes.set_yticks(range(len(names)), names if axes is panels[0] else [], fontsize=8, color=INK)
        axes.set_title(f"{kind.upper()}: {title}", loc="left", fontsize=11, color=INK)
        axes.grid(False)
        axes.axhline(queries - 0.5, color=NEUTRAL, linewidth=1)
        axes.axvline(queries - 0.5, color=NEUTRAL, linewidth=1)
    panels[0].set_ylabel("row sees column", color=INK)
    save(made, run.dir / "masks.png")


@torch.no_grad()
def attention(run: Run, name: str, model: Stage1, shown: Pairs, most: int = 6) -> None:
    """What the queries of the last layer that looks at the image attend to, mean of its heads; the last column is the
    mean of the queries."""
    weights = model.qformer.looks(shown.features[:most])[-1].mean(1)  # (B, Q, N)
    side = math.isqrt(weights.shape[-1])
    grid = weights[..., -side * side :].unflatten(-1, (side, side))  # without the class token
    count = min(grid.shape[1], 6)
    rows = [[tile(image), *[heat(image, each) for each in maps[:count]], heat(image, maps.mean(0))]
            for image, maps in zip(shown.shown, grid, strict=False)]  # fmt: skip
    made, axes = shown_as(sheet(rows, 14))
    step = SIDE + GAP
    for j, title in enumerate(["image", *[f"query {i + 1}" for i in range(count)], "mean"]):
        axes.text(j * step + SIDE / 2, -8, title, ha="center", fontsize=8, color=INK)
    for i, text in enumerate(shown.captions[: len(rows)]):
        axes.text(2, i * (step + 14) + SIDE + 12, readable(text, 40), fontsize=7, color=INK)
    save(made, run.dir / name)


def retrieved(run: Run, name: str, shown: Pairs, sim: Tensor, most: int = 8) -> None:
    """Images, and below each its three best texts."""
    made, axes = shown_as(sheet([[tile(image) for image in shown.shown[:most]]], 48))
    for i in range(min(most, len(shown))):
        best = list(dict.fromkeys(shown.captions[j] for j in sim[i].argsort(descending=True).tolist()))[:3]
        for place, text in enumerate(best):
            color = RIGHT if text == shown.captions[i] else NEUTRAL
            middle = i * (SIDE + GAP) + SIDE / 2
            axes.text(middle, SIDE + 14 + 15 * place, readable(text), ha="center", fontsize=6.5, color=color)
    save(made, run.dir / name)


def captioned(run: Run, name: str, shown: Pairs, before: Sequence[str], after: Sequence[str], most: int = 8) -> None:
    """Held-out images with their captions before and after training."""
    made, axes = shown_as(sheet([[tile(image) for image in shown.shown[:most]]], 40))
    for i in range(min(most, len(shown))):
        middle = i * (SIDE + GAP) + SIDE / 2
        right = after[i] == shown.captions[i]
        axes.text(middle, SIDE + 14, readable(before[i], 20), ha="center", fontsize=6.5, color=NEUTRAL)
        axes.text(middle, SIDE + 32, readable(after[i]), ha="center", fontsize=7.5, color=RIGHT if right else WRONG)
    save(made, run.dir / name)


def confusion(run: Run, name: str, written: Sequence[str], wanted: Sequence[str]) -> None:
    """Which digit was written for which, both places together; what is no digit is in the last column."""
    digits = pictures.SMALL[:10]
    counts = torch.zeros(10, 11)
    for one, other in zip(written, wanted, strict=True):
        words, true = one.split(), other.split()
        for place in (0, -1):
            word = words[place] if len(words) == len(true) else ""
            counts[digits.index(true[place]), digits.index(word) if word in digits else 10] += 1
    made, (axes,) = figure(5.2, 4.6)
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)
    axes.grid(False)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for i, row in enumerate(counts.long().tolist()):
        for j, count in enumerate(row):
            if count:
                axes.text(
                    j, i, count, ha="center", va="center", fontsize=8, color="white" if share[i, j] > 0.5 else INK
                )
    axes.set_xticks(range(11), [*digits, "other"], rotation=60, fontsize=8, color=INK)
    axes.set_yticks(range(10), digits, fontsize=8, color=INK)
    axes.set_xlabel("written", color=INK)
    axes.set_ylabel("in the image", color=INK)
    save(made, run.dir / name)
