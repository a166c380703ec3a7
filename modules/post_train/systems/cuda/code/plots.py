"""The pictures of a run: every level under the roofs of two GPUs, and what each level does to memory."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from finetune.runs.checkpoint import atomic_write
from finetune.runs.plots import FAINT, INK, LINE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from finetune.runs.run import Run

    from .measure import Count

# Peaks without sparsity: TFLOP/s of fp32 and of bf16 tensor cores, TB/s of the memory.
# NVIDIA A100 Tensor Core GPU datasheet (SXM, 80 GB); NVIDIA H100 Tensor Core GPU datasheet (SXM: 1,979 with sparsity).
GPUS = {"A100": (19.5, 312.0, 2.039), "H100": (67.0, 989.5, 3.35)}
COLORS = {"reduction": "#8a6d3b", "softmax": "#2e7d32", "matmul": "#1769aa", "attention": "#c53030"}


def roofline(run: Run, found: dict[str, list[Count]]) -> None:
    """Every level at its arithmetic intensity, on the roof that it is under. A model: nothing was timed."""
    shown = {topic: [c for c in counts if c.flops] for topic, counts in found.items()}
    shown = {topic: counts for topic, counts in shown.items() if counts}
    if not shown:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.8), dpi=120, layout="constrained")
    grid = figure.subplots(1, 2, sharey=True)
    least = min(c.intensity for counts in shown.values() for c in counts)
    xs = [least / 2 * 1.05**i for i in range(400) if least / 2 * 1.05**i <= 2000]
    for axes, (gpu, (plain, tensor, memory)) in zip(grid, GPUS.items(), strict=True):
        for peak, text, style in ((plain, "fp32", "--"), (tensor, "bf16 tensor cores", "-")):
            axes.plot(xs, [min(peak, memory * x) for x in xs], style, color=INK, linewidth=1.4, zorder=1)
            axes.text(xs[-1], peak * 1.08, f"{text}: {peak:g} TFLOP/s", ha="right", va="bottom", fontsize=9, color=INK)
        axes.annotate(f"memory: {memory:g} TB/s", (2.0, 2.0 * memory), textcoords="offset points", xytext=(12, -8),
                      fontsize=9, color=INK)  # fmt: skip
        for topic, counts in shown.items():
            points = [(c.intensity, min(tensor if c.mma + c.wgmma else plain, memory * c.intensity)) for c in counts]
            axes.plot(*zip(*points, strict=True), color=COLORS[topic], linewidth=0.8, alpha=0.5, zorder=2)
            axes.scatter(*zip(*points, strict=True), color=COLORS[topic], s=36, zorder=3, label=topic)
            label(axes, counts, points, COLORS[topic], below=topic == "matmul")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(f"{gpu}: peaks of the data sheet", loc="left", fontsize=11.5, color=INK)
        axes.set_xlabel("arithmetic intensity: FLOP per byte of counted sectors", color=INK)
        axes.grid(True, which="major", color="#e4e7eb", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0].set_ylabel("TFLOP/s that this traffic allows", color=INK)
    grid[0].legend(loc="lower right", fontsize=9, frameon=False)
    figure.suptitle("Roofline — a model, not a measurement: sectors counted by the emulator, no cache, no time",
                    fontsize=12.5, color=INK, fontweight="bold")  # fmt: skip
    with atomic_write(run.dir / "roofline.png") as temporary:
        figure.savefig(temporary, format="png")


def label(axes: Axes, counts: list[Count], points: list[tuple[float, float]], color: str, below: bool) -> None:
    """The levels' numbers at their points; levels at one place share a label."""
    groups: list[tuple[tuple[float, float], list[int]]] = []
    for c, point in zip(counts, points, strict=True):
        for place, numbers in groups:
            if all(abs(math.log10(a / b)) < 0.05 for a, b in zip(point, place, strict=True)):
                numbers.append(c.level)
                break
        else:
            groups.append((point, [c.level]))
    for point, numbers in groups:
        axes.annotate(ranges(numbers), point, textcoords="offset points", xytext=(7, -14) if below else (-5, 5),
                      ha="center" if below else "right", fontsize=8.5, color=color)  # fmt: skip


def ranges(numbers: list[int]) -> str:
    """`4–5, 7` of 4, 5, 7."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def bars(run: Run, found: dict[str, list[Count]]) -> None:
    """Sectors of global memory and wavefronts of shared memory, level by level."""
    found = {topic: counts for topic, counts in found.items() if counts}
    if not found:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 2.5 * len(found)), dpi=110, layout="constrained")
    grid = figure.subplots(len(found), 2, squeeze=False)
    for (left, right), (topic, counts) in zip(grid, found.items(), strict=True):
        names = [f"{c.level} {c.name}" for c in counts][::-1]
        for axes, values, ideal, title in (
            (left, [c.sectors for c in counts], [c.least_bytes / 32 for c in counts], "sectors of global memory"),
            (right, [c.wavefronts for c in counts], [c.ideal for c in counts], "wavefronts of shared memory"),
        ):
            values, ideal = values[::-1], ideal[::-1]  # barh draws from below
            axes.barh(names, values, color=FAINT if axes is right else LINE, height=0.62, label="counted")
            if axes is right:
                axes.barh(names, ideal, color=LINE, height=0.62, label="without conflicts")
            else:
                axes.axvline(ideal[0], color="#c53030", linewidth=1.2, linestyle="--", label="each byte once")
            room = max(values) * 1.18 or 1
            for i, value in enumerate(values):
                axes.text(value + room * 0.008, i, f"{value:,}", va="center", fontsize=8.5, color=INK)
            axes.set_xlim(0, room)
            axes.set_title(f"{topic}: {title}", loc="left", fontsize=10.5, color=INK)
            axes.tick_params(labelsize=8.5, colors=INK)
            axes.spines[["top", "right"]].set_visible(False)
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.locator_params(axis="x", nbins=5)
            if topic == next(iter(found)):
                axes.legend(fontsize=8, frameon=False, loc="lower right")
        right.set_yticklabels([])
        if not any(c.wavefronts for c in counts):
            right.clear()
            right.set_axis_off()
            right.text(0.02, 0.5, f"{topic} uses no shared memory", fontsize=9.5, color=INK, transform=right.transAxes)
    with atomic_write(run.dir / "levels.png") as temporary:
        figure.savefig(temporary, format="png")
