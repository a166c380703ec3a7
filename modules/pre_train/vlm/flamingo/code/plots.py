"""The pictures of a run: accuracy by shots, who sees which image, gates over the steps, what of an image is seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from finetune.runs.metrics import MAIN
from finetune.runs.plots import GREY, INK, LINE, figure, moving_average, save
from finetune.runs.run import Run

from .binding import Episodes, Pool
from .model import CrossAttention, Flamingo, media_mask

COLORS = (LINE, "#d97706", "#059669", "#9333ea", "#dc2626")


def by_shots(run: Run, curves: dict[str, dict[int, float]], chance: float) -> None:
    """shots.png: accuracy of each curve over the number of examples in the prompt."""
    made, (axes,) = figure(6.4, 3.6)
    for color, (name, curve) in zip(COLORS, curves.items(), strict=False):
        axes.plot([*curve], [*curve.values()], "o-", color=color, label=name, linewidth=1.6, markersize=4)
    axes.axhline(chance, color=GREY, linestyle="--", linewidth=1, label="chance")
    axes.set(xlabel="images with their words in the prompt", ylabel="accuracy", ylim=(0, 1.03))
    axes.set_xticks(sorted({shots for curve in curves.values() for shots in curve}))
    axes.legend(fontsize=8, frameon=False)
    save(made, run.dir / "shots.png")


def mask(run: Run, net: Flamingo, tokens: Tensor, words: Sequence[str]) -> None:
    """mask.png: which latents each token of a sequence (T,) sees."""
    shown = (tokens == net.image)[None]
    images, latents = int(shown.sum()), net.config.latents
    before = torch.zeros(1, dtype=torch.int64)
    seen = media_mask(shown, images, latents, before, net.config.only_preceding)[0]
    made, (axes,) = figure(1.2 + 0.16 * seen.shape[1], 1.2 + 0.2 * len(tokens))
    axes.imshow(seen.float(), cmap="Blues", vmin=0, vmax=1.4, aspect="auto")
    axes.grid(False)
    for image in range(1, images):
        axes.axvline(image * latents - 0.5, color=GREY, linewidth=0.8)
    axes.set_yticks(range(len(words)), words, fontsize=8)
    axes.set_xticks([(i + 0.5) * latents - 0.5 for i in range(images)], [f"image {i + 1}" for i in range(images)])
    axes.set_xlabel(f"{latents} latents of each image")
    save(made, run.dir / "mask.png")


def gates(run: Run) -> None:
    """gates.png: tanh of every gate over the steps, and the share of known words that is right."""
    series = run.metrics.series()
    found = {name: series[name] for name in series if name.endswith(("_attn", "_mlp")) and ":" not in name}
    if not found:
        return
    made, (top, below) = figure(6.4, 4.6, 2, 1)
    for i, (name, (xs, ys)) in enumerate(found.items()):
        layer, kind = name.rsplit("_", 1)
        style = "-" if kind == "attn" else ":"
        top.plot(xs, ys, style, color=COLORS[i // 2 % len(COLORS)], label=f"before block {layer}, {kind}")
    below.plot(*series["right"], color=INK, linewidth=1)
    top.set(ylabel="tanh of the gate")
    top.legend(fontsize=7, frameon=False, ncols=2)
    below.set(xlabel="step", ylabel="known words, right", ylim=(0, 1.03))
    save(made, run.dir / "gates.png")


def lesson(run: Run, ways: dict[str, str]) -> None:
    """lesson.png: the share of known words that is right while training, of each phase that `ways` names."""
    series = run.metrics.series()
    if "right" not in series:
        return
    made, (axes,) = figure(6.4, 3.6)
    for color, (phase, label) in zip(COLORS, ways.items(), strict=False):
        xs, ys = series["right" if phase == MAIN else f"{phase}: right"]
        axes.plot(xs, moving_average(ys, 15), color=color, linewidth=1.6, label=label)
    axes.set(xlabel="step", ylabel="known words, right", ylim=(0, 1.03))
    axes.legend(fontsize=8, frameon=False)
    save(made, run.dir / "lesson.png")


@contextmanager
def inputs_of(module: nn.Module) -> Iterator[list[tuple[Any, ...]]]:
    """Collects what a module is called with."""
    calls: list[tuple[Any, ...]] = []
    hook = module.register_forward_pre_hook(lambda _, inputs: calls.append(inputs))
    try:
        yield calls
    finally:
        hook.remove()


def weights(attention: CrossAttention, call: tuple[Any, ...]) -> Tensor:
    """(B, T, N): softmax weights of one call of a CrossAttention, the mean of its heads."""
    x, (k, _), seen = (*call, None)[:3]
    q = attention.q(x).unflatten(-1, (attention.heads, -1))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    if seen is not None:
        scores = scores.masked_fill(~seen[:, None], -torch.inf)
    return scores.softmax(-1).nan_to_num().mean(1)


@torch.no_grad()
def looked_at(net: Flamingo, features: Tensor, tokens: Tensor) -> Tensor:
    """(M, patches) of one sequence, features (M, frames, patches, C) and tokens (T,): how much the token of each image
    attends to each patch: the weights of the first gated layer over the latents, times those of the resampler's last
    layer over the patches (its frames added up)."""
    first, last = next(iter(net.layers().values())).attn, net.resampler.last.attn
    with inputs_of(last) as inner, inputs_of(first) as outer:
        net.hidden(tokens[None], net.media(features[None]))
    patches = features.shape[-2]
    over = weights(last, inner[0])[..., : features.shape[1] * patches]  # (M, latents, frames · patches)
    by_image = weights(first, outer[0])[0][tokens == net.image]  # (M, M · latents)
    images = len(by_image)
    own = by_image.unflatten(1, (images, -1))[torch.arange(images), torch.arange(images)]  # (M, latents)
    return torch.einsum("ml,mlp->mp", own, over.unflatten(2, (-1, patches)).sum(2))


def attention(run: Run, net: Flamingo, pool: Pool, batch: Episodes, pictures: Tensor, names: list[list[str]]) -> None:
    """attention.png: the images of some sequences, with what their tokens attend to laid over them.

    pictures: (N, C, side, side) in [−1, 1] as the encoder sees them; names: the word of each image."""
    rows, columns = len(batch.images), batch.images.shape[1]
    made, axes = figure(1.15 * columns, 1.45 * rows, rows, columns)
    tokens = batch.asked(net.image, net.end_of_chunk)
    for row in range(rows):
        heat = looked_at(net, pool.features[batch.images[row]], tokens[row])
        side = round(heat.shape[1] ** 0.5)
        for column in range(columns):
            ax = axes[row * columns + column]
            picture = pictures[batch.images[row, column, 0]]
            size = picture.shape[-1]
            ax.imshow(picture.mean(0), cmap="gray", extent=(0, size, size, 0))
            map_ = heat[column].view(side, side)
            ax.imshow(map_ / map_.max(), cmap="inferno", alpha=0.55, extent=(0, size, size, 0), vmin=0, vmax=1)
            ax.set_title(names[row][column] if column + 1 < columns else "?", fontsize=8, color=INK)
            ax.set_axis_off()
    save(made, run.dir / "attention.png")
