"""The module's own pictures: the loss of every format, the exponents of the gradients, the loss scale."""

import torch
from torch import Tensor

from finetune.runs.plots import GOOD, INK, figure, moving_average, save
from finetune.runs.run import Run

COLORS = {"fp32": "#1f2933", "bf16": "#1769aa", "bf16_no_master": "#b7791f", "bf16_stochastic": "#63b3ed",
           "fp16": "#c53030", "fp16_scaled": "#2e7d32", "fp8": "#805ad5"}  # fmt: skip


def losses(run: Run, held_out: dict[str, float]) -> None:
    """loss_by_format.png: moving averages of the training loss; the held-out loss in the legend."""
    series = run.metrics.series()
    if not series:
        return
    made, [axes] = figure(9.6, 4.6)
    for name, value in held_out.items():
        if f"{name}: loss" not in series:
            continue
        xs, ys = series[f"{name}: loss"]
        line = {"linestyle": "--", "linewidth": 1.6} if name == "fp32" else {"linewidth": 1.8, "alpha": 0.85}
        axes.plot(xs, moving_average(ys, max(3, len(ys) // 20)), color=COLORS[name], label=f"{name}  {value:.3f}",
                  zorder=3 if name == "fp32" else 2, **line)  # fmt: skip
    axes.set_title("training loss by number format (moving average)", loc="left", fontsize=12, color=INK)
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel("nats a character", color=INK)
    axes.legend(title="held-out loss at the end", fontsize=9, title_fontsize=9, frameon=False, loc="center left",
                bbox_to_anchor=(1.01, 0.5))  # fmt: skip

    save(made, run.dir / "loss_by_format.png")


def exponents(run: Run, gradients: dict[str, Tensor]) -> None:
    """gradient_exponents.png: the exponents of the fp32 gradients, over the range of fp16."""
    made, [axes] = figure(8.6, 4.6)
    kept = {name: g[g != 0].abs().double().log2().floor() for name, g in gradients.items()}
    low = min(-44, *(int(x.quantile(0.001)) for x in map(sample, kept.values()))) - 1
    high = 4
    for (left, right), color, text in (
        ((low, -25), "#fde8e8", "fp16: 0"),
        ((-25, -14), "#fdf6e3", "subnormal:\nfewer bits"),
        ((-14, high), "#e9f5ec", "normal: 11 bits"),
    ):
        axes.axvspan(left, right, color=color, zorder=0, linewidth=0)
        axes.text((left + right) / 2, 0.985, text, ha="center", va="top", fontsize=9.5, color=INK,
                  transform=axes.get_xaxis_transform())  # fmt: skip
    for (name, x), color in zip(kept.items(), ("#1769aa", "#b7791f"), strict=True):
        counts = torch.histc(x.clamp(low, high - 1).float(), high - low, low, high) / len(x) * 100
        axes.stairs(counts.tolist(), range(low, high + 1), color=color, linewidth=2, label=f"gradients of {name}")
    axes.set_xlim(low, high)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.22)
    axes.set_xlabel("exponent: ⌊log₂ |g|⌋ of the fp32 gradient of the unscaled loss", color=INK)
    axes.set_ylabel("% of the nonzero elements", color=INK)
    axes.set_title("a loss scale of 2ˢ moves the curves s to the right", loc="left", fontsize=12, color=INK)
    axes.legend(fontsize=9, frameon=False, loc="center right")
    save(made, run.dir / "gradient_exponents.png")


def sample(x: Tensor) -> Tensor:
    """At most 100 000 of the values: torch's quantile takes no more than 16 million."""
    return x[:: max(1, len(x) // 100_000)]


def loss_scale(run: Run, policy: str) -> None:
    """loss_scale.png: the factor at each step, and the steps that overflowed and were skipped."""
    series = run.metrics.series().get("fp16_scaled: scale")
    if series is None:
        return
    xs, ys = series
    skipped = [x for x, here, after in zip(xs, ys, ys[1:], strict=False) if after < here]
    made, [axes] = figure(8, 3.8)
    axes.step(xs, ys, where="post", color=GOOD, linewidth=1.8, label="scale")
    axes.plot(
        skipped, [ys[xs.index(x)] for x in skipped], "x", color="#c53030", markersize=7, label="overflow: skipped"
    )
    axes.set_yscale("log", base=2)
    axes.set_title(f"dynamic loss scaling, policy: {policy}", loc="left", fontsize=12, color=INK)
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel("factor", color=INK)
    axes.legend(fontsize=9, frameon=False)
    save(made, run.dir / "loss_scale.png")
