"""The roofline of decoding (Williams et al. 2009). A step moves the weights and the batch's keys and values, and does
two FLOPs with each weight for each sequence:

    bytes  = weights + B · context · 2·L·Hkv·D·e          FLOPs = B · (2·P + 4·L·H·D · context)
    FLOP/s ≤ min(peak, FLOPs / bytes · bandwidth)

With one sequence there are 1 to 4 FLOPs a byte, far left of the ridge: memory decides. A larger batch moves to the
right along the slope. Bandwidth and peak are measured here, so every point is a share of what this machine has.
"""

from typing import Any

import torch

from finetune.inference.packed import read_bytes
from finetune.memory import shape_of
from finetune.memory.counts import linear_weights
from finetune.runs.plots import figure, save
from finetune.runs.run import Run

from . import plots
from .lab import Lab, seconds

BATCHES, CONTEXT = (1, 8, 32), 64


def measure(lab: Lab) -> dict[str, Any]:
    """Bandwidth (bytes/s), peak FLOP/s by dtype; bytes, FLOPs and seconds of a decode step by format and batch."""
    shape = shape_of(lab.model.config)
    matrices = shape.layers * linear_weights(shape) + shape.vocab * shape.dim
    points = []
    for format in lab.cfg.formats.split(","):
        model = lab.served(format)
        for batch in BATCHES:
            engine = lab.decoding(model, batch, CONTEXT, lab.cfg.rounds + 2)
            cache = engine.cache.nbytes / (engine.pool.count * engine.pool.block_size)  # of a token
            engine.step()
            points.append({
                "format": format,
                "batch": batch,
                "bytes": read_bytes(model) + batch * CONTEXT * cache,
                "flops": batch * (2 * matrices + 4 * shape.layers * shape.heads * shape.head_dim * CONTEXT),
                "seconds": plots.median([seconds(engine.step) for _ in range(lab.cfg.rounds)]),
            })  # fmt: skip
    return {"bandwidth": bandwidth(), "peak": {name: peak(dtype) for name, dtype in DTYPES.items()}, "points": points}


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def bandwidth(size: int = 1 << 28) -> float:
    """Bytes a second that a sum over `size` bytes reads, the best of some."""
    x = torch.ones(size // 4)
    return size / min(seconds(x.sum) for _ in range(12))


def peak(dtype: torch.dtype, size: int = 768) -> float:
    """FLOP/s of a product of large matrices, the best of some."""
    x, y = torch.randn(2, size, size).to(dtype)
    return 2 * size**3 / min(seconds(lambda: x @ y) for _ in range(6))


def share(found: dict[str, Any], point: dict[str, Any]) -> float:
    """Of the FLOP/s that the roof allows, those that were reached."""
    roof = min(max(found["peak"].values()), point["flops"] / point["bytes"] * found["bandwidth"])
    return float(point["flops"] / point["seconds"] / roof)


def judge(run: Run, found: dict[str, Any]) -> None:
    rows = []
    for point in found["points"]:
        rate = point["batch"] / point["seconds"]
        rows.append({
            "weights": point["format"],
            "batch": str(point["batch"]),
            "FLOP/byte": f"{point['flops'] / point['bytes']:.1f}",
            "tokens/s": f"{rate:.0f}",
            "of the roof": f"{share(found, point):.0%}",
        })  # fmt: skip
        if point["batch"] in (1, 8):
            run.check(f"roof_share_{point['format']}_{point['batch']}", share(found, point))
    run.check("bandwidth_gb_s", found["bandwidth"] / 1e9)
    run.table(f"decode steps; memory reads {found['bandwidth'] / 1e9:.1f} GB/s", rows)


def picture(run: Run, found: dict[str, Any]) -> None:
    """roofline.png: FLOP/s over FLOPs a byte, with the roofs of this machine."""
    made, (axes,) = figure(9.5, 5.2)
    intensity = [point["flops"] / point["bytes"] for point in found["points"]]
    low, high = min(intensity) / 2, 4 * max(max(found["peak"].values()) / found["bandwidth"], *intensity)
    slope = found["bandwidth"] / 1e9
    top = max(found["peak"].values()) / 1e9
    axes.plot([low, top / slope], [low * slope, top], color=plots.GREY, linewidth=2)
    axes.text(low * 1.1, low * slope * 1.5, f"{slope:.0f} GB/s", rotation=33, fontsize=9, color=plots.GREY)
    for name, value in found["peak"].items():
        style = "-" if value / 1e9 == top else "--"
        axes.plot([value / 1e9 / slope, high], [value / 1e9] * 2, style, color=plots.GREY, linewidth=2)
        axes.text(high, value / 1e9 * 1.08, f"{name} products, {value / 1e9:.0f} GFLOP/s", ha="right", fontsize=9,
                  color=plots.GREY)  # fmt: skip
    colors = dict(zip(("fp32", "bf16", "int8", "int4", "nf4"), (plots.RED, plots.AMBER, plots.GREEN, plots.BLUE,
                                                               plots.VIOLET), strict=True))  # fmt: skip
    for format in dict.fromkeys(point["format"] for point in found["points"]):
        part = [point for point in found["points"] if point["format"] == format]
        x = [point["flops"] / point["bytes"] for point in part]
        y = [point["flops"] / point["seconds"] / 1e9 for point in part]
        axes.plot(x, y, "o-", color=colors[format], label=format, linewidth=1)
        for point, a, b in zip(part, x, y, strict=True):
            axes.annotate(str(point["batch"]), (a, b), xytext=(5, -11), textcoords="offset points", fontsize=8)
    plots.logarithmic(axes, "x")
    plots.logarithmic(axes, "y")
    axes.legend(frameon=False, fontsize=9, title="weights; batch at the point", title_fontsize=9, loc="lower right")
    plots.titled(axes, "decoding under the roof of this machine", "FLOPs a byte", "GFLOP/s")
    save(made, run.dir / "roofline.png")
