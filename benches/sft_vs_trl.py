"""One SFT step with LoRA, ours and TRL's SFTTrainer: time and memory on the same rows, weights, adapters and threads.

    python benches/sft_vs_trl.py [--steps 5] [--rows 64] [--threads 2] [--dtype float32 bfloat16] [--json FILE]
                                 [--trl-checkpointing | --no-trl-checkpointing] [--checkpointing] [--model FOLDER]

Each side is a separate process with its own peak resident set. They take turns step by step, so that other work on the
machine slows all of them; a ratio is the median of the rounds' ratios (above 1: ours is faster). TRL runs twice, with
gradient checkpointing (its default, and its leanest) and without (its fastest). The first step is not timed: both
must give the same loss there, or nothing is timed. Needs the peers extra: pip install -e '.[peers]'.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from trl_turns import PLAIN, TOLERANCE, Turn, make_adapter, measure, mib, summarize, take_turns, versions

from finetune.data import packing, python_docs
from finetune.errors import UserError
from finetune.runs import display, machine

BATCH, TOKENS = 8, 960  # rows of a step, and roughly their number of tokens
RANK, ALPHA, LR, CLIP = 8, 16.0, 1e-3, 1.0
SIDES = {  # name → (which, gradient checkpointing)
    "ours": ("ours", False),
    "ours, checkpointing": ("ours", True),
    "TRL, checkpointing (default)": ("trl", True),
    "TRL, no checkpointing": ("trl", False),
}

# --- the two sides, each in its own process. One line "step" comes in, one JSON object a step goes out.


def ours(task: dict[str, Any], turn: Turn) -> None:
    """The step of modules/post_train/alignment/sft, from its own functions."""
    import torch

    from finetune import ops, optim
    from finetune.lm.io import load
    from finetune.peft import adapters
    from finetune.runs import registry

    sft = registry.load(registry.find("sft"))
    model = load.llama(task["model"], getattr(torch, task["dtype"]))
    adapters.load_adapter(model, task["adapter"])
    model.gradient_checkpointing = task["checkpointing"]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optim.AdamW(optim.decay_groups(trained, 0.0), lr=LR)
    documents = [packing.Document(row["input_ids"], row["assistant_masks"]) for row in task["rows"]]

    turn.ready()
    for step in range(task["steps"]):
        turn.wait()
        chosen = [documents[(step * BATCH + i) % len(documents)] for i in range(BATCH)]
        loss = sft.accumulate_gradients(model, [packing.collate(chosen)])
        norm = ops.clip_grad_norm_([p.grad for p in trained if p.grad is not None], CLIP)
        optimizer.step(lr=LR)
        optimizer.zero_grad()
        turn.done(loss, float(norm))


def trl(task: dict[str, Any], turn: Turn) -> None:
    """SFTTrainer at its defaults (padded rows, no packing, its fused head), except for shared settings."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(
        output_dir=task["folder"],
        gradient_checkpointing=task["checkpointing"],
        per_device_train_batch_size=BATCH,
        max_steps=task["steps"],
        train_sampling_strategy="sequential",  # as in ours: the rows in order, repeated
        learning_rate=LR,
        max_grad_norm=CLIP,
        optim="adamw_torch",
        bf16=task["dtype"] == "bfloat16",
        **PLAIN,
    )
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(task["model"], dtype=getattr(torch, task["dtype"])),
        config,
        # TRL reads `assistant_masks` of tokenized rows as if it had made them itself.
        train_dataset=Dataset.from_list(task["rows"]),
        processing_class=AutoTokenizer.from_pretrained(task["model"]),
        peft_config=LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[take_turns(turn)],
    )
    trainer.remove_callback(PrinterCallback)
    set_peft_model_state_dict(trainer.model, load_file(Path(task["adapter"], "adapter_model.safetensors")))
    trainer.train()


def work(name: str, task_file: str) -> None:
    import torch

    turn = Turn()
    task = json.loads(Path(task_file).read_text())
    which, task["checkpointing"] = SIDES[name]
    torch.set_num_threads(task["threads"])
    {"ours": ours, "trl": trl}[which](task, turn)


# --- the parent


def choose_rows(model: Path, count: int) -> list[dict[str, list[int]]]:
    """`count` of the longer questions and answers on Python's documentation, on average TOKENS / BATCH tokens long."""
    from finetune.lm.io import load

    tokenizer = load.tokenizer(model)
    train, _, _ = python_docs.split_pairs(python_docs.python_pairs())
    rendered = sorted((tokenizer.render(pair.conversation()) for pair in train), key=lambda row: -len(row[0]))
    total = kept = 0
    while kept < len(rendered) and (total + len(rendered[kept][0])) / (kept + 1) >= TOKENS / BATCH:
        total += len(rendered[kept][0])
        kept += 1
    if kept < count:
        raise UserError(f"--rows {count}: only {kept} rows average {TOKENS // BATCH} tokens")
    chosen = random.Random(0).sample(rendered[:kept], count)
    return [{"input_ids": ids, "assistant_masks": mask} for ids, mask in chosen]


def linear_gflop(batches: list[list[int]], parameters: int, padded: bool, checkpointing: bool) -> float:
    """Matrix products of a step with the blocks' frozen weights, ×1e-9: forward, input's gradient, and the forward
    pass again if it is not kept. Padding is computed like any token."""
    tokens = statistics.mean(len(lengths) * max(lengths) if padded else sum(lengths) for lengths in batches)
    return 2e-9 * parameters * tokens * (3 if checkpointing else 2)


def show(console: Any, title: str, found: dict[str, dict[str, Any]], gflop: dict[str, float]) -> None:
    rows: list[Any] = []
    for name, side in found.items():
        s = side["seconds"]
        rows.append([
            name, f"{s['median']:.2f}", f"{s['p20']:.2f} … {s['p80']:.2f}", f"{side['cpu_seconds']['median']:.2f}",
            f"{side['tokens_per_second']:.0f}", f"{gflop[name]:.0f}", mib(side["peak"]), mib(side["growth"]),
        ])  # fmt: skip
    heads = ("side", ">s/step", ">p20 … p80", ">CPU s", ">tokens/s", ">GFLOP", ">peak RSS", ">growth")
    display.table(console, heads, rows, title)
    mine = found["ours"]
    for name, side in found.items():
        if name == "ours":
            continue
        ratio, cpu = side["ratio"], side["cpu_ratio"]["median"]
        color = "green" if ratio["median"] >= 1.5 else "yellow" if ratio["median"] >= 1 else "red"
        less = side["peak"] >= mine["peak"]
        console.print(
            f"{name} / ours: [{color}]{ratio['median']:.2f}×[/] ({ratio['p20']:.2f} … {ratio['p80']:.2f}) the time, "
            f"{cpu:.2f}× the CPU time; peak [{'green' if less else 'red'}]{side['peak'] / mine['peak']:.2f}×[/]; "
            f"losses within {side['loss_difference']:.0e}"
        )


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--steps", type=int, default=5, help="timed steps of each side (5)")
    p.add_argument("--rows", type=int, default=64, help=f"rows in all, a multiple of {BATCH} (64)")
    p.add_argument("--threads", type=int, default=machine.physical_cores(), help="threads of each side (the cores)")
    p.add_argument("--dtype", nargs="+", choices=TOLERANCE, default=["float32"], help="of the weights (float32)")
    p.add_argument("--trl-checkpointing", action=argparse.BooleanOptionalAction, help="only this setting of TRL (both)")
    p.add_argument("--checkpointing", action="store_true", help="ours with gradient checkpointing too")
    p.add_argument("--model", default="smollm2", help="a model folder, or smollm2 (smollm2)")
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.steps < 1 or args.rows < BATCH or args.rows % BATCH or args.threads < 1:
        raise UserError(f"--steps and --threads must be at least 1, --rows a multiple of {BATCH}")

    from rich.console import Console

    from finetune.lm.io import hub, load

    console, progress = display.console(), Console(stderr=True)
    model = hub.resolve(args.model, progress)
    rows = choose_rows(model, args.rows)
    lengths = [len(row["input_ids"]) for row in rows]
    batches = [[lengths[(s * BATCH + i) % args.rows] for i in range(BATCH)] for s in range(args.steps + 1)]
    shape = load.llama_config(model)
    per_block = shape.dim * (shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads) + 3 * shape.hidden)
    sides = [name for name, (which, on) in SIDES.items() if wanted(args, which, on)]
    gflop = {n: linear_gflop(batches[1:], shape.layers * per_block, w == "trl", on) for n, (w, on) in SIDES.items()}
    real, padded = sum(map(sum, batches[1:])), sum(BATCH * max(b) for b in batches[1:])
    console.print(
        f"{machine.cpu_name()}, {args.threads} threads, load {os.getloadavg()[0]:.1f}; {args.rows} rows, "
        f"{real / args.steps:.0f} tokens a step, {padded / args.steps:.0f} with TRL's padding"
    )
    report: dict[str, Any] = {"cpu": machine.cpu_name(), "threads": args.threads, "versions": versions(), "dtypes": {}}
    report |= {"tokens": real / args.steps, "padded_tokens": padded / args.steps, "linear_gflop": gflop}
    with tempfile.TemporaryDirectory() as adapter, progress.status("preparing") as status:
        make_adapter(model, Path(adapter), RANK, ALPHA)
        for dtype in args.dtype:
            task = {"model": str(model), "adapter": adapter, "rows": rows}
            steps = measure(__file__, args, dtype, sides, task, status.update)
            found = summarize(steps, batches)
            report["dtypes"][dtype] = {"steps": steps, "summary": found}
            show(console, f"one SFT step of {BATCH} rows, LoRA r={RANK}, {dtype}", found, gflop)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def wanted(args: argparse.Namespace, which: str, checkpointing: bool) -> bool:
    if which == "ours":
        return args.checkpointing or not checkpointing
    return args.trl_checkpointing in (None, checkpointing)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(*sys.argv[2:])
        sys.exit(0)
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
