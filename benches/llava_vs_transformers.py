"""One step of LLaVA's stage 1, ours and transformers': time and memory on the same folder, rows, images and threads.

    python -m finetune bench llava_vs_transformers [--steps 4] [--threads 2] [--dtype float32 bfloat16] [--json FILE]
                                                   [--model FOLDER] [--size 112]

Both sides open the same folder: a language model, a CLIP encoder of random weights, and a projector, which alone is
trained. Every step has new images, so that both encode them. transformers runs LlavaForConditionalGeneration with
labels, torch's AdamW and clip_grad_norm_, as its examples do. Each side is a process of its own with its own peak
resident set, and they take turns step by step; a ratio is the median of the steps' ratios (above 1: ours is faster).
The first step is not timed: both must give the same loss there. Needs the peers extra: pip install -e '.[peers]'.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from trl_turns import TOLERANCE, Turn, measure, mib, summarize

from finetune.errors import UserError
from finetune.runs import display, machine

BATCH, PROMPT, ANSWER = 8, 24, 3  # rows of a step; tokens of a question and of an answer
LR, CLIP = 1e-3, 1.0
PATCH, DIM, LAYERS, HEADS = 16, 384, 6, 6  # of the encoder


def batch(task: dict[str, Any], step: int) -> tuple[Any, Any, Any]:
    """Tokens (B, T), labels of the answers in transformers' form, and images (B, 3, H, W) of a step."""
    import torch

    g = torch.Generator().manual_seed(step)
    words = torch.randint(1000, 40_000, (BATCH, PROMPT + ANSWER), generator=g) % task["vocab"]
    image = torch.full((BATCH, task["each"]), task["token"])
    tokens = torch.cat([words[:, :3], image, words[:, 3:]], 1)
    labels = tokens.clone()
    labels[:, :-ANSWER] = -100
    return tokens, labels, torch.randn(BATCH, 3, task["size"], task["size"], generator=g)


def ours(task: dict[str, Any], turn: Turn) -> None:
    """The step of modules/pre_train/vlm/llava, from its own functions."""
    import torch

    from finetune import ops, optim
    from finetune.runs import registry

    files, model = (registry.part("llava", name) for name in ("files", "model"))
    net = files.read(task["model"], getattr(torch, task["dtype"])).requires_grad_(False)
    net.projector.float().requires_grad_(True)
    trained = list(net.projector.parameters())
    optimizer = optim.AdamW(optim.decay_groups(trained, 0.0), lr=LR)
    turn.ready()
    for step in range(task["steps"]):
        turn.wait()
        tokens, labels, images = batch(task, step)
        targets = torch.cat([labels[:, 1:], torch.full((BATCH, 1), -100)], 1)
        states = net(tokens, images, hidden=True)
        loss = model.answer_loss(net.language, states, targets)
        loss.backward()
        norm = ops.clip_grad_norm_([p.grad for p in trained if p.grad is not None], CLIP)
        optimizer.step(lr=LR)
        optimizer.zero_grad()
        turn.done(loss.item(), float(norm))


def theirs(task: dict[str, Any], turn: Turn) -> None:
    """LlavaForConditionalGeneration, of which the projector alone is trained."""
    import torch
    from transformers import LlavaForConditionalGeneration

    dtype = getattr(torch, task["dtype"])
    net = LlavaForConditionalGeneration.from_pretrained(task["model"], dtype=dtype).requires_grad_(False)
    projector = net.model.multi_modal_projector.requires_grad_(True)
    trained = list(projector.parameters())
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0)
    turn.ready()
    for step in range(task["steps"]):
        turn.wait()
        tokens, labels, images = batch(task, step)
        loss = net(input_ids=tokens, pixel_values=images.to(dtype), labels=labels).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        turn.done(loss.item(), float(norm))


SIDES = {"ours": ours, "transformers": theirs}


def work(name: str, task_file: str) -> None:
    import torch

    turn = Turn()
    task = json.loads(Path(task_file).read_text())
    torch.set_num_threads(task["threads"])
    SIDES[name](task, turn)


def write(source: Path, folder: Path, size: int) -> dict[str, Any]:
    """The folder that both open, and what `batch` needs to know of it."""
    import torch

    from finetune.lm.io import load
    from finetune.runs import registry
    from finetune.vision.vit import ViTConfig

    files, model = (registry.part("llava", name) for name in ("files", "model"))
    torch.manual_seed(0)
    vision = ViTConfig(size, size, PATCH, DIM, LAYERS, HEADS, activation="quick_gelu", patch_bias=False, pre_norm=True)
    language = load.llama(source)
    net = model.Llava(model.LlavaConfig(vision, language.config, language.config.vocab_size), language=language)
    files.write(net, folder)
    shape = {"token": net.config.image_token, "vocab": language.config.vocab_size, "each": net.config.each}
    return {"model": str(folder), "size": size, **shape}


def show(console: Any, title: str, found: dict[str, dict[str, Any]]) -> None:
    rows: list[Any] = []
    for name, side in found.items():
        s = side["seconds"]
        rows.append([
            name, f"{s['median']:.2f}", f"{s['p20']:.2f} … {s['p80']:.2f}", f"{side['cpu_seconds']['median']:.2f}",
            f"{side['tokens_per_second']:.0f}", mib(side["peak"]), mib(side["growth"]),
        ])  # fmt: skip
    display.table(
        console, ("side", ">s/step", ">p20 … p80", ">CPU s", ">tokens/s", ">peak RSS", ">growth"), rows, title
    )
    side, mine = found["transformers"], found["ours"]
    ratio = side["ratio"]
    console.print(
        f"transformers / ours: {ratio['median']:.2f}× ({ratio['p20']:.2f} … {ratio['p80']:.2f}) the time, "
        f"{side['cpu_ratio']['median']:.2f}× the CPU time; peak {side['peak'] / mine['peak']:.2f}×; "
        f"losses within {side['loss_difference']:.0e}"
    )


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--steps", type=int, default=4, help="timed steps of each side (4)")
    p.add_argument("--threads", type=int, default=machine.physical_cores(), help="threads of each side (the cores)")
    p.add_argument("--dtype", nargs="+", choices=TOLERANCE, default=["float32"], help="of the weights (float32)")
    p.add_argument("--model", default="smollm2", help="the language model: a folder, or smollm2 (smollm2)")
    p.add_argument("--size", type=int, default=112, help="pixels of an image's side (112)")
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.steps < 1 or args.threads < 1 or args.size < PATCH:
        raise UserError(f"--steps and --threads must be at least 1, --size at least {PATCH}")

    from rich.console import Console

    from finetune.lm.io import hub

    console, progress = display.console(), Console(stderr=True)
    source = hub.resolve(args.model, progress)
    console.print(f"{machine.cpu_name()}, {args.threads} threads, load {os.getloadavg()[0]:.1f}")
    report: dict[str, Any] = {"cpu": machine.cpu_name(), "threads": args.threads, "dtypes": {}}
    with tempfile.TemporaryDirectory() as folder, progress.status("preparing") as status:
        task = write(source, Path(folder), args.size)
        length = PROMPT + ANSWER + task["each"]
        for dtype in args.dtype:
            steps = measure(__file__, args, dtype, list(SIDES), dict(task), status.update)
            found = summarize(steps, [[length] * BATCH] * (args.steps + 1))
            report["dtypes"][dtype] = {"steps": steps, "summary": found}
            show(console, f"one step of the projector, {BATCH} rows of {length} tokens, {dtype}", found)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(*sys.argv[2:])
        sys.exit(0)
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
