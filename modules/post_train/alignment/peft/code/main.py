"""Parameter-efficient fine-tuning: one base model, one task, and many ways to train few of its parameters.

    full        W ← W − lr · step(dL/dW)                    all weights
    lora_R      W + s B A, s = alpha / R                    rslora_R: s = alpha / √R
    dora_R      m · (W + s B A) / ‖W + s B A‖               pissa_R: LoRA from the largest singular triples
    nf4_R, int8_R                                           LoRA over frozen weights of 4 or 8 bits
    prompt_P    P trained vectors before every row          prefix_P: P trained keys and values in every layer

Reads top to bottom: settings, the comparison, one method, two adapters on one base, results. methods.py puts a method
on a model, training.py holds the loop; the mechanisms are in finetune/peft (lora, virtual_tokens, quantize).
"""

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from finetune import memory, optim
from finetune.data import packing, preview
from finetune.data.packing import Batch
from finetune.data.rows import check_form
from finetune.data.toy_directory import small_config
from finetune.errors import UserError
from finetune.lm import template_tokens
from finetune.lm.io import load, save
from finetune.lm.llama import Llama, LlamaConfig
from finetune.memory import meters
from finetune.peft import adapters, bases, lora
from finetune.runs import checkpoint, config, display
from finetune.runs.config import bounded
from finetune.runs.run import Run

from . import plots, toy
from .data import Task, load_task, load_tokenizer, longest, small_tokenizer, task_conversations, tokenize
from .methods import ADAPTERS, QUANTIZED, VIRTUAL, Adapted, Method, adapt, layers_of, parse, plain, setup
from .training import batch_of, evaluate, loss_of, packed, train

METHODS = "full,lora_2,lora_8,lora_32,rslora_32,dora_8,pissa_8,prompt_16,prefix_16,nf4_8,int8_8"


@dataclass
class Config(config.Config):
    steps: int = 20  # of each method
    checkpoint_every: int = 20
    model: str = "smollm2"  # a model folder, a .gguf file, smollm2, a hub id, or scratch: a small Llama made in the run
    # a file of rows (.jsonl, .json, .csv, .tsv, .parquet) or a folder; none: Python's own documentation
    data: Path | None = None
    methods: str = METHODS  # full, and KIND_SIZE: lora, rslora, dora, pissa, nf4, int8 _rank, prompt, prefix _tokens
    # --- Rows
    # messages, sharegpt, alpaca, prompt or prompt-messages; none: each row's form is found by its keys
    form: str | None = None
    # chatml, chatml-tools, llama3, gemma, mistral, zephyr, alpaca, or a Jinja file; none: the model's own
    template: str | None = None
    # what is learned: the answers, the last one only, or every token; a row's key train_on overrides it
    train_on: Literal["answers", "last", "everything"] = "answers"
    # rows that the template drops a part of: refuse the run, skip them, or keep them and learn what is written
    unwritten: packing.Unwritten = "refuse"
    # --- LoRA
    alpha: float = bounded(16.0, above=0)  # LoRA: the update is scaled by alpha / rank, rsLoRA: by alpha / √rank
    dropout: float = bounded(0.0, at_least=0, below=1)  # LoRA: probability of dropping an input of the adapters
    targets: str = ",".join(lora.TARGETS)  # LoRA: adapted layers, as regular expressions for the end of their names
    # --- Optimizer
    # peak learning rate of adapters; of PiSSA a fifth, since it starts from large A and B
    lr: float = bounded(1e-3, at_least=0)
    lr_full: float = bounded(1e-4, at_least=0)  # of all weights
    lr_virtual: float = bounded(1e-2, at_least=0)  # of prompts and prefixes
    clip: float = bounded(1.0, above=0)  # largest norm of the gradient
    # --- Batches and evaluation
    batch: int = bounded(1, at_least=1, at_most=1 << 20)  # rows of a step
    # tokens of a row, which holds several conversations; longer conversations are cut
    max_length: int = bounded(256, at_least=8, at_most=1 << 26)
    eval_rows: int = bounded(32, at_least=1, at_most=10**9)  # held-out conversations to evaluate on
    # ---
    # from scratch: steps in which the base model learns what it is adapted from
    base_steps: int = bounded(0, at_least=0, at_most=10**9)
    mix: bool = True  # train a second adapter for another task on the same base, and mix the two
    shuffle_answers: bool = False  # control: every question gets the answer of another, so there is nothing to learn

    @classmethod
    def toy(cls) -> "Config":
        return cls(
            steps=120, base_steps=450, model="scratch", lr=1e-2, lr_full=3e-3, lr_virtual=1e-1, batch=2, max_length=160,
            eval_rows=80, checkpoint_every=60, threads=1,
        )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        check_form(self.form)
        if self.template is not None:
            template_tokens.file_of(self.template)
        names = [method.name for method in self.chosen]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f"--methods names {twice} twice")

    @property
    def chosen(self) -> list[Method]:
        """The methods to compare."""
        return [parse(text) for text in self.methods.split(",")]

    def lr_of(self, method: Method) -> float:
        """The peak learning rate of a method."""
        if method.kind in VIRTUAL:
            return self.lr_virtual
        return self.lr_full if method.kind == "full" else self.lr / 5 if method.kind == "pissa" else self.lr


@dataclass
class Result:
    """What one method reached, and what it cost."""

    method: Method
    start: float  # held-out loss before training: the base's, except with quantized weights or virtual tokens
    loss: float  # after training
    trained: int  # parameters
    seconds: float | None  # of a step, median
    memory: list[dict[str, Any]]  # rows of {name, predicted, measured}

    def bytes(self, which: str) -> int:
        """`predicted` or `measured`, in all."""
        return sum(row[which] for row in self.memory)


def main(cfg: Config, run: Run) -> dict[str, Any]:
    check(cfg, run)
    task = load_task(cfg, run)
    total = sum(p.numel() for p in task.base.parameters())
    before = evaluate(cfg, unchanged(task), task.held_out)
    run.print(f"{len(task.train)} conversations to learn, {total:,} parameters, held-out loss {before:.4f}")
    results = []
    # Every method starts from a copy of the same base and sees the same batches.
    for method in cfg.chosen:
        results.append(run_method(cfg, run, task, method, before))
        r = results[-1]
        run.print(f"{method.name}: {r.trained:,} parameters ({r.trained / total:.3%}), "
                  f"held-out loss {before:.4f} → {r.loss:.4f}")  # fmt: skip
    shown = headline(cfg)
    run.record_memory(
        [row | {"name": f"{r.method.name}: {row['name']}"} for r in results if r.method in shown for row in r.memory]
    )
    run.table("the same task, base and batches, by method", [table_row(r, results, before, total) for r in results])
    report(cfg, run, results, before, total)
    plots.comparison(run, results, before)
    mix_adapters(cfg, run, task)
    if cfg.model != "scratch" and first_lora(cfg):
        run.next_commands = bases.next_commands(run.dir)
    return {"loss_before": before, "parameters": total}


def check(cfg: Config, run: Run) -> None:
    """Refuses, before anything is trained, a method that the model or this machine cannot hold."""
    shape = shape_of(cfg)
    patterns = cfg.targets.split(",") if any(m.kind in (*ADAPTERS, *QUANTIZED) for m in cfg.chosen) else []
    named = layers_of(shape, patterns).values()
    files = 0
    for method in cfg.chosen:
        smallest = min((min(layer.in_features, layer.out_features) for layer in named), default=0)
        if method.kind == "pissa" and method.size > smallest:
            raise UserError(f"--methods: {method.name}: a layer of the model has {smallest} singular values only")
        made = plan_of(cfg, method, shape)
        memory.check_memory(shape, made, "--max-length, --batch or --methods")
        terms = {term.name: term.bytes for term in memory.predict(memory.shape_of(shape), made)}
        files += 3 * (terms["gradients"] + terms["optimizer states"])
    if not run.resume:
        memory.check_disk(run.dir, files, "the checkpoints and adapters of these methods")


def dry_run(cfg: Config, console: Console) -> None:
    """`--dry-run`: shows three rows as the model sees them, and counts; reads no weights and writes nothing."""

    def say(text: str) -> None:
        display.say(console, text)

    sets = task_conversations(cfg, say)
    tokenizer = load_tokenizer(cfg, sets, console)
    documents = tokenize(cfg, sets, tokenizer, say)
    shown = {"train": documents.pop("first"), "held_out": documents.pop("first_held_out"), **documents}
    preview.show(console, shown, tokenizer, cfg.max_length, packed=True, rows=cfg.batch * cfg.steps)


# --- One method


def run_method(cfg: Config, run: Run, task: Task, method: Method, before: float) -> Result:
    """Puts the method on a copy of the base, trains it, saves it, and measures what it reached and cost."""
    text = torch.tensor([token for document in task.train[:64] for token in document.ids])
    targets, model = cfg.targets.split(","), copy.deepcopy(task.base)
    adapted = adapt(method, model, cfg.alpha, cfg.dropout, targets, text, run.generator("adapter"))
    frozen = base_hash(adapted.model)
    start = before if method.exact else evaluate(cfg, adapted, task.held_out)
    optimizer, seconds = train(cfg, run, adapted, task.train, cfg.lr_of(method), method.name, cfg.steps, "order")
    if method.kind != "full" and base_hash(adapted.model) != frozen:
        raise AssertionError(f"{method.name} changed the frozen weights")
    save_method(cfg, run, task, method, adapted)
    loss = evaluate(cfg, adapted, task.held_out) if cfg.steps else start
    trained = sum(p.numel() for p in adapted.trained.values())
    return Result(method, start, loss, trained, seconds, measured(cfg, run, task, method, adapted, optimizer))


def unchanged(task: Task) -> Adapted:
    """The base model as it is."""
    return adapt(Method("full"), task.base, 1.0, 0.0, [], torch.empty(0), torch.Generator())


def base_hash(model: Llama) -> str:
    """SHA-256 of the base's tensors, names and bits; those of adapters are not in it."""
    return checkpoint.fingerprint(lora.base_tensors(model))


def measured(
    cfg: Config, run: Run, task: Task, method: Method, adapted: Adapted, optimizer: optim.AdamW
) -> list[dict[str, Any]]:
    """Rows of predicted and measured bytes of what the method keeps in memory, on the first batch."""
    batch = batch_of(cfg, run, task.train, packed(cfg, task.train), 0, "order")
    part = adapted.part
    owners: list[torch.nn.Module] = [adapted.model] if part is None else [adapted.model, part]
    kept = {"weights": sum(map(meters.weight_bytes, owners)), "optimizer states": meters.optimizer_bytes(optimizer)}
    kept["activations"] = meters.saved_bytes(adapted.model, lambda: loss_of(adapted, batch))
    loss_of(adapted, batch).backward()
    kept["gradients"] = sum(map(meters.gradient_bytes, owners))
    shape = task.base.config
    predicted = memory.predict(memory.shape_of(shape), setup(method, batch, "fp32", shape, cfg.targets.split(",")))
    return memory.table({term.name: term.bytes for term in predicted}, kept)


def save_method(cfg: Config, run: Run, task: Task, method: Method, adapted: Adapted) -> None:
    """adapters/NAME as peft opens it; model/ is the first LoRA adapter, or from scratch the model merged with it."""
    base = str((run.dir / "base").absolute()) if cfg.model == "scratch" else bases.base_name(cfg.model)
    if cfg.model == "scratch" and not (run.dir / "base").exists():
        save.model(task.base, run.dir / "base", task.tokenizer)
    folder = run.dir / "adapters" / method.name
    if adapted.part is not None:
        adapters.save_prompt(adapted.model, adapted.part, folder, base)
    elif method.kind != "full":
        adapters.save_adapter(adapted.model, folder, base)
    if method == first_lora(cfg):
        if cfg.model == "scratch":
            merged = copy.deepcopy(adapted.model)
            lora.merge(merged)
            save.model(merged, run.dir / "model", task.tokenizer)
        else:
            adapters.save_adapter(adapted.model, run.dir / "model", base)
            save.tokenizer(task.tokenizer, run.dir / "model")


def first_lora(cfg: Config) -> Method | None:
    """The method that is saved, mixed and planned for: LoRA of rank 8 if it is chosen, else the first LoRA."""
    plain = [method for method in cfg.chosen if method.kind == "lora"]
    return Method("lora", 8) if Method("lora", 8) in plain else next(iter(plain), None)


# --- Several adapters on one base


def mix_adapters(cfg: Config, run: Run, task: Task) -> None:
    """Trains a second adapter for the second task on the base of the first; compares both, switched and mixed."""
    method = first_lora(cfg)
    if not cfg.mix or method is None or not task.second:
        return
    model = copy.deepcopy(task.base)
    adapters.load_adapter(model, run.dir / "adapters" / method.name, "first")
    lora.apply_lora(model, method.size, cfg.alpha, cfg.dropout, cfg.targets.split(","), run.generator("second"),
                    name="second")  # fmt: skip
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    adapted = Adapted(model, trained, lambda batch: plain(model, batch))
    train(cfg, run, adapted, task.second, cfg.lr, "second", cfg.steps, "second")
    mixes: dict[str, dict[str, float]] = {
        "none": {},
        "first": {"first": 1.0},
        "second": {"second": 1.0},
        "half": {"first": 0.5, "second": 0.5},
        "sum": {"first": 1.0, "second": 1.0},
    }
    losses = {}
    for name, weights in mixes.items():
        lora.activate(model, weights)
        losses[name] = [evaluate(cfg, adapted, part) for part in (task.held_out, task.second_held_out)]
    run.table("two adapters on one base, held-out loss", [
        {"active": " + ".join(f"{w:g} · {n}" for n, w in mixes[name].items()) or "none", "first task": f"{a:.3f}",
         "second task": f"{b:.3f}"} for name, (a, b) in losses.items()
    ])  # fmt: skip
    for mix in ("half", "sum"):
        for i, own in enumerate(("first", "second")):
            gain, kept = losses["none"][i] - losses[own][i], losses["none"][i] - losses[mix][i]
            run.check(f"{mix}_keeps_{own}", kept / gain if gain else 0.0)


# --- Results


def headline(cfg: Config) -> list[Method]:
    """The methods among the results: all weights, one LoRA, and the same over quantized weights; the others are in the
    table and in the checks."""
    low = first_lora(cfg)
    wanted = {Method("full"), low, Method("nf4", low.size) if low else None}
    found = [method for method in cfg.chosen if method in wanted]
    return found or cfg.chosen[:1]


def share_of_gain(result: Result, results: list[Result], before: float) -> float | None:
    """The share of full fine-tuning's gain that a method reaches."""
    full = next((r for r in results if r.method.kind == "full"), None)
    if full is None or before == full.loss:
        return None
    return (before - result.loss) / (before - full.loss)


def table_row(result: Result, results: list[Result], before: float, total: int) -> dict[str, str]:
    """A method's line in the comparison."""
    share, seconds = share_of_gain(result, results, before), result.seconds
    full = next((r.seconds for r in results if r.method.kind == "full"), None)
    return {
        "method": result.method.name,
        "trained": f"{result.trained:,}",
        "share": f"{result.trained / total:.2%}",
        "loss": f"{result.loss:.3f}",
        "of full's gain": "–" if share is None else f"{share:.0%}",
        "step, full = 1": f"{seconds / full:.2f}" if seconds and full else "–",
        "MB, predicted": f"{result.bytes('predicted') / 1e6:.1f}",
        "MB, measured": f"{result.bytes('measured') / 1e6:.1f}",
    }


def report(cfg: Config, run: Run, results: list[Result], before: float, total: int) -> None:
    """Every method has to beat the base, and its own loss at step 0. Rank 8 has to reach nine tenths of full
    fine-tuning's gain, and over quantized weights to stay within a tenth of a nat of that over dense ones,
    or within a twentieth of its gain where that is more."""
    by_name = {r.method.name: r for r in results}
    shown = headline(cfg)
    guessing = toy.CHANCE if cfg.model == "scratch" and cfg.data is None else None
    for r in results:
        name, bar, targets = f"{r.method.name}_loss", min(before, r.start), []
        if (dense := by_name.get(f"lora_{r.method.size}")) and r.method.kind in QUANTIZED:
            targets.append(dense.loss + max(0.1, 0.05 * (before - dense.loss)))
        if guessing is not None and r.method.name in ("full", "lora_8"):
            targets.append(guessing / 2)
        if r.method in shown:
            run.result(name, r.loss, baseline=bar, target=min([bar, *targets]), higher=False)
        else:
            run.check(name, r.loss, at_most=min([math.nextafter(bar, -math.inf), *targets]))
        run.check(f"{r.method.name}_trained", r.trained)
        run.check(f"{r.method.name}_bytes", r.bytes("measured"))
        run.check(f"{r.method.name}_bytes_predicted", r.bytes("predicted"))
        if r.seconds is not None:
            run.check(f"{r.method.name}_seconds", r.seconds)
    if "full" in by_name and "lora_8" in by_name:
        share = share_of_gain(by_name["lora_8"], results, before)
        run.result("lora_8_of_full_gain", share or 0.0, baseline=0.0, target=0.9)
    if guessing is not None:
        run.check("loss_of_guessing", guessing)


# --- Memory


def memory_plan(cfg: Config) -> tuple[LlamaConfig, memory.Setup]:
    """What the method that is saved, or else the first, needs by the memory formulas; nothing is loaded."""
    shape = shape_of(cfg)
    return shape, plan_of(cfg, first_lora(cfg) or cfg.chosen[0], shape)


def shape_of(cfg: Config) -> LlamaConfig:
    """The shape of the base model."""
    if cfg.model != "scratch":
        return load.llama_config(cfg.model)
    vocabulary = small_tokenizer(task_conversations(cfg)).vocab_size
    return small_config(vocabulary, cfg.max_length + longest(cfg))


def plan_of(cfg: Config, method: Method, shape: LlamaConfig) -> memory.Setup:
    """A step of the method on full rows."""
    row = torch.empty(1, 1, dtype=torch.int64).expand(1, cfg.batch * cfg.max_length)
    whole = Batch(row, row, row, torch.tensor([0, row.numel()]))
    return setup(method, whole, "fp32", shape, cfg.targets.split(","))
