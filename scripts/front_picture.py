"""Draws assets/front.png, the picture of README.md, from a finished run of sft: its loss, and answers before and after.

python scripts/front_picture.py RUN_FOLDER
"""

import argparse
import csv
import json
import textwrap
from pathlib import Path

from pictures import shrunk

from finetune.runs import plots

ROOT = Path(__file__).parents[1]
BEFORE, AFTER = "#b5553c", "#2c6e49"


def curve(axes, run: Path) -> None:
    """Loss of the training batches, thin, and of held-out questions at each evaluation."""
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    for name, style in (
        ("loss", {"color": "#b8c4cf", "linewidth": 1.5, "label": "training batches, mean of 7"}),
        ("held_out_loss", {"color": AFTER, "marker": "o", "markersize": 4, "label": "held-out questions"}),
    ):
        steps, losses = zip(*((int(row["step"]), float(row[name])) for row in rows if row.get(name)), strict=True)
        axes.plot(steps, plots.moving_average(list(losses), 7) if name == "loss" else losses, **style)
    axes.set_title("loss of the answers", loc="left", fontsize=11)
    axes.set_xlabel("step")
    axes.legend(frameon=False)


def answers(axes, run: Path, count: int = 3) -> None:
    """The first questions with the model's answers, before in one color and after in another."""
    rows = json.loads((run / "samples.json").read_text())[0]["rows"][:count]
    axes.axis("off")
    axes.set_title("answers to questions it was not trained on", loc="left", fontsize=11)
    y = 0.97
    for row in rows:
        for text, color, lines in (
            (row["question"], plots.INK, 2),
            ("before   " + " ".join(row["before"].split()), BEFORE, 2),
            ("after      " + " ".join(row["after"].split()), AFTER, 2),
        ):
            wrapped = textwrap.wrap(text.replace("$", r"\$"), 86, max_lines=lines, placeholder=" …")
            weight = "bold" if color == plots.INK else "normal"
            axes.text(0, y, "\n".join(wrapped), color=color, va="top", fontsize=9, weight=weight, linespacing=1.35)
            y -= 0.058 * len(wrapped) + 0.006
        y -= 0.04


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("run", type=Path, metavar="RUN_FOLDER")
    run = p.parse_args().run
    figure, (left, right) = plots.figure(12.5, 4.4, 1, 2)
    left.set_position([0.05, 0.13, 0.36, 0.76])
    right.set_position([0.46, 0.05, 0.53, 0.84])
    curve(left, run)
    answers(right, run)
    path = ROOT / "assets/front.png"
    figure.set_layout_engine("none")
    plots.save(figure, path)
    path.write_bytes(shrunk(path))


if __name__ == "__main__":
    main()
