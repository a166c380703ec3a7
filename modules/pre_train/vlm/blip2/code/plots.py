"""The pictures of a run: where the queries look, the three masks, retrieval, captions before and after, confusions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.runs.plots import GREY, INK, figure, save
from finetune.runs.run import Run
from finetune.vision import pictures

from .model import Stage1, visible
from .pairs import Pairs

EXAMPLES = 12
RIGHT, WRONG = "#1a7f37", "#b42318"


def pixels(image: Tensor) -> Tensor:
    """(H, W) or (H, W, 3) uint8 of (C, H, W)."""
    return image[0] if len(image) == 1 else image.permute(1, 2, 0)


def empty(axes: object) -> None:
    axes.set_xticks([])  # type: ignore[attr-defined]
    axes.set_yticks([])  # type: ignore[attr-defined]


def masks(run: Run, queries: int = 4, tokens: int = 5) -> None:
    """masks.png: who sees whom."""
    made, panels = figure(9.6, 3.6, columns=3)
    names = [f"query {i + 1}" for i in range(queries)] + ["[begin]", *[f"word {i + 1}" for i in range(tokens - 1)]]
    for axes, kind, title in zip(panels, ("itc", "itm", "itg"), ("contrast", "match", "text"), strict=True):
        axes.imshow(visible(kind, queries, tokens)[0], cmap="Blues", vmin=0, vmax=1.6)
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8, color=INK)
        axes.set_yticks(range(len(names)), names if axes is panels[0] else [], fontsize=8, color=INK)
        axes.set_title(f"{kind.upper()}: {title}", loc="left", fontsize=11, color=INK)
        axes.axhline(queries - 0.5, color=GREY, linewidth=1)
        axes.axvline(queries - 0.5, color=GREY, linewidth=1)
    panels[0].set_ylabel("row sees column", color=INK)
    save(made, run.dir / "masks.png")


@torch.no_grad()
def attention(run: Run, name: str, model: Stage1, shown: Pairs, most: int = 6) -> None:
    """What the queries of the last layer that looks at the image attend to, mean of its heads, over the image; the last
    column is the mean of the queries."""
    weights = model.qformer.looks(shown.features[:most])[-1].mean(1)  # (B, Q, N)
    side = int(weights.shape[-1] ** 0.5)
    grid = weights[..., -side * side :].unflatten(-1, (side, side))  # without the class token
    count = min(grid.shape[1], 6)
    made, panels = figure(1.25 * (count + 2), 1.3 * len(grid), rows=len(grid), columns=count + 2)
    for row, (image, maps) in enumerate(zip(shown.shown, grid, strict=False)):
        line = panels[row * (count + 2) : (row + 1) * (count + 2)]
        height, width = image.shape[-2:]
        longest = max(height, width)
        large = F.interpolate(torch.cat([maps[:count], maps.mean(0, keepdim=True)])[:, None], (longest, longest))[:, 0]
        top = (longest - height) // 2, (longest - width) // 2
        line[0].imshow(pixels(image), cmap="gray")
        line[0].set_ylabel(shown.captions[row][:16], fontsize=7, color=INK)
        for i, (axes, over) in enumerate(zip(line[1:], large, strict=True)):
            axes.imshow(pixels(image), cmap="gray")
            axes.imshow(over[top[0] : top[0] + height, top[1] : top[1] + width], cmap="inferno", alpha=0.6)
            if not row:
                axes.set_title(f"query {i + 1}" if i < count else "mean", fontsize=8, color=INK)
        for axes in line:
            empty(axes)
    save(made, run.dir / name)


def retrieved(run: Run, name: str, shown: Pairs, sim: Tensor, most: int = 8) -> None:
    """Images, and below each its best texts."""
    best = sim.topk(3, 1).indices
    made, panels = figure(1.5 * most, 2.4, columns=most)
    for i, axes in enumerate(panels):
        axes.imshow(pixels(shown.shown[i]), cmap="gray")
        empty(axes)
        lines = [shown.captions[j] for j in best[i].tolist()]
        for place, text in enumerate(lines):
            right = text == shown.captions[i]
            axes.text(0.5, -0.12 - 0.16 * place, text[:24], transform=axes.transAxes, ha="center", fontsize=7,
                      color=RIGHT if right else GREY)  # fmt: skip
    save(made, run.dir / name)


def captioned(run: Run, name: str, shown: Pairs, before: Sequence[str], after: Sequence[str], most: int = 8) -> None:
    """Held-out images with their captions before and after training."""
    most = min(most, len(shown))
    made, panels = figure(1.6 * most, 2.2, columns=most)
    for i, axes in enumerate(panels):
        axes.imshow(pixels(shown.shown[i]), cmap="gray")
        empty(axes)
        right = after[i] == shown.captions[i]
        axes.text(
            0.5, -0.16, f"before: {before[i][:22]}", transform=axes.transAxes, ha="center", fontsize=7, color=GREY
        )
        axes.text(0.5, -0.38, after[i][:24], transform=axes.transAxes, ha="center", fontsize=8,
                  color=RIGHT if right else WRONG)  # fmt: skip
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
