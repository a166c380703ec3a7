"""The pictures of a run: samples, every sampler by its steps, inpainting, interpolation, an animation, the oracle."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.diffusion import draw, fidelity, images
from finetune.diffusion.judge import Judge
from finetune.diffusion.process import Process
from finetune.diffusion.trained import Trained
from finetune.errors import UserError
from finetune.runs import plots
from finetune.runs.run import Run

COLORS = {"ddpm": "#8a6d3b", "ddim": "#1769aa", "euler": "#2a9d8f", "heun": "#b5493a", "dpm_solver_2m": "#7d5ba6"}
NAMES = {"ddpm": "DDPM", "ddim": "DDIM", "euler": "Euler", "heun": "Heun", "dpm_solver_2m": "DPM-Solver++ 2M"}


def write(cfg: Any, run: Run, model: Trained, train: images.Images, test: images.Images, judge: Judge | None) -> None:
    """All pictures of the trained network."""
    every_sampler(cfg, run, model, test, judge)
    animation(run.dir, model)
    interpolation(run.dir / "interpolation.png", model)
    inpainting(run, model, test)
    nearest(run, model, train)


def by_class(x: Tensor, labels: Tensor, classes: int, rows: int = 8, most: int = 16) -> Tensor:
    """A column for each of the first classes, `rows` images deep."""
    columns = min(classes, most)
    chosen = torch.zeros(rows * columns, *x.shape[1:], dtype=torch.uint8)
    for label in range(columns):
        for row, i in enumerate((labels == label).nonzero()[:rows, 0].tolist()):
            chosen[row * columns + label] = x[i]
    return images.grid(chosen, columns, enlarge=enlarged(x))


def enlarged(x: Tensor) -> int:
    """How much images are enlarged to about 48 pixels a side."""
    return max(1, 48 // max(x.shape[-2:]))


def every_sampler(cfg: Any, run: Run, model: Trained, test: images.Images, judge: Judge | None) -> None:
    """The same network and the same noise by every sampler that suits it, 1 to 100 steps: a picture and a curve."""
    counts = [n for n in ((1, 2, 5, 10, 20) if run.toy else (1, 2, 3, 5, 10, 20, 50, 100)) if n <= model.process.T]
    count = 64 if run.toy or max(model.image) > 16 else 256  # larger images take their time
    labels = torch.arange(count) % len(model.classes)
    measure = judge.features if judge else fidelity.pixels
    real = measure(test.x)
    strips: dict[str, list[Tensor]] = {}
    curve: dict[str, list[tuple[int, float]]] = {}
    for sampler in draw.SAMPLERS:
        for steps in counts:
            try:
                draw.check(model.process, sampler, steps, "trailing")
            except UserError:  # a flow has no DDPM, zero terminal SNR no σ
                continue
            drawn = model.draw(labels, seed=cfg.seed, guidance=cfg.guidance, sampler=sampler, steps=steps)
            strips.setdefault(sampler, []).append(images.grid(drawn[:4], 2))
            evaluations = 2 * steps - 1 if sampler == "heun" else steps
            curve.setdefault(sampler, []).append((evaluations, fidelity.frechet(measure(drawn), real)))
    made, axes = plots.figure(1.1 * len(counts) + 1.2, 1.1 * len(strips) + 0.5, len(strips), len(counts))
    for i, (sampler, row) in enumerate(strips.items()):
        for j, picture in enumerate(row):
            panel = axes[i * len(counts) + j]
            panel.imshow(picture.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=255)
            panel.set_xticks([])
            panel.set_yticks([])
            panel.grid(False)
            if i == 0:
                panel.set_title(f"{counts[j]} step{'s' * (counts[j] > 1)}", fontsize=9)
            if j == 0:
                panel.set_ylabel(NAMES[sampler].replace(" ", "\n"), fontsize=9)
    plots.save(made, run.dir / "samplers.png")
    made, (axis,) = plots.figure(6.4, 4)
    for sampler, points in curve.items():
        axis.plot(*zip(*points, strict=True), "o-", color=COLORS[sampler], label=NAMES[sampler], markersize=4)
    axis.set(
        xscale="log", yscale="log", xlabel="evaluations of the network", ylabel="Fréchet distance to held-out images"
    )
    axis.set_title("in the judge's features" if judge else "in pixels", fontsize=10)
    axis.legend(fontsize=8, frameon=False)
    plots.save(made, run.dir / "samplers_curve.png")


def animation(folder: Path, model: Trained) -> None:
    """The denoising of an image of each class: what x₀ the network believes in, from noise to the end."""
    labels = torch.arange(min(len(model.classes), 10)).repeat_interleave(2)
    sampler = "euler" if model.process.kind == "flow" else "ddim"
    trace: list[Tensor] = []
    last = model.draw(labels, seed=7, sampler=sampler, steps=min(40, model.process.T), trace=trace)
    frames = [images.to_bytes(x) for x in trace] + [last]
    images.animation(folder / "denoising.gif", [images.grid(x, 10, enlarge=enlarged(x)) for x in frames])


def interpolation(path: Path, model: Trained, rows: int = 5, columns: int = 9) -> None:
    """Between two noises of one label, on the arc between them; a deterministic sampler, so that the image follows."""
    sampler = "euler" if model.process.kind == "flow" else "ddim"
    labels = (torch.arange(rows) % len(model.classes)).repeat_interleave(columns)
    first, second = (draw.Noise([seed + 10 * row for row in range(rows)], model.image)() for seed in (1, 2))
    share = torch.linspace(0, math.pi / 2, columns)[None, :, None, None, None]
    noise = (share.cos() * first[:, None] + share.sin() * second[:, None]).flatten(0, 1)
    predict = draw.classifier_free(model.net, labels, 1.0)
    model.net.eval()
    steps = min(25, model.process.T)
    drawn = images.to_bytes(draw.draw(predict, model.process, lambda: noise, sampler=sampler, steps=steps))
    images.save(path, images.grid(drawn, columns, enlarge=enlarged(drawn)))


def inpainting(run: Run, model: Trained, test: images.Images, rows: int = 6, columns: int = 6) -> None:
    """Held-out images, what is kept of them (the upper half), and what the network adds; kept pixels stay exact."""
    chosen = test[torch.randperm(len(test), generator=run.generator("inpainting"))[:rows]]
    x = images.to_unit(chosen.x)
    mask = torch.zeros(model.image, dtype=torch.bool)
    mask[:, : model.image[1] // 2] = True
    kept = torch.where(mask, chosen.x, torch.full_like(chosen.x, 96))
    sampler = "euler" if model.process.kind == "flow" else "ddpm"
    steps = min(25 if run.toy else 250, model.process.T)
    made = []
    for column in range(columns):
        predict = draw.classifier_free(model.net, chosen.labels, 1.0)
        noise = draw.Noise([1000 * column + row for row in range(len(chosen))], model.image)
        made.append(
            images.to_bytes(draw.draw(predict, model.process, noise, sampler=sampler, steps=steps, known=(x, mask)))
        )
    wrong = max(int((m[:, mask].int() - chosen.x[:, mask].int()).abs().max()) for m in made)
    run.check("inpainting_known_pixels_off", wrong, at_most=0)
    rows_of = torch.stack([chosen.x, kept, *made], 1).flatten(0, 1)
    images.save(run.dir / "inpainting.png", images.grid(rows_of, columns + 2, enlarge=enlarged(rows_of)))


def nearest(run: Run, model: Trained, train: images.Images, columns: int = 10) -> None:
    """Drawn images above the training images nearest to them: what copying would look like."""
    labels = torch.arange(columns) % len(model.classes)
    drawn = model.draw(labels, seed=3, **default_sampler(model.process))
    near = torch.cdist(fidelity.pixels(drawn), fidelity.pixels(train.x)).topk(2, largest=False).indices
    rows = torch.cat([drawn, train.x[near[:, 0]], train.x[near[:, 1]]])
    images.save(run.dir / "nearest.png", images.grid(rows, columns, enlarge=enlarged(rows)))


def default_sampler(process: Process) -> dict[str, Any]:
    """A sampler that suits every process: Euler for a flow, else DDIM."""
    return {"sampler": "euler" if process.kind == "flow" else "ddim", "steps": min(25, process.T)}


def bound_by_t(path: Path, process: Process, terms: Tensor) -> None:
    """The bound's terms by timestep, and what they add up to."""
    made, (left, right) = plots.figure(9, 3.4, 1, 2)
    left.plot(terms.clamp(min=1e-7), color=plots.LINE, linewidth=0.8)
    left.set(yscale="log", xlabel="t", ylabel="bits a dimension", title="terms of the bound")
    right.plot(terms.cumsum(0), color=plots.LINE)
    right.set(xlabel="t", ylabel="bits a dimension", title="their sum up to t")
    plots.save(made, path)
    assert len(terms) == process.T


def oracle(path: Path, points: Tensor, counts: list[int], errors: dict[str, list[float]]) -> None:
    """What the network learned of the 2-D mixture, and the error of each sampler with the exact denoiser."""
    made, (left, right) = plots.figure(9, 4, 1, 2)
    left.scatter(*points.T.tolist(), s=1.5, color=plots.LINE, alpha=0.5, linewidths=0)
    left.set(title="4,000 points drawn from the learned ε", aspect="equal")
    for name, row in errors.items():
        style = "o-" if name != "ddim" else "s-"  # Euler's step in σ is DDIM's: the lines coincide
        right.plot(counts, row, style, color=COLORS[name], label=NAMES[name], markersize=8 if name == "ddim" else 4)
    for power in (1, 2):
        start = errors["ddim" if power == 1 else "heun"][-1] * (1.6 if power == 1 else 0.6)
        right.plot(counts, [start * (counts[-1] / n) ** power for n in counts], "--", color=plots.FAINT, linewidth=1)
        right.text(counts[0], start * (counts[-1] / counts[0]) ** power, f"order {power}", fontsize=8, color=plots.INK)
    right.set(xscale="log", yscale="log", xlabel="steps", ylabel="distance from the exact solution",
              title="exact denoiser: order of convergence")  # fmt: skip
    right.legend(fontsize=8, frameon=False)
    plots.save(made, path)
