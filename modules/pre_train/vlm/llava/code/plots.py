"""The pictures of a run: where the answer's token looks, the answers before and after, and the confused digits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from finetune import ops
from finetune.diffusion import images
from finetune.runs.plots import GREY, INK, figure, save
from finetune.runs.run import Run
from finetune.vision import pictures

from .data import Question
from .model import Llava

if TYPE_CHECKING:
    from .sight import Features

SHOWN, AVERAGED = 3, 20  # pictures with their attention, and those over which it is averaged
WORDS = {word: number for number, word in enumerate(pictures.SMALL[:10])}


def named(question: Question) -> str:
    """The names of a question's images."""
    return ", ".join(str(image) for image in question.images)


def draw(
    run: Run,
    net: Llava,
    questions: Sequence[Question],
    found: Sequence[str],
    before: Sequence[str],
    seen: Features,
    split: pictures.Split | None,
) -> None:
    """attention.png, answers.png and confusion.png of questions about built-in pictures, and some of these as files."""
    if split is None:
        return
    (run.dir / "pictures").mkdir(exist_ok=True)
    for number in sorted({q.images[0] for q in questions})[:SHOWN]:
        images.save(run.dir / "pictures" / f"{number}.png", split.x[number])
    attention(run, net, questions, found, seen, split)
    table(run, questions, before, found, split)
    confusion(run, questions, found)


@torch.no_grad()
def attention_to_image(net: Llava, prompt: Sequence[int], vectors: Tensor) -> Tensor:
    """(layers, P): how much the last token of a prompt, which the answer comes from, attends to each vector of its one
    image; the mean over the heads. The rest of 1 goes to the text."""
    tokens, language = torch.tensor([list(prompt)]), net.language
    entered: list[Tensor] = []
    layers: list[Any] = list(language.blocks)
    hooks = [block.attn.register_forward_hook(lambda _, given, __: entered.append(given[0])) for block in layers]
    try:
        net(tokens, vectors=vectors, hidden=True)
    finally:
        for hook in hooks:
            hook.remove()
    here, found = tokens[0] == net.config.image_token, []
    cos, sin = language.rotary.on(tokens.device, None)
    turns = torch.arange(tokens.shape[1])[None]
    for block, x in zip(layers, entered, strict=True):
        part = block.attn
        q = ops.rope(part.q(x).unflatten(-1, (-1, part.head_dim)), cos, sin, turns)[0, -1].float()  # (H, D)
        k = ops.rope(part.k(x).unflatten(-1, (-1, part.head_dim)), cos, sin, turns)[0].float()  # (T, Hkv, D)
        k = k.repeat_interleave(q.shape[0] // k.shape[1], 1)
        weights = (torch.einsum("hd,thd->ht", q, k) * part.head_dim**-0.5).softmax(-1)
        found.append(weights.mean(0)[here])
    return torch.stack(found)


def attention(
    run: Run, net: Llava, questions: Sequence[Question], found: Sequence[str], seen: Features, split: pictures.Split
) -> None:
    """attention.png: pictures, over which lies where the token before the answer's last word looks more than it does on
    average over all pictures and questions (some places draw attention whatever they show), in the layer where this
    differs most."""
    numbers = sorted({q.images[0] for q in questions})
    wide = [
        attention_to_image(net, [*q.prompt, *q.lead], net.projector(seen(q.images)))
        for q in questions
        if q.images[0] in numbers[:AVERAGED]
    ]
    above = torch.stack(wide) - torch.stack(wide).mean(0)  # (questions, layers, P)
    layer = int(above.abs().sum((0, 2)).argmax())
    top = float(above[:, layer].max())
    shown = [i for i, q in enumerate(questions) if q.images[0] in numbers[:SHOWN]]
    kinds = len({questions[i].kind for i in shown})
    made, axes = figure(2.6 * kinds, 2.5 * SHOWN, columns=kinds, rows=SHOWN)
    for axis, i in zip(axes, shown, strict=False):
        looks = above[i, layer].clamp(min=0)
        rows, across = net.config.vision.grid
        grid = looks.view((1, -1) if net.config.columns else (rows, across)).numpy()
        picture = square(split.x[questions[i].images[0]])
        axis.imshow(picture, cmap="gray", vmin=0, vmax=255, extent=(0, 1, 1, 0))
        smooth = "bilinear" if len(looks) > 4 else "nearest"
        axis.imshow(
            grid, cmap="magma", alpha=0.55, interpolation=smooth, extent=(0, 1, 1, 0), aspect="auto", vmin=0, vmax=top
        )
        axis.set_title(f"{questions[i].text}\n{found[i]}", fontsize=8, color=INK)
    for axis in axes:
        axis.set_axis_off()
    save(made, run.dir / "attention.png")


def square(x: Tensor) -> np.ndarray:
    """A picture (1, H, W) in the middle of a gray square, as the encoder sees it."""
    height, width = x.shape[1:]
    side = max(height, width)
    canvas = torch.full((side, side), 127, dtype=torch.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    canvas[top : top + height, left : left + width] = x[0]
    return canvas.numpy()


def table(
    run: Run, questions: Sequence[Question], before: Sequence[str], found: Sequence[str], split: pictures.Split
) -> None:
    """answers.png: question, image, the answer before and after."""
    count = min(len(before), len(questions))
    if not count:
        return
    made, (axes,) = figure(9.6, 0.9 * count + 0.4)
    axes.set_axis_off()
    axes.set(xlim=(0, 10), ylim=(count, -0.5))
    for x, text in ((0.1, "image"), (1.6, "question"), (5.2, "before"), (8.3, "after")):
        axes.text(x, -0.25, text, fontsize=9, color=GREY, va="center")
    for row in range(count):
        question = questions[row]
        inset = axes.inset_axes((0.1, row + 0.1, 1.3, 0.8), transform=axes.transData)
        inset.imshow(split.x[question.images[0], 0].numpy(), cmap="gray")
        inset.set_axis_off()
        right = found[row].strip().lower() == question.wanted.lower()
        mark = "" if right else f"  (wanted: {question.wanted})"
        for x, text in ((1.6, question.text), (5.2, short(before[row])), (8.3, short(found[row]) + mark)):
            axes.text(x, row + 0.5, text, fontsize=9, color=INK, va="center")
    save(made, run.dir / "answers.png")


def last_word(text: str) -> str:
    return text.lower().rstrip(" .\n").rpartition(" ")[2]


def short(text: str, most: int = 34) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


def confusion(run: Run, questions: Sequence[Question], found: Sequence[str]) -> None:
    """confusion.png: which digit was shown and which was said, of the questions whose answer is one digit."""
    counts = torch.zeros(10, 11)
    for question, answer in zip(questions, found, strict=True):
        if question.kind in ("left", "right"):
            counts[WORDS[last_word(question.wanted)], WORDS.get(last_word(answer), 10)] += 1
    if not counts.sum():
        return
    made, (axes,) = figure(5.6, 4.8)
    axes.grid(visible=False)
    axes.imshow(counts.numpy(), cmap="magma")
    for i in range(10):
        for j in range(11):
            if counts[i, j]:
                dark = counts[i, j] < counts.max() / 2
                axes.text(j, i, int(counts[i, j]), ha="center", va="center", fontsize=8, color="w" if dark else "k")
    axes.set_xticks(range(11), [*map(str, range(10)), "other"])
    axes.set_yticks(range(10))
    axes.set_xlabel("said", color=INK)
    axes.set_ylabel("shown", color=INK)
    axes.set_title("left and right digit, unseen images", loc="left", fontsize=11, color=INK)
    save(made, run.dir / "confusion.png")
