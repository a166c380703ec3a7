"""The module's own pictures: the pipeline's timeline, what was sent, and how far it would scale."""

from collections.abc import Sequence
from typing import Any

from finetune.distributed.schedules import Event
from finetune.runs.checkpoint import write_json
from finetune.runs.plots import INK, figure, save
from finetune.runs.run import Run

from . import scale

FORWARD, BACKWARD, CHUNKS = "#1769aa", "#d98e2b", (1.0, 0.6, 0.35)
COLORS = ("#1769aa", "#7d5ba6", "#5aa469", "#d98e2b", "#b5493a", "#2a9d8f", "#8a6d3b", "#6b7f99", "#c06c9b", "#4f4f4f")


def timeline(run: Run, measured: Sequence[Event], planned: Sequence[Event], stages: int) -> None:
    """timeline.png: the passes of every stage in the run's last step, below them the schedule as planned, with backward
    passes twice as long as forward passes. trace.json: the same for chrome://tracing and Perfetto."""
    start = min(event.began for event in measured)
    own = [event._replace(began=(event.began - start) * 1e3, ended=(event.ended - start) * 1e3) for event in measured]
    made, (above, below) = figure(11, 1.6 + 1.1 * stages, 2, 1)
    for axes, events, title, unit in (
        (above, own, "measured: the last step", "milliseconds"),
        (below, planned, "planned: forward 1, backward 2", "forward passes"),
    ):
        for stage, step, began, ended in events:
            color, alpha = FORWARD if step.kind == "F" else BACKWARD, CHUNKS[step.chunk % 3]
            axes.barh(stage, ended - began, 0.82, began, color=color, alpha=alpha, edgecolor="white", linewidth=0.6)
            axes.text((began + ended) / 2, stage, str(step.micro), ha="center", va="center", fontsize=8, color="white")
        axes.set_yticks(range(stages), [f"stage {s}" for s in range(stages)], fontsize=9)
        axes.set_ylim(stages - 0.5, -0.5)
        axes.set_xlim(0, max(event.ended for event in events))
        axes.set_xlabel(unit, fontsize=9, color=INK)
        axes.set_title(title, loc="left", fontsize=10.5, color=INK)
        axes.grid(False)
    for color, label in ((FORWARD, "forward"), (BACKWARD, "backward")):
        above.barh(0, 0, color=color, label=label)
    above.legend(fontsize=8.5, frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    save(made, run.dir / "timeline.png")
    trace = [
        {"name": str(event.step), "cat": event.step.kind, "ph": "X", "pid": 0, "tid": event.stage,
         "ts": event.began * 1e3, "dur": (event.ended - event.began) * 1e3}
        for event in own
    ]  # fmt: skip
    write_json(run.dir / "trace.json", {"traceEvents": trace, "displayTimeUnit": "ms"})


def sent(run: Run, found: dict[str, Any]) -> None:
    """volume.png: bytes of one step over all ranks, of each layout, by kind and group; the mark is the formula."""
    if not any(sum(each.values()) for one in found.values() for each in one.counted):
        return
    made, [axes] = figure(9.6, 1.6 + 0.5 * len(found))
    colors: dict[tuple[str, str], str] = {}
    for y, one in enumerate(found.values()):
        left = 0.0
        for key in sorted({key for each in one.counted for key in each}):
            width = sum(each.get(key, 0) for each in one.counted) / 1e6
            if width < 0.001:  # the few numbers of loss and norm
                continue
            color = colors.setdefault(key, COLORS[len(colors) % len(COLORS)])
            axes.barh(y, width, 0.6, left, color=color, linewidth=0)
            left += width
        axes.text(left, y, f"  {left:.3g} MB", va="center", fontsize=8.5, color=INK)
        formula = sum(sum(each.values()) for each in one.formula) / 1e6
        axes.vlines(formula, y - 0.4, y + 0.4, color=INK, linewidth=1.8)
    for key, color in colors.items():
        axes.barh(0, 0, color=color, label=f"{key[0].replace('_', '-')} over {key[1].replace('_', ' · ')}")
    axes.plot([], [], color=INK, linewidth=1.8, label="sum of the formulas")
    axes.set_yticks(range(len(found)), list(found), fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("MB", fontsize=9, color=INK)
    axes.set_title("what all ranks send in one step", loc="left", fontsize=11, color=INK)
    axes.grid(False, axis="y")
    made.legend(fontsize=8.5, frameon=False, loc="outside lower center", ncols=4)
    save(made, run.dir / "volume.png")


def scaling(run: Run) -> None:
    """scaling.png: the share of the ideal throughput by number of GPUs, predicted from formulas and link speeds."""
    made, [axes] = figure(8.6, 4.6)
    for name, points in scale.predicted().items():
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, [100 * y for y in ys], marker="o", markersize=4, linewidth=1.8, label=name)
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 105)
    axes.set_xticks(scale.GPUS, [f"{n:,}" for n in scale.GPUS])
    axes.set_xlabel("GPUs (only where it fits in 80 GB)", fontsize=9, color=INK)
    axes.set_ylabel("% of the throughput without traffic and idle time", fontsize=9, color=INK)
    axes.set_title(f"predicted, not measured: {scale.CASE}", loc="left", fontsize=11, color=INK)
    axes.legend(fontsize=8.5, frameon=False)
    save(made, run.dir / "scaling.png")
