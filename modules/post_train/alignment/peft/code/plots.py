"""comparison.png: held-out loss against the number of trained parameters, and the training loss of each method."""

from typing import TYPE_CHECKING

from finetune.runs.plots import FAINT, GREY, INK, figure, moving_average, save
from finetune.runs.run import Run

if TYPE_CHECKING:
    from .main import Result

COLORS = {"full": "#1f2933", "lora": "#1769aa", "rslora": "#63b3ed", "dora": "#2e7d32", "pissa": "#b7791f",
           "nf4": "#805ad5", "int8": "#c06c9b", "prompt": "#c53030", "prefix": "#dd6b20"}  # fmt: skip


def comparison(run: Run, results: "list[Result]", before: float) -> None:
    """Writes comparison.png."""
    made, (left, right) = figure(13, 5, 1, 2)
    ordered = sorted(results, key=lambda r: r.trained)
    for group in neighbors(ordered):
        place = group[0].trained, max(r.loss for r in group)
        for i, r in enumerate(sorted(group, key=lambda r: r.loss)):
            left.scatter(r.trained, r.loss, s=46, color=COLORS[r.method.kind], zorder=3)
            left.annotate(r.method.name, place, (0, 8 + 11 * i), textcoords="offset points", ha="center",
                          fontsize=8.5, color=COLORS[r.method.kind])  # fmt: skip
    ranks = [r for r in ordered if r.method.kind == "lora"]
    left.plot([r.trained for r in ranks], [r.loss for r in ranks], color=COLORS["lora"], linewidth=1, alpha=0.5)
    left.axhline(before, color=GREY, linewidth=1.2, linestyle="--", label=f"base {before:.3f}")
    if (full := next((r for r in results if r.method.kind == "full"), None)) and full.loss < before:
        bar = before - 0.9 * (before - full.loss)
        left.axhline(bar, color=FAINT, linewidth=1.2, linestyle=":", label="nine tenths of full fine-tuning's gain")
    left.set_xscale("log")
    left.margins(x=0.1)
    left.set_xlabel("trained parameters", color=INK)
    left.set_ylabel("nats a learned token", color=INK)
    left.set_title("held-out loss after the same steps", loc="left", fontsize=11, color=INK)
    left.legend(fontsize=8.5, frameon=False)
    series, largest = run.metrics.series(), max((r.method.size for r in results), default=0) or 1
    for r in results:
        if found := series.get(f"{r.method.name}: loss"):
            xs, ys = found
            right.plot(xs, moving_average(ys, max(3, len(ys) // 8)), color=COLORS[r.method.kind], linewidth=1.6,
                       linestyle="--" if r.method.kind in ("nf4", "int8") else "-", label=r.method.name,
                       alpha=0.4 + 0.6 * (r.method.size or largest) / largest)  # fmt: skip
    right.xaxis.get_major_locator().set_params(integer=True)
    right.set_xlabel("step", color=INK)
    right.set_title("training loss (moving average)", loc="left", fontsize=11, color=INK)
    if right.get_legend_handles_labels()[0]:
        right.legend(fontsize=8, frameon=False, ncols=2)
    save(made, run.dir / "comparison.png")


def neighbors(ordered: "list[Result]") -> "list[list[Result]]":
    """Results whose points lie so near to each other that their names have to be stacked."""
    groups: list[list[Result]] = []
    for r in ordered:
        if groups and r.trained < 1.25 * groups[-1][-1].trained:
            groups[-1].append(r)
        else:
            groups.append([r])
    return groups
