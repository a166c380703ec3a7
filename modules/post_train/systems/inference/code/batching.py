"""Batch size against throughput and latency. A decode step reads every weight once, whatever the number of sequences:
until the products of B rows take longer than that, a larger batch costs nothing.

    step ≈ max(weight bytes / bandwidth, 2·P·B / FLOP/s) + B · (its keys and values / bandwidth)
    throughput = B / step        time between two tokens of one user = step
"""

from typing import Any

from finetune.runs.plots import figure, save
from finetune.runs.run import Run

from . import plots
from .lab import Lab, seconds

CONTEXT, TARGET_BATCH = 64, 16  # tokens of each sequence; the batch with a target


def measure(lab: Lab) -> dict[str, Any]:
    """Median milliseconds of a decode step by batch size. The sizes take turns, so that noise meets all alike."""
    model, sizes = lab.served(), (1, 2, 4, 8, 16, 32)
    engines = {size: lab.decoding(model, size, CONTEXT, lab.cfg.rounds + 2) for size in sizes}
    times: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(lab.cfg.rounds + 1):
        for size, engine in engines.items():
            times[size].append(seconds(engine.step))
    return {"size": list(sizes), "ms": [plots.median(times[size][1:]) * 1e3 for size in sizes]}


def judge(run: Run, found: dict[str, Any]) -> None:
    rate = {size: size / ms for size, ms in zip(found["size"], found["ms"], strict=True)}
    # The weights of the toy are so few that a step is mostly the engine's own work for each sequence.
    run.result("batch_throughput", rate[TARGET_BATCH] / rate[1], baseline=1, target=2 if run.toy else 4)
    run.check("batch_latency", rate[1] / rate[TARGET_BATCH] * TARGET_BATCH)


def picture(run: Run, found: dict[str, Any]) -> None:
    """batching.png: tokens a second of all sequences, and milliseconds between two tokens of each."""
    made, (left, right) = figure(11.5, 4.4, 1, 2)
    sizes, rate = found["size"], [1e3 * size / ms for size, ms in zip(found["size"], found["ms"], strict=True)]
    left.plot(sizes, [rate[0] * size for size in sizes], "--", color=plots.GREY, label="as if rows were free")
    left.plot(sizes, rate, "o-", color=plots.BLUE, label="measured")
    right.plot(sizes, found["ms"], "o-", color=plots.RED)
    left.set_yscale("log", base=2)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
    left.yaxis.set_major_formatter("{x:.0f}")
    right.set_ylim(0, None)
    left.legend(frameon=False, fontsize=9)
    plots.titled(left, "throughput: all sequences together", "sequences in the batch", "tokens a second")
    plots.titled(right, "latency: between two tokens of one sequence", "sequences in the batch", "milliseconds")
    save(made, run.dir / "batching.png")
