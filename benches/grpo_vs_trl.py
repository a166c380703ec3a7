"""One GRPO step with LoRA, sampling included, ours and TRL's GRPOTrainer: time and memory on the same prompts.

    python benches/grpo_vs_trl.py [--steps 2] [--threads 1] [--dtype bfloat16] [--side NAME …] [--json FILE]

8 few-shot sums × 16 answers of 6 tokens, LoRA r = 16, one update, rewards from the verifier. Each side is a separate
process with its own peak resident set, one after the other; the first step is not timed. On a machine that does other
work the CPU seconds are the robust figure. Answers are random, so the sides see different ones of equal length; that
losses and gradients are the same on equal answers is tests/modules/test_grpo_peers.py. Sides:

    ours                     answers from a bf16 copy of the policy, prompts read once, no padding, answers without
                             advantage not computed
    ours, int8 sampler       the copy in int8
    ours, no copy            answers from the policy's own modules: what the native copy gives
    ours, every answer       answers without advantage are computed too: what omitting them gives
    ours, whole documents    that, and each answer with its prompt: what reading prompts once gives
    TRL                      its defaults: padded rows, gradient checkpointing, transformers' generate
    TRL, no checkpointing    its fastest

Needs the peers extra: pip install -e '.[peers]'.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from trl_turns import PLAIN

from finetune.errors import UserError
from finetune.runs import display, machine

PROMPTS, SAMPLES, NEW = 8, 16, 6
RANK, ALPHA, LR = 16, 32.0, 5e-4
SIDES = ("ours", "ours, int8 sampler", "ours, no copy", "ours, every answer", "ours, whole documents", "TRL",
         "TRL, no checkpointing")  # fmt: skip


class Clock:
    """Seconds, CPU seconds and memory of each step of a side."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        machine.reset_peak_rss()
        self.loaded = machine.peak_rss_bytes(since_reset=True)
        self.start()

    def start(self) -> None:
        self.began = time.perf_counter(), time.process_time()

    def done(self, **more: float) -> None:
        wall, cpu = time.perf_counter() - self.began[0], time.process_time() - self.began[1]
        self.steps.append({"seconds": wall, "cpu": cpu} | more)
        self.start()

    def report(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "peak": machine.peak_rss_bytes(),
            "growth": machine.peak_rss_bytes(since_reset=True) - self.loaded,
        }


def ours(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The step of modules/post_train/alignment/grpo, from its own functions."""
    import torch

    from finetune import optim
    from finetune.alignment import shared_prompts
    from finetune.alignment.kl import FixedCoefficient
    from finetune.alignment.logprobs import Reference, owners, with_entropies
    from finetune.alignment.rollouts import Sampler
    from finetune.data.packing import Document, collate
    from finetune.lm.io import hub, load
    from finetune.lm.tokenizer import stop_ids
    from finetune.peft import lora
    from finetune.runs import registry
    from finetune.runs.run import Run

    torch.set_num_threads(args.threads)
    grpo: Any = registry.load(registry.find("grpo"))
    shared: Any = shared_prompts
    source = hub.resolve(args.model)
    tokenizer, model = load.tokenizer(source), load.llama(source, getattr(torch, args.dtype))
    whole = name in ("ours, every answer", "ours, whole documents")
    cfg = grpo.Config(dynamic=False, entropy=1e-12 if whole else 0.0)
    task = registry.part("grpo", "tasks").load(cfg, tokenizer)
    lora.apply_lora(model, RANK, ALPHA, generator=torch.Generator().manual_seed(0))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optim.AdamW(optim.decay_groups(trained, 0.0), lr=LR)
    format = {"ours, no copy": None, "ours, int8 sampler": "int8"}.get(name, "bf16")
    sampler, reference = Sampler(model, format), Reference(model)
    stops, place = frozenset(stop_ids(model, tokenizer)), {"next": 0}

    class Documents:
        """The same answers, each behind its own copy of the prompt."""

        def __init__(self, groups: list[Any]) -> None:
            rows = [Document([*g.prompt, *a], [0] * len(g.prompt) + [1] * len(a)) for g in groups for a in g.answers]
            self.batch = collate(rows)
            self.owners = owners(self.batch)

    if name == "ours, whole documents":
        grpo.Layout = Documents
        shared.token_logprobs = lambda m, layout, t: with_entropies(m, layout.batch, t)

    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), cfg)
        clock = Clock()
        for _ in range(args.steps + 1):
            sampler.refresh()
            found = grpo.collect(cfg, run, sampler, tokenizer, task, stops, place)
            sampled = time.perf_counter() - clock.began[0]
            grpo.update(cfg, model, optimizer, trained, reference, found.groups, FixedCoefficient(0.0), LR)
            clock.done(sampling=sampled, tokens=found.metrics["answer_tokens"], no_spread=found.metrics["no_spread"])
    return clock.report()


def trl(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """GRPOTrainer at its defaults, except for shared settings."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from finetune.alignment import rewards
    from finetune.lm.io import hub
    from finetune.runs import registry

    torch.set_num_threads(args.threads)
    grpo = registry.load(registry.find("grpo"))
    texts = registry.part("grpo", "tasks").sum_prompts(grpo.Config())[512:]
    source = hub.resolve(args.model)
    clocks: list[Clock] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, *_, **__):
            clocks.append(Clock())

        def on_log(self, args, state, control, **given):
            if "loss" in given["logs"]:
                clocks[0].done(tokens=given["logs"].get("completions/mean_length", 0.0))

    def right(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return rewards.find("sum")(prompts, completions)

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            gradient_checkpointing=name == "TRL",
            per_device_train_batch_size=PROMPTS * SAMPLES,
            num_generations=SAMPLES,
            max_completion_length=NEW,
            loss_type="grpo",
            beta=0.0,
            max_steps=args.steps + 1,
            learning_rate=LR,
            bf16=args.dtype == "bfloat16",
            **PLAIN,
        )
        trainer = GRPOTrainer(
            AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, args.dtype)),
            reward_funcs=right,  # type: ignore[arg-type]
            args=config,
            train_dataset=Dataset.from_list([{"prompt": text} for text in texts[:256]]),
            processing_class=AutoTokenizer.from_pretrained(source),
            peft_config=LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[Watch()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return clocks[0].report()


def measured(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """What a side says, in its own process."""
    env = os.environ | {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    given = ["--steps", str(args.steps), "--threads", str(args.threads), "--dtype", args.dtype, "--model", args.model]
    done = subprocess.run([sys.executable, __file__, *given, "--worker", name], env=env, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{name} died, exit status {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def median(found: dict[str, Any], key: str) -> float:
    values = sorted(step[key] for step in found["steps"][1:])
    return values[len(values) // 2]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--steps", type=int, default=2, help="timed steps of each side (2)")
    p.add_argument("--threads", type=int, default=1, help="threads of each side (1)")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the weights (bfloat16)")
    p.add_argument("--side", nargs="+", choices=SIDES[1:], default=list(SIDES[1:]), help="next to ours (all)")
    p.add_argument("--model", default="smollm2", help="a model folder, or smollm2 (smollm2)")
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    p.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.steps < 1 or args.threads < 1:
        raise UserError("--steps and --threads must be at least 1")
    if args.worker:
        out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print
        print(json.dumps((trl if args.worker.startswith("TRL") else ours)(args.worker, args)), file=out, flush=True)
        return 0
    console = display.console()
    console.print(f"{machine.cpu_name()}, {args.threads} threads, load {os.getloadavg()[0]:.1f}, {args.dtype}")
    found = {}
    for name in ["ours", *args.side]:
        found[name] = measured(name, args)
    mine, rows = found["ours"], []
    for name, side in found.items():
        wall, cpu = median(side, "seconds"), median(side, "cpu")
        sampling = f"{median(side, 'sampling'):.2f}" if "sampling" in side["steps"][0] else "-"
        ratio, cpu_ratio = wall / median(mine, "seconds"), cpu / median(mine, "cpu")
        memory = (f"{side[key] / 2**20:,.0f} MiB" for key in ("peak", "growth"))
        rows.append([name, f"{wall:.2f}", sampling, f"{cpu:.2f}", f"{ratio:.2f}×", f"{cpu_ratio:.2f}×", *memory])
    heads = ("side", ">s/step", ">of it sampling", ">CPU s", ">time / ours", ">CPU / ours", ">peak RSS", ">growth")
    display.table(console, heads, rows, f"one GRPO step of {PROMPTS} × {SAMPLES} answers of {NEW} tokens")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"cpu": machine.cpu_name(), "threads": args.threads, "sides": found}, indent=1))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
