"""The pictures of a run: samples by class, over training and over guidance, and a sample's way out of the noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from finetune.diffusion import images
from finetune.runs.plots import GREY, INK, LINE, figure, save
from finetune.runs.run import Run


def by_class(run: Run, samples: Tensor, labels: Tensor, most: int = 12) -> None:
    """samples.png: a row a class, uint8 samples (N, C, H, W)."""
    rows = [samples[labels == label][:most] for label in labels.unique().tolist()]
    columns = min(len(row) for row in rows)
    grid = images.grid(torch.cat([row[:columns] for row in rows]), columns, enlarge=scale(samples))
    images.save(run.dir / "samples.png", grid)


def over_training(run: Run, seen: dict[str, Tensor]) -> None:
    """samples_over_training.png: the same noise and labels at several steps, a row each."""
    rows = [seen[step] for step in sorted(seen, key=int)]
    if rows:
        grid = images.grid(torch.cat(rows), len(rows[0]), enlarge=scale(rows[0]))
        images.save(run.dir / "samples_over_training.png", grid)


def reconstructions(run: Run, real: Tensor, again: Tensor) -> None:
    """reconstructions.png: held-out images, and below them what the autoencoder gives back."""
    images.save(run.dir / "reconstructions.png", images.grid(torch.cat([real, again]), len(real), enlarge=scale(real)))


def denoising(run: Run, trace: Sequence[Tensor]) -> None:
    """denoising.gif: what the network believes the images to be at each step, uint8 (N, C, H, W)."""
    frames = [images.grid(x, enlarge=scale(x)) for x in trace]
    images.animation(run.dir / "denoising.gif", frames)


def guidance(run: Run, rows: list[dict[str, float]], gaussian: float) -> None:
    """guidance.png: accuracy and Fréchet distance over the weight of guidance."""
    weights = [row["w"] for row in rows]
    made, (left, right) = figure(9.6, 3.8, columns=2)
    left.plot(weights, [row["accuracy"] for row in rows], marker="o", color=LINE)
    left.set_ylim(0, 1.02)
    left.set_title("accuracy: the class that was asked for", loc="left", fontsize=11, color=INK)
    right.plot(weights, [row["frechet"] for row in rows], marker="o", color=LINE)
    right.axhline(gaussian, linestyle="--", color=GREY, label="a Gaussian for each class")
    right.set_ylim(0, None)
    right.set_title("Fréchet distance in the judge's features", loc="left", fontsize=11, color=INK)
    right.legend(fontsize=9, frameon=False)
    for axes in (left, right):
        axes.set_xlabel("weight of guidance w", color=INK)
    save(made, run.dir / "guidance.png")


def scale(x: Tensor) -> int:
    """How much a picture is enlarged."""
    return max(1, 112 // x.shape[-1])
