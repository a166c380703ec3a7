"""Quantized weights: bytes, speed, and what it costs. Decoding waits for weights, so half the bytes are up to twice the
speed. A group of weights along a row shares a scale:

    int8   code · scale              a scale a row                   8 bits  + 32/K a weight
    int4   code · scale + minimum    fp16, of 32 weights             4 + 1 bits
    nf4    TABLE[code] · scale       fp32, of 64 weights             4 + .5 bits (Dettmers et al. 2023)

The cost is measured on text: the loss, KL(p of fp32 ‖ q of the format) of the next token, and how often the most likely
token is the same. "naive int4" is one scale a row and no minimum, for the head too: what the groups are for.
"""

import copy
from dataclasses import asdict
from typing import Any

from torch import nn

from finetune.inference.packed import read_bytes
from finetune.inference.quality import quality
from finetune.lm.llama import Llama
from finetune.runs.display import size
from finetune.runs.plots import figure, save
from finetune.runs.run import Run

from . import plots
from .lab import Lab, seconds

ROWS, LENGTH, CONTEXT = 6, 128, 32  # rows of the text, their tokens; tokens before the timed steps
MOST_LOST = {"int8": 0.02, "int4": 0.15}  # nats of loss


def measure(lab: Lab) -> dict[str, Any]:
    """By format: bytes and milliseconds of a token at batch 1, loss, KL from fp32, agreement with it."""
    text = lab.reference[-ROWS * LENGTH :]
    rows = [text[i : i + LENGTH] for i in range(0, len(text), LENGTH)]
    formats = lab.cfg.formats.split(",")
    found: dict[str, Any] = {}
    for format in formats:
        model = lab.served(format)
        found[format] = {"bytes": read_bytes(model), **asdict(quality(model, lab.model, rows))}
    found["naive int4"] = asdict(quality(naive(lab.model), lab.model, rows))
    engines = [lab.decoding(lab.served(name), 1, CONTEXT, lab.cfg.rounds + 2) for name in formats]
    times: dict[str, list[float]] = {name: [] for name in formats}
    for _ in range(lab.cfg.rounds + 1):  # the formats take turns, so that noise meets all alike
        for name, engine in zip(formats, engines, strict=True):
            times[name].append(seconds(engine.step))
    for name, steps in times.items():
        found[name]["ms"] = 1e3 * plots.median(steps[1:])
    return found


def naive(model: Llama) -> Llama:
    """Every matrix rounded to 15 values, with one scale a row."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            scale = module.weight.data.abs().amax(1, keepdim=True) / 7
            module.weight.data = (module.weight.data / scale).round() * scale
    return model


def judge(run: Run, found: dict[str, Any]) -> None:
    exact = found["fp32"]["loss"]
    for format, most in MOST_LOST.items():
        if format in found:
            loss = found[format]["loss"]
            run.check(f"loss_{format}_more", loss - exact, at_most=most)
    if "int4" in found:
        target = exact + MOST_LOST["int4"]
        run.result(
            "loss_int4", found["int4"]["loss"], baseline=found["naive int4"]["loss"], target=target, higher=False
        )
        run.check("int4_times_fewer_bytes", found["fp32"]["bytes"] / found["int4"]["bytes"])
        run.check("int4_times_faster", found["fp32"]["ms"] / found["int4"]["ms"])
    rows = []
    for format, part in found.items():
        run.check(f"kl_{format.replace(' ', '_')}", part["divergence"])
        timed = "ms" in part
        rows.append({
            "weights": format,
            "bytes a token": size(part["bytes"]) if timed else "–",
            "speed": f"{found['fp32']['ms'] / part['ms']:.2f} ×" if timed else "–",
            "loss": f"{part['loss']:.3f}",
            "KL": f"{max(part['divergence'], 0):.4f}",
            "same token": f"{part['same']:.1%}",
        })  # fmt: skip
    run.table("weights in fewer bits", rows)


def picture(run: Run, found: dict[str, Any]) -> None:
    """quantization.png: speed by bytes a token; loss and KL by format."""
    made, (left, middle, right) = figure(14, 4.3, 1, 3)
    timed = {format: part for format, part in found.items() if "ms" in part}
    fp32 = found["fp32"]
    x = [fp32["bytes"] / part["bytes"] for part in timed.values()]
    left.plot([1, max(x)], [1, max(x)], "--", color=plots.GREY, label="as bytes say")
    for format, part in timed.items():
        point = fp32["bytes"] / part["bytes"], fp32["ms"] / part["ms"]
        left.plot(*point, "o", color=plots.BLUE)
        left.annotate(format, point, xytext=(6, -10), textcoords="offset points", fontsize=9)
    left.set_ylim(0, None)
    left.legend(frameon=False, fontsize=9)
    plots.titled(left, "speed of a token", "times fewer bytes than fp32", "times faster than fp32")
    names = list(found)
    for axes, key, title in ((middle, "loss", "loss on text"), (right, "divergence", "KL from fp32")):
        values = [max(found[name][key], 1e-9) for name in names]
        colors = [plots.RED if name == "naive int4" else plots.BLUE for name in names]
        axes.bar(names, values, color=colors)
        axes.tick_params(axis="x", rotation=30)
        plots.titled(axes, title, "", "nats a token")
    middle.set_ylim(0.9 * min(found[name]["loss"] for name in names), None)
    right.set_yscale("log")
    right.set_ylim(1e-7, None)
    save(made, run.dir / "quantization.png")
