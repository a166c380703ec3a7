"""One DPO step with LoRA, ours and TRL's DPOTrainer: time and memory on the same pairs, weights, adapters and threads.

    python benches/dpo_vs_trl.py [--steps 4] [--pairs 24] [--threads 2] [--side NAME …] [--json FILE] [--model FOLDER]

Each side is a separate process with its own peak resident set. They take turns step by step, so that other work on the
machine slows all of them; a ratio is the median of the rounds' ratios (above 1: ours is faster). The first step is not
timed: all must give the same loss there, or nothing is timed. The pairs are questions on Python's documentation with
their answer and another question's. Sides:

    ours               reference precomputed, no padding, prompts read once, logits of the answers only
    ours, whole pairs  the same without shared prompts: what these give
    ours, live         the same as ours with the reference computed in each step: what precomputing it gives
    TRL                its defaults: padded rows, the adapters switched off for the reference, gradient checkpointing
    TRL, fastest       without checkpointing, and with precomputed reference

Needs the peers extra: pip install -e '.[peers]'.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from trl_turns import PLAIN, Turn, make_adapter, measure, mib, summarize, take_turns, versions

from finetune.data import python_docs
from finetune.errors import UserError
from finetune.runs import display, machine

BATCH = 4  # pairs of a step
RANK, ALPHA, LR, CLIP, BETA = 16, 32.0, 1e-3, 1.0, 0.1
SIDES = ("ours", "ours, whole pairs", "ours, live", "TRL", "TRL, fastest")
KINDS = ("prompt_ids", "chosen_ids", "rejected_ids")


def ours(name: str, task: dict[str, Any], turn: Turn) -> None:
    """The step of modules/post_train/alignment/dpo, from its own functions."""
    import torch

    from finetune import ops, optim
    from finetune.alignment.logprobs import Reference
    from finetune.data.packing import Document
    from finetune.lm.io import load
    from finetune.peft import adapters
    from finetune.runs import registry

    dpo: Any = registry.load(registry.find("dpo"))
    data, batch = registry.part("dpo", "data"), registry.part("dpo", "batch")
    model = load.llama(task["model"])
    adapters.load_adapter(model, task["adapter"])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optim.AdamW(optim.decay_groups(trained, 0.0), lr=LR)
    cfg, reference = dpo.Config(beta=BETA), Reference(model)

    def document(prompt: list[int], answer: list[int]) -> Document:
        return Document(prompt + answer, [0] * len(prompt) + [1] * len(answer))

    rows = [[row[kind] for kind in KINDS] for row in task["rows"]]
    pairs = [data.Pair(document(prompt, chosen), document(prompt, rejected)) for prompt, chosen, rejected in rows]
    known = dict(zip(map(id, data.flat(data.both(pairs))), batch.answer_logprobs(model, data.both(pairs)), strict=True))
    if name == "ours, whole pairs":
        dpo.collate = lambda part: batch.Rows([[document] for document in data.flat(data.both(part))])

    def references(part: list[Any], rows: Any) -> torch.Tensor:
        if name != "ours, live":
            return torch.cat([known[id(d)] for d in data.flat(data.both(part))])
        with torch.no_grad(), reference.standing() as standing:
            return rows.logprobs(standing)

    turn.ready()
    for step in range(task["steps"]):
        turn.wait()
        chosen = [pairs[(step * BATCH + i) % len(pairs)] for i in range(BATCH)]
        loss = dpo.accumulate_gradients(cfg, model, chosen, references)["loss"]
        norm = ops.clip_grad_norm_([p.grad for p in trained if p.grad is not None], CLIP)
        optimizer.step(lr=LR)
        optimizer.zero_grad()
        turn.done(loss, float(norm))


def trl(name: str, task: dict[str, Any], turn: Turn) -> None:
    """DPOTrainer at its defaults, or as fast as its settings make it, except for shared settings."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from trl import DPOConfig, DPOTrainer

    class OfTokens(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):  # the rows are tokens already
            return dataset

        def _get_train_sampler(self, *_):  # as in ours: the rows in order, repeated
            return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    fastest = name == "TRL, fastest"
    config = DPOConfig(
        output_dir=task["folder"],
        gradient_checkpointing=not fastest,
        precompute_ref_log_probs=fastest,
        beta=BETA,
        per_device_train_batch_size=BATCH,
        max_steps=task["steps"],
        learning_rate=LR,
        max_grad_norm=CLIP,
        optim="adamw_torch",
        bf16=False,
        **PLAIN,
    )
    trainer = OfTokens(
        AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list(task["rows"]),
        processing_class=AutoTokenizer.from_pretrained(task["model"]),
        peft_config=LoraConfig(
            r=RANK, lora_alpha=int(ALPHA), lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[take_turns(turn)],
    )
    trainer.remove_callback(PrinterCallback)
    set_peft_model_state_dict(trainer.model, load_file(Path(task["adapter"], "adapter_model.safetensors")))
    trainer.train()


def work(name: str, task_file: str) -> None:
    import torch

    turn = Turn()
    task = json.loads(Path(task_file).read_text())
    torch.set_num_threads(task["threads"])
    (ours if name.startswith("ours") else trl)(name, task, turn)


# --- the parent


def choose_pairs(model: Path, count: int) -> list[dict[str, list[int]]]:
    """`count` questions of the documentation in tokens, each with its answer and that of the next one."""
    from finetune.alignment import preferences
    from finetune.lm.io import load

    tokenizer = load.tokenizer(model)
    train, _, _ = python_docs.split_pairs(python_docs.python_pairs())
    rows = []
    for pair in train:
        *prompt, answer = pair.conversation()
        document = preferences.document(tokenizer, prompt, [answer])
        cut = list(document.mask).index(1)
        end = len(document) - list(document.mask)[::-1].index(1)
        rows.append((list(document.ids[:cut]), list(document.ids[cut:end])))
    longer = [row for row in rows if 40 <= len(row[1]) <= 160]
    if count + 1 > len(longer):
        raise UserError(f"--pairs {count}: there are {len(longer) - 1}")
    some = random.Random(0).sample(longer, count + 1)
    return [dict(zip(KINDS, (prompt, chosen, other), strict=True)) for (prompt, chosen), (_, other) in pairwise(some)]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--steps", type=int, default=4, help="timed steps of each side (4)")
    p.add_argument("--pairs", type=int, default=24, help=f"pairs in all, a multiple of {BATCH} (24)")
    p.add_argument("--threads", type=int, default=machine.physical_cores(), help="threads of each side (the cores)")
    p.add_argument("--side", nargs="+", choices=SIDES[1:], default=list(SIDES[1:]), help="next to ours (all)")
    p.add_argument("--model", default="smollm2", help="a model folder, or smollm2 (smollm2)")
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.steps < 1 or args.pairs < BATCH or args.pairs % BATCH or args.threads < 1:
        raise UserError(f"--steps and --threads must be at least 1, --pairs a multiple of {BATCH}")

    from rich.console import Console

    from finetune.lm.io import hub

    console, progress = display.console(), Console(stderr=True)
    model = hub.resolve(args.model, progress)
    rows = choose_pairs(model, args.pairs)
    counted = [[len(row[kind]) for kind in KINDS] for row in rows]
    batches = [[counted[(s * BATCH + i) % len(rows)] for i in range(BATCH)] for s in range(args.steps + 1)]
    real = [[p + a for p, c, r in batch for a in (c, r)] for batch in batches]
    shared = statistics.mean(sum(p + c + r - 2 for p, c, r in batch) for batch in batches[1:])
    plain, padded = (statistics.mean(f(lengths) for lengths in real[1:]) for f in (sum, lambda x: len(x) * max(x)))
    console.print(
        f"{machine.cpu_name()}, {args.threads} threads, load {os.getloadavg()[0]:.1f}; a step of {BATCH} pairs: "
        f"{padded:.0f} tokens padded, {plain:.0f} without padding, {shared:.0f} with prompts read once"
    )
    sides = ["ours", *args.side]
    with tempfile.TemporaryDirectory() as adapter, progress.status("preparing") as status:
        make_adapter(model, Path(adapter), RANK, ALPHA)
        task = {"model": str(model), "adapter": adapter, "rows": rows}
        steps = measure(__file__, args, "float32", sides, task, status.update)
    found = summarize(steps, real)
    show(console, found)
    if args.json:
        report = {"cpu": machine.cpu_name(), "threads": args.threads, "versions": versions(), "steps": steps,
                  "tokens": {"padded": padded, "plain": plain, "shared": shared}, "summary": found}  # fmt: skip
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def show(console: Any, found: dict[str, dict[str, Any]]) -> None:
    rows: list[Any] = []
    for name, side in found.items():
        seconds, ratio = side["seconds"], side["ratio"]
        rows.append([
            name, f"{seconds['median']:.2f}", f"{side['cpu_seconds']['median']:.2f}", f"{ratio['median']:.2f}×",
            f"{ratio['p20']:.2f} … {ratio['p80']:.2f}", f"{side['cpu_ratio']['median']:.2f}×", mib(side["peak"]),
            f"{side['loss_difference']:.0e}",
        ])  # fmt: skip
    heads = ("side", ">s/step", ">CPU s", ">time / ours", ">p20 … p80", ">CPU / ours", ">peak RSS", ">losses within")
    display.table(console, heads, rows, f"one DPO step of {BATCH} pairs, LoRA r={RANK}, float32")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(*sys.argv[2:])
        sys.exit(0)
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
