"""Supervised fine-tuning: learn to give the answers of conversations, given the questions.

    loss = − Σ_t m_t log p(x_t | x_<t) / Σ_t m_t        m_t = 1 for the tokens of an answer and its end, else 0

Step 1 of InstructGPT (Ouyang et al. 2022, arXiv:2203.02155). Reads top to bottom: settings, loss and gradients, the run
(setup, loop, evaluation), then its parts. The README explains every metric and every choice.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
from rich.console import Console

from finetune import memory, ops, optim
from finetune.data import packing, preview
from finetune.data.conversations import Conversation
from finetune.data.packing import Batch, Document
from finetune.data.rows import check_form
from finetune.data.toy_directory import small_config, small_llama
from finetune.errors import UserError
from finetune.lm import head, template_tokens
from finetune.lm.io import hub, load
from finetune.lm.llama import Llama, LlamaConfig
from finetune.lm.tokenizer import Tokenizer
from finetune.peft import adapters, bases, lora
from finetune.runs import config, display, machine
from finetune.runs.config import bounded
from finetune.runs.run import Run

from . import adapter
from .data import CHANCE, load_data, small_tokenizer, tokenize
from .samples import answers, choose


@dataclass
class Config(config.Config):
    steps: int = 60
    checkpoint_every: int = 20
    model: str = "smollm2"  # a model folder, a .gguf file, smollm2, a hub id, or scratch: a small new Llama
    # a file of rows (.jsonl, .json, .csv, .tsv, .parquet) or a folder; none: Python's documentation (scratch: a toy)
    data: Path | None = None
    # --- Rows
    # messages, sharegpt, alpaca, prompt or prompt-messages; none: each row's form is found by its keys
    form: str | None = None
    # chatml, chatml-tools, llama3, gemma, mistral, zephyr, alpaca, or a Jinja file; none: the model's own
    template: str | None = None
    # what is learned: the answers, the last one only, or every token; a row's key train_on overrides it
    train_on: Literal["answers", "last", "everything"] = "answers"
    # rows that the template drops a part of: refuse the run, skip them, or keep them and learn what is written
    unwritten: packing.Unwritten = "refuse"
    # --- Method
    method: Literal["lora", "full"] = "lora"  # train adapters on frozen weights, or all weights
    # LoRA: an adapter to train further, or a run that made one; on its base model, or on the one that --model gives
    adapter: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights; adapters and optimizer stay in float32
    rank: int = bounded(8, at_least=1, at_most=1 << 16)  # LoRA: rank of the update
    alpha: float = bounded(16.0, above=0)  # LoRA: the update is scaled by alpha / rank
    dropout: float = bounded(0.0, at_least=0, below=1)  # LoRA: probability of dropping an input of the adapters
    targets: str = ",".join(lora.TARGETS)  # LoRA: adapted layers; all-linear: those; head (lm_head) is one too
    # LoRA: modules that are trained whole and saved with the adapter, such as embed_tokens,norm
    modules_to_save: str | None = None
    # --- Optimizer
    lr: float = bounded(1e-3, at_least=0)  # peak learning rate
    # steps until the peak; from there a cosine falls to a tenth of it
    warmup: int = bounded(5, at_least=0, at_most=10**9)
    weight_decay: float = bounded(0.0, at_least=0)  # AdamW's, on matrices only
    clip: float = bounded(1.0, above=0)  # largest norm of the gradient
    # --- Batches
    batch: int = bounded(1, at_least=1, at_most=1 << 20)  # rows of a step
    # micro-batches of a step, computed one after the other to save memory
    accumulate: int = bounded(1, at_least=1, at_most=1 << 20)
    # tokens of a row; longer conversations are cut
    max_length: int = bounded(480, at_least=8, at_most=1 << 26)
    packing: bool = True  # fill rows with several conversations, which do not attend to each other
    checkpointing: bool = False  # keep only the blocks' inputs and compute the rest again: less memory, more time
    # --- Evaluation
    eval_rows: int = bounded(40, at_least=1, at_most=10**9)  # held-out conversations to evaluate on
    # steps between two evaluations; 0: only before and after
    eval_every: int = bounded(20, at_least=0, at_most=10**9)
    samples: int = bounded(3, at_least=0, at_most=1 << 16)  # questions to answer before and after
    shuffle_answers: bool = False  # control: every question gets the answer of another, so there is nothing to learn

    @classmethod
    def toy(cls) -> "Config":
        return cls(
            steps=200, model="scratch", method="full", lr=3e-3, warmup=20, batch=8, max_length=160,
            eval_rows=128, eval_every=25, samples=4, checkpoint_every=50,
        )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        check_form(self.form)
        if self.template is not None:
            template_tokens.file_of(self.template)
        lora.parse_targets(self.targets)
        if self.modules_to_save and self.method != "lora":
            raise UserError("--modules-to-save is for LoRA: --method full trains all modules; omit it")
        if self.accumulate > self.batch:
            raise UserError(f"--accumulate {self.accumulate} exceeds the batch of {self.batch} rows")


# --- The algorithm: what is predicted, what a step averages over


def sft_loss(model: Llama, batch: Batch, reduction: Literal["mean", "sum"] = "mean") -> torch.Tensor:
    """Cross entropy (nats) of the learned tokens of a packed batch; scalar fp32. The logits never exist at once."""
    hidden = model(batch.tokens, positions=batch.positions, cu_seqlens=batch.cu_seqlens, hidden=True)  # (1, T, C)
    return head.cross_entropy(model, hidden[0], batch.targets[0], reduction)


def micro_batches(cfg: Config, run: Run, documents: list[Document], rows: list[list[int]], step: int) -> list[Batch]:
    """The rows of a step (each a list of documents) in `cfg.accumulate` packed batches."""
    chosen = packing.batch_indices(len(rows), cfg.batch, step, lambda epoch: run.generator("epoch", epoch))
    bounds = [i * cfg.batch // cfg.accumulate for i in range(cfg.accumulate + 1)]
    batches = []
    for start, stop in pairwise(bounds):
        members = [documents[i] for row in chosen[start:stop] for i in rows[row]]
        batches.append(packing.collate(members))
    return batches


def accumulate_gradients(model: Llama, batches: Sequence[Batch]) -> float:
    """Adds the gradient of the mean loss over all learned tokens of `batches`; returns that loss."""
    learned = sum(batch.learned for batch in batches)
    total = 0.0
    for batch in batches:
        # Divide by the tokens of all batches: a mean of the batches' means would weight tokens of short answers more.
        loss = sft_loss(model, batch, reduction="sum") / learned
        loss.backward()
        total += loss.item()
    return total


def main(cfg: Config, run: Run) -> dict[str, Any]:
    # What cannot fit is refused by the formulas, before the model is read.
    cfg = adapter.settled(cfg, run.console)
    sets = load_data(cfg, run.print)
    shape, setup = memory_plan(cfg)
    if cfg.max_length > shape.max_length:
        raise UserError(f"--max-length {cfg.max_length}: the model's own is {shape.max_length}")
    memory.check_memory(shape, setup, "--max-length or --batch, more parts with --accumulate, or --checkpointing")

    # Tokens, model, trained parameters, optimizer.
    tokenizer, names, added = load_tokenizer(cfg, sets["train"], run.console)
    documents = tokenize(cfg, sets, tokenizer, run.print)
    if added or cfg.adapter:
        shape = replace(shape, vocab_size=max(shape.vocab_size, tokenizer.vocab_size))
    for part in documents.values():
        packing.check_vocabulary(part, shape.vocab_size)
    train = documents.pop("train")
    model, fresh = load_model(cfg, tokenizer, names, added, run)
    if cfg.adapter:
        adapter.put(cfg, run, model, added)
    elif cfg.method == "lora":
        layers = lora.parse_targets(cfg.targets)
        lora.apply_lora(model, cfg.rank, cfg.alpha, cfg.dropout, layers, run.generator("lora"))
        if whole := whole_modules(cfg, fresh):
            lora.train_modules(model, whole)
            check_whole(model)
            setup = replace(setup, whole=",".join(whole))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = optim.AdamW(optim.decay_groups(trained.values(), cfg.weight_decay), lr=cfg.lr)
    model.gradient_checkpointing = cfg.checkpointing
    check_disk(cfg, run, model, trained)

    # Whole conversations are packed into rows of max_length tokens: no padding, and none is cut in two.
    rows = packing.pack([len(d) for d in train], cfg.max_length) if cfg.packing else [[i] for i in range(len(train))]
    tokens, learned = sum(map(len, train)), sum(d.learned for d in train)
    run.print(
        f"{len(train)} conversations in {len(rows)} rows, {tokens:,} tokens of which {learned:,} are learned; "
        f"{sum(p.numel() for p in trained.values()):,} parameters are trained"
    )
    run.print(f"evaluating the untrained model on {', '.join(f'{len(d)} {name}' for name, d in documents.items())} …")
    before = evaluate(model, documents, cfg)
    source = "unseen topics" if "unseen_topics" in documents else "held-out questions"
    questions = choose(documents.get("unseen_topics", documents["held_out"]), cfg.samples, tokenizer, model, run)
    answers_before = answers(model, tokenizer, questions)
    if not cfg.steps:
        run.log(0, **before)

    clock = {"speeds": torch.zeros(min(cfg.steps, 1000))}  # tokens a second of the last steps
    for step in run.steps(cfg.steps, {"trained": trained, "optimizer": optimizer, "clock": clock}):
        began = perf_counter()
        # A function of (seed, step): a resumed run stores no place in the data and still sees the same batches.
        batches = micro_batches(cfg, run, train, rows, step)
        loss = accumulate_gradients(model, batches)
        # Rows differ in how surprising they are: clipping keeps a single one from dominating Adam's moments.
        norm = ops.clip_grad_norm_([p.grad for p in trained.values() if p.grad is not None], cfg.clip)
        # Warm-up, since Adam's second moment knows nothing yet; then a cosine to a tenth, where the run ends.
        lr = optim.cosine(step, cfg.steps, cfg.warmup, cfg.lr, cfg.lr / 10)
        optimizer.step(lr=lr)
        optimizer.zero_grad()
        clock["speeds"][step % 1000] = sum(b.tokens.numel() for b in batches) / (perf_counter() - began)
        run.log(step, **({} if step else before), loss=loss, grad_norm=norm, lr=lr)
        # The last evaluation comes after the loop, when the model is saved.
        if cfg.eval_every and (step + 1) % cfg.eval_every == 0 and step + 1 < cfg.steps:
            run.log(step, **evaluate(model, documents, cfg))

    # Saved first: whatever fails below, what was trained is kept.
    base = bases.base_name(cfg.model) if cfg.method == "lora" and cfg.model != "scratch" else None
    adapters.save_trained(model, tokenizer, run.dir / "model", base)
    after = evaluate(model, documents, cfg)
    if cfg.steps:
        run.log(cfg.steps - 1, **after)
    if questions:
        pairs = zip(questions, answers_before, answers(model, tokenizer, questions), strict=True)
        lines = [{"question": q.text, "before": old, "after": new, "wanted": q.wanted} for q, old, new in pairs]
        run.table(f"answers of the model to {source}", lines)
    report(cfg, run, before, after)
    batch = micro_batches(cfg, run, train, rows, 0)[0]
    setup = replace(setup, seq=batch.tokens.numel())
    memory.record_step(run, shape, setup, model=model, optimizer=optimizer, loss=lambda: sft_loss(model, batch))
    run.next_commands = next_commands(cfg, run.dir)
    return {
        "trained_parameters": sum(p.numel() for p in trained.values()),
        "loss_before": before["held_out_loss"],
        "tokens_per_second": clock["speeds"].median().item() if cfg.steps else None,
    }


def dry_run(cfg: Config, console: Console) -> None:
    """`--dry-run`: shows three rows as the model sees them, and counts; reads no weights and writes nothing."""

    def say(text: str) -> None:
        display.say(console, text)

    sets = load_data(cfg, say)
    tokenizer, *_ = load_tokenizer(cfg, sets["train"], console)
    documents = tokenize(cfg, sets, tokenizer, say)
    preview.show(console, documents, tokenizer, cfg.max_length, cfg.packing, cfg.batch * cfg.steps)


# --- Evaluation


@torch.no_grad()
def evaluate(model: Llama, documents: dict[str, list[Document]], cfg: Config) -> dict[str, float]:
    """Mean loss (nats) over the learned tokens of each set and, of a model from scratch, the share of answers whose
    every token is the likeliest: those that greedy decoding gives."""
    model.eval()
    found = {}
    for name, part in documents.items():
        rows = packing.pack([len(d) for d in part], cfg.max_length)
        batches = [packing.collate([part[i] for i in row]) for row in rows]
        found[f"{name}_loss"] = sum(sft_loss(model, b, "sum").item() for b in batches) / sum(b.learned for b in batches)
        if cfg.model == "scratch":
            right = [r for batch in batches for r in answered(model, batch)]
            found[f"{name}_accuracy"] = sum(right) / len(right)
    model.train()
    return found


def answered(model: Llama, batch: Batch) -> list[bool]:
    """For each document: is every learned token the likeliest one?"""
    logits = model(batch.tokens, positions=batch.positions, cu_seqlens=batch.cu_seqlens)[0]  # (T, V)
    right = (logits.argmax(-1) == batch.targets[0]) | (batch.targets[0] == packing.IGNORE)
    return [bool(part.all()) for part in right.tensor_split(batch.cu_seqlens[1:-1].long())]


def report(cfg: Config, run: Run, before: dict[str, float], after: dict[str, float]) -> None:
    """The results, with the targets of the default setting and of the toy; any other run has to beat its own start."""
    falls = {} if cfg.data or cfg.model != "smollm2" else {"held_out_loss": 0.25, "unseen_topics_loss": 0.10}
    for name, value in after.items():
        if name.endswith("_accuracy"):
            run.result(name, value, baseline=CHANCE, target=None if cfg.data else 0.9)
        else:
            target = before[name] * (1 - falls.get(name, 0.0))
            run.result(name, value, baseline=before[name], target=target, higher=False)


def next_commands(cfg: Config, folder: Path) -> list[tuple[str, str]]:
    """What one does next with the result: (what for, words of the command line)."""
    ask, *others = bases.next_commands(folder)
    if cfg.model == "scratch":
        return [ask]
    if cfg.method == "lora":
        return [ask, *others]
    name, file = (shlex.quote(str(path)) for path in (folder, folder.with_name(f"{folder.name}-q8_0.gguf")))
    return [ask, ("a file for llama.cpp", f"export {name} --gguf q8_0 --out {file}")]


# --- Model and files


def load_tokenizer(cfg: Config, rows: list[Conversation], console: Console) -> tuple[Tokenizer, list[str], list[str]]:
    """The model's tokenizer with the chat template of --template, the tokens that this writes, and those of them that
    were added to the vocabulary; from scratch a new tokenizer, of the training `rows`."""
    tokenizer, names, added = adopted(cfg, rows, console)
    if cfg.template is not None:
        new = f"; new in the vocabulary: {', '.join(added)}" if added else ""
        display.say(console, f"chat template: {cfg.template}; an answer ends with {tokenizer.eos}{new}")
    return tokenizer, names, added


def adopted(
    cfg: Config, rows: list[Conversation], console: Console | None = None
) -> tuple[Tokenizer, list[str], list[str]]:
    """The same without a word."""
    tokenizer = small_tokenizer(rows) if cfg.model == "scratch" else read_tokenizer(cfg, console)
    names, added = ([], []) if cfg.template is None else template_tokens.adopt(tokenizer, cfg.template)
    return tokenizer, names, added


def read_tokenizer(cfg: Config, console: Console | None) -> Tokenizer:
    """The tokenizer of the model, or of the adapter that is trained further."""
    cfg = adapter.settled(cfg, console)
    return load.tokenizer(adapter.tokenizer_folder(cfg, hub.resolve(cfg.model, console)))


def load_model(cfg: Config, tokenizer: Tokenizer, names: list[str], added: list[str], run: Run) -> tuple[Llama, bool]:
    """The model to train, with embeddings for a template's tokens, and whether these have to be trained; from scratch
    it is made here."""
    dtype = getattr(torch, cfg.dtype)
    if cfg.template is not None and (file := template_tokens.file_of(cfg.template)):
        run.depends_on("template", file)
    if cfg.model == "scratch":
        return small_llama(small_config(tokenizer.vocab_size, cfg.max_length)).to(dtype), False
    source = bases.model_of(run, cfg.model)
    model = load.llama(source, dtype)
    if cfg.template is None or cfg.adapter:
        return model, False
    fresh = template_tokens.embed(model, tokenizer, names, added)
    template_tokens.end_ids(model, tokenizer)
    if fresh:
        run.print(f"the embeddings of {', '.join(fresh)} begin as means of others; the whole table is trained")
    return model, bool(fresh)


def whole_modules(cfg: Config, new: bool) -> list[str]:
    """What LoRA trains whole: --modules-to-save, and embedding and head if they have `new` tokens, which no base model
    has learned."""
    if new and "head" in lora.parse_targets(cfg.targets):
        raise UserError(
            f"--template {cfg.template} needs tokens that the model has not learned, so that the head is trained "
            "whole: omit it from --targets"
        )
    return [
        *(cfg.modules_to_save.split(",") if cfg.modules_to_save else ()),
        *(("embed", "head") if new else ()),
    ]


def check_whole(model: Llama) -> None:
    """UserError if the gradients and optimizer states of the modules that an adapter holds whole exceed the free
    memory: that a model has not learned a token of its vocabulary, only its weights tell, not `memory_plan`."""
    tables = [p for name, p in model.named_parameters() if p.requires_grad and ".parts." not in name]
    needed = sum(p.nbytes + p.numel() * (8 if p.dtype == torch.float32 else 12) for p in tables)
    free = machine.available_memory_bytes()
    if free is not None and needed > free:
        raise UserError(
            f"training whole modules needs {display.size(needed)} for gradients and optimizer states, "
            f"{display.size(free)} are free: omit --modules-to-save, or choose a template without new tokens "
            "(zephyr, mistral, alpaca)"
        )


def check_disk(cfg: Config, run: Run, model: Llama, trained: dict[str, torch.nn.Parameter]) -> None:
    """Three checkpoints (two are kept while a third is written) and the result have to fit."""
    if run.resume:
        return
    states = sum(p.numel() * (p.element_size() + (8 if p.dtype == torch.float32 else 12)) for p in trained.values())
    saved = model.parameters() if cfg.method == "full" or cfg.model == "scratch" else trained.values()
    memory.check_disk(run.dir, 3 * states + sum(p.nbytes for p in saved), "the checkpoints and the model")


def memory_plan(cfg: Config) -> tuple[LlamaConfig, memory.Setup]:
    """What is trained and how, for the memory formulas; nothing is loaded."""
    cfg = adapter.settled(cfg)
    added: list[str] = []
    own: dict[str, Any] = {}
    if cfg.model == "scratch":
        tokenizer, *_ = adopted(cfg, load_data(cfg)["train"])
        shape = small_config(tokenizer.vocab_size, cfg.max_length)
    elif cfg.adapter:
        shape, own = adapter.planned(cfg, load.llama_config(cfg.model))
    else:
        shape = load.llama_config(cfg.model)
        if cfg.template is not None:
            tokenizer, _, added = adopted(cfg, [])
            shape = replace(shape, vocab_size=max(shape.vocab_size, tokenizer.vocab_size if added else 0))
    if cfg.method == "lora" and not cfg.adapter:
        own = {"whole": ",".join(whole_modules(cfg, bool(added)))}
    return shape, memory.Setup(
        batch=1,
        seq=cfg.max_length * -(-cfg.batch // cfg.accumulate),  # the rows of a micro-batch lie end to end in one
        dtype="fp32" if cfg.dtype == "float32" else "bf16",
        lora_rank=cfg.rank if cfg.method == "lora" else 0,
        lora_targets=",".join(lora.parse_targets(cfg.targets)),
        checkpointing="block" if cfg.checkpointing else "none",
        **own,
    )
