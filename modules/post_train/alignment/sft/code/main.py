"""Supervised fine-tuning: the next token of the answers, given the questions. Reads top to bottom.

    loss = − Σ_t m_t log p(x_t | x_<t) / Σ_t m_t        m_t = 1 for the tokens of an answer and its end, else 0

Step 1 of InstructGPT (Ouyang et al. 2022, arXiv:2203.02155). The README explains every metric and every choice.
"""

import json
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Literal

import torch

from finetune import memory, ops, optim
from finetune.data import conversations, packing, python_docs
from finetune.data.conversations import Conversation
from finetune.data.packing import Batch, Document
from finetune.data.toy_directory import small_config, small_llama
from finetune.errors import UserError
from finetune.lm.generate import generate, said, stop_ids
from finetune.lm.io import hub, load, save
from finetune.lm.llama import Llama, LlamaConfig
from finetune.lm.tokenizer import Tokenizer
from finetune.peft import adapters, lora
from finetune.runs import config
from finetune.runs.config import bounded

from .toy import CHANCE, directory, small_tokenizer


@dataclass
class Config(config.Config):
    steps: int = 60
    checkpoint_every: int = 20
    model: str = "smollm2"  # a model folder, a .gguf file, smollm2, a hub id, or scratch: a small new Llama
    # JSONL with messages, or prompt and completion; none: Python's own documentation (scratch: a toy directory)
    data: Path | None = None
    method: Literal["lora", "full"] = "lora"  # train adapters on frozen weights, or all weights
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights; adapters and optimizer stay in float32
    rank: int = bounded(8, at_least=1, at_most=1 << 16)  # LoRA: rank of the update
    alpha: float = bounded(16.0, above=0)  # LoRA: the update is scaled by alpha / rank
    # LoRA: chance that an input of the adapters is left out
    dropout: float = bounded(0.0, at_least=0, below=1)
    targets: str = ",".join(lora.TARGETS)  # LoRA: adapted layers
    lr: float = bounded(1e-3, at_least=0)  # peak learning rate
    # steps until the peak; from there a cosine falls to a tenth
    warmup: int = bounded(5, at_least=0, at_most=10**9)
    weight_decay: float = bounded(0.0, at_least=0)  # AdamW's, on matrices only
    clip: float = bounded(1.0, above=0)  # largest norm of the gradient
    batch: int = bounded(1, at_least=1, at_most=1 << 20)  # rows of a step
    # parts in which a step is computed one after the other, for less memory
    accumulate: int = bounded(1, at_least=1, at_most=1 << 20)
    # tokens of a row; longer conversations are cut
    max_length: int = bounded(480, at_least=8, at_most=1 << 26)
    packing: bool = True  # fill rows with several conversations, which do not see each other
    checkpointing: bool = False  # keep only the blocks' inputs and compute the rest again: less memory, more time
    eval_rows: int = bounded(40, at_least=1, at_most=10**9)  # held-out conversations to evaluate on
    # steps between two evaluations; 0: only before and after
    eval_every: int = bounded(20, at_least=0, at_most=10**9)
    samples: int = bounded(3, at_least=0, at_most=1 << 16)  # questions to answer before and after
    shuffle_answers: bool = False  # control: every question gets another one's answer, so there is nothing to learn

    @classmethod
    def toy(cls) -> "Config":
        return cls(
            steps=200, model="scratch", method="full", lr=3e-3, warmup=20, batch=8, max_length=160,
            eval_rows=128, eval_every=25, samples=4, checkpoint_every=50,
        )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        for target in self.targets.split(","):
            if target not in lora.TARGETS:
                known = ", ".join(lora.TARGETS)
                raise UserError(f"--targets: '{target}' is no linear layer of a Llama: they are {known}")
        if self.accumulate > self.batch:
            raise UserError(f"--accumulate {self.accumulate}: a step of {self.batch} rows has no so many parts")

    def inputs(self) -> dict[str, Path]:
        return super().inputs() | hub.local("model", self.model)


# --- The algorithm: what is predicted, a step, the loop


def sft_loss(model: Llama, batch: Batch, reduction: Literal["mean", "sum"] = "mean") -> torch.Tensor:
    """Cross entropy (nats) of the learned tokens of a packed batch; scalar fp32. The logits never exist at once."""
    hidden = model(batch.tokens, positions=batch.positions, cu_seqlens=batch.cu_seqlens, hidden=True)  # (1, T, C)
    return ops.linear_cross_entropy(hidden[0], model.head_weight, batch.targets[0], reduction=reduction)


def accumulate_gradients(model: Llama, parts: Sequence[Batch]) -> float:
    """Adds the gradient of the mean loss over all learned tokens of `parts`; that loss.

    Every token counts the same, in whichever part it is: a mean of the parts' means would favor short answers.
    """
    learned = sum(batch.learned for batch in parts)
    total = 0.0
    for batch in parts:
        loss = sft_loss(model, batch, reduction="sum") / learned
        loss.backward()
        total += loss.item()
    return total


def main(cfg: Config, run):
    sets = load_data(cfg)
    shape, setup = memory_plan(cfg)
    if cfg.max_length > shape.max_length:
        raise UserError(f"--max-length {cfg.max_length}: the model's own is {shape.max_length}")
    memory.check_memory(shape, setup, "--max-length or --batch, more parts with --accumulate, or --checkpointing")
    model, tokenizer = load_model(cfg, sets, run)
    documents = tokenized(cfg, sets, tokenizer, run)
    for part in documents.values():
        packing.check_vocabulary(part, shape.vocab_size)
    train = documents.pop("train")
    if cfg.method == "lora":
        targets, start = cfg.targets.split(","), run.generator("lora")
        lora.apply_lora(model, cfg.rank, cfg.alpha, cfg.dropout, targets, start)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = optim.AdamW(optim.decay_groups(trained.values(), cfg.weight_decay), lr=cfg.lr)
    check_disk(cfg, run, model, trained)
    model.gradient_checkpointing = cfg.checkpointing
    rows = packing.pack([len(d) for d in train], cfg.max_length) if cfg.packing else [[i] for i in range(len(train))]
    tokens, learned = sum(map(len, train)), sum(d.learned for d in train)
    run.print(
        f"{len(train)} conversations in {len(rows)} rows, {tokens:,} tokens of which {learned:,} are learned; "
        f"{sum(p.numel() for p in trained.values()):,} parameters are trained"
    )

    run.print(f"evaluating the model as it is on {', '.join(f'{len(d)} {name}' for name, d in documents.items())} …")
    before = evaluate(model, documents, cfg)
    questions = choose(cfg, documents, tokenizer, model, run)
    answers_before = answers(model, tokenizer, questions)
    if not cfg.steps:
        run.log(0, **before)

    def micro_batches(step: int) -> list[Batch]:
        chosen = packing.batch_indices(len(rows), cfg.batch, step, lambda epoch: run.generator("epoch", epoch))
        bounds = [i * cfg.batch // cfg.accumulate for i in range(cfg.accumulate + 1)]
        parts = [[train[i] for row in chosen[a:b] for i in rows[row]] for a, b in pairwise(bounds)]
        return [packing.collate(part) for part in parts]

    clock = {"speeds": torch.zeros(min(cfg.steps, 1000))}  # tokens a second of the last steps
    for step in run.steps(cfg.steps, {"trained": trained, "optimizer": optimizer, "clock": clock}):
        began = perf_counter()
        parts = micro_batches(step)
        loss = accumulate_gradients(model, parts)
        norm = ops.clip_grad_norm_([p.grad for p in trained.values()], cfg.clip)
        lr = optim.cosine(step, cfg.steps, cfg.warmup, cfg.lr, cfg.lr / 10)
        optimizer.step(lr=lr)
        optimizer.zero_grad()
        clock["speeds"][step % 1000] = sum(b.tokens.numel() for b in parts) / (perf_counter() - began)
        run.log(step, **({} if step else before), loss=loss, grad_norm=norm, lr=lr)
        if cfg.eval_every and (step + 1) % cfg.eval_every == 0 and step + 1 < cfg.steps:
            run.log(step, **evaluate(model, documents, cfg))

    save_trained(cfg, model, tokenizer, run.dir / "model")
    after = evaluate(model, documents, cfg)
    if cfg.steps:
        run.log(cfg.steps - 1, **after)
    if questions:
        compared = zip(questions, answers_before, answers(model, tokenizer, questions), strict=True)
        run.table(
            f"answers of the model to {'unseen topics' if 'unseen_topics' in documents else 'held-out questions'}",
            [{"question": q.text, "before": old, "after": new, "wanted": q.wanted} for q, old, new in compared],
        )
    judge(cfg, run, before, after)
    measure_memory(cfg, run, model, optimizer, micro_batches(0)[0])
    return {
        "trained_parameters": sum(p.numel() for p in trained.values()),
        "loss_before": before["held_out_loss"],
        "tokens_per_second": clock["speeds"].median().item() if cfg.steps else None,
    }


# --- Data


def load_data(cfg: Config) -> dict[str, list[Conversation]]:
    """train, held_out and, of Python's documentation, unseen_topics; the latter two no larger than cfg.eval_rows."""
    if cfg.data is not None:
        train, held_out = split(conversations.read_jsonl(cfg.data), cfg.data)
        sets = {"train": train, "held_out": held_out}
    elif cfg.model == "scratch":
        train, held_out = directory(cfg.seed)
        sets = {"train": train, "held_out": held_out}
    else:
        names = ("train", "held_out", "unseen_topics")
        parts = python_docs.split_pairs(python_docs.python_pairs())
        sets = {name: [pair.conversation() for pair in part] for name, part in zip(names, parts, strict=True)}
    for name in sets:
        if name != "train":  # the same for every seed, so that seeds can be compared
            sets[name] = random.Random(0).sample(sets[name], min(cfg.eval_rows, len(sets[name])))
    if cfg.shuffle_answers:
        sets["train"] = shuffled(sets["train"], cfg.seed)
    return sets


def split(rows: list[Conversation], source: Path) -> tuple[list[Conversation], list[Conversation]]:
    """(training, held-out): a twentieth of the different rows is held out, always the same ones."""
    keyed = [(zlib.crc32(json.dumps(row).encode()), row) for row in rows]
    keys = sorted({key for key, _ in keyed})
    if len(keys) < 2:
        raise UserError(f"{source} has one row only: a second, different one is needed to evaluate on")
    held_out = set(keys[: max(1, len(keys) // 20)])
    return [row for key, row in keyed if key not in held_out], [row for key, row in keyed if key in held_out]


def shuffled(rows: list[Conversation], seed: int) -> list[Conversation]:
    """The rows with their last answers dealt out anew."""
    dealt = random.Random(seed).sample(rows, len(rows))
    return [conversations.with_answer_of(row, other) for row, other in zip(rows, dealt, strict=True)]


def tokenized(cfg: Config, sets: dict[str, list[Conversation]], tokenizer: Tokenizer, run) -> dict[str, list[Document]]:
    """The sets' rows that have an answer within the length. Where no held-out row has, others are held out instead."""
    found = {}
    for name, rows in sets.items():
        fit = packing.tokenize if name == "train" else packing.fitting
        found[name], cut, dropped = fit(rows, tokenizer.render, cfg.max_length)
        if cut or dropped:
            run.print(
                f"{name}: of {len(rows)} conversations {cut} were cut to {cfg.max_length} tokens and {dropped} left out"
            )
    if tokenizer.unwritten:
        run.print(f"the chat template does not write these keys of messages: {', '.join(sorted(tokenizer.unwritten))}")
    if not found["held_out"]:
        found["train"], found["held_out"] = packing.held_out_of(found["train"], cfg.max_length)
        run.print(f"no held-out row has an answer within {cfg.max_length} tokens: {len(found['held_out'])} others are")
    return {name: part for name, part in found.items() if part}


# --- Model


def load_model(cfg: Config, sets: dict[str, list[Conversation]], run) -> tuple[Llama, Tokenizer]:
    dtype = getattr(torch, cfg.dtype)
    if cfg.model == "scratch":
        tokenizer = small_tokenizer(sets["train"])
        model = small_llama(small_config(tokenizer.vocab_size, cfg.max_length)).to(dtype)
    else:
        source = hub.resolve(cfg.model, run.console)
        if cfg.model != "smollm2":  # whose files are known by their hash already
            run.depends_on("model", source)
        tokenizer, model = load.tokenizer(source), load.llama(source, dtype)
    return model, tokenizer


def save_trained(cfg: Config, model: Llama, tokenizer: Tokenizer, folder: Path) -> None:
    """The adapter as peft opens it, or the whole model as transformers does, with the tokenizer. `model` stays as it
    is."""
    if cfg.method == "lora" and cfg.model != "scratch":
        adapters.save_adapter(model, folder, str(hub.resolve(cfg.model)))
        save.tokenizer(tokenizer, folder)
    else:
        lora.merge(model, keep=True)
        save.model(model, folder, tokenizer)
        lora.unmerge(model)


def check_disk(cfg: Config, run, model: Llama, trained: dict[str, torch.nn.Parameter]) -> None:
    """Three checkpoints (two are kept while a third is written) and the result have to fit."""
    if run.resume:
        return
    states = sum(p.numel() * (p.element_size() + (8 if p.dtype == torch.float32 else 12)) for p in trained.values())
    saved = model.parameters() if cfg.method == "full" or cfg.model == "scratch" else trained.values()
    memory.check_disk(run.dir, 3 * states + sum(p.nbytes for p in saved), "the checkpoints and the model")


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


@dataclass(frozen=True)
class Question:
    text: str  # what the user says last
    prompt: list[int]  # the conversation until then
    wanted: str


def choose(
    cfg: Config, documents: dict[str, list[Document]], tokenizer: Tokenizer, model: Llama, run
) -> list[Question]:
    """Of the first rows in which an answer follows a question, and which fit the model, the last such pair."""
    found: list[Question] = []
    for document in documents.get("unseen_topics", documents["held_out"]):
        if len(found) == cfg.samples:
            break
        row = document.row or []
        for i in conversations.exchanges(row):
            prompt = tokenizer.encode(tokenizer.render_text(row[:i], add_generation_prompt=True)[0], False)
            if len(prompt) < model.config.max_length:
                asked = next((m["content"] for m in reversed(row[:i]) if m["role"] == "user"), "")
                found.append(Question(asked, prompt, row[i]["content"]))
                break
    if len(found) < cfg.samples:
        run.print(f"{len(found)} held-out rows have an answer to a question that fits: so many samples are shown")
    return found


def answers(model: Llama, tokenizer: Tokenizer, questions: Sequence[Question], max_new_tokens: int = 64) -> list[str]:
    """What the model says, greedily."""
    if not questions:
        return []
    prompts = [question.prompt for question in questions]
    room = model.config.max_length - max(map(len, prompts))
    stops = stop_ids(model, tokenizer)
    model.eval()
    new = generate(model, prompts, min(max_new_tokens, room), stop_ids=stops)
    model.train()
    return [said(tokenizer, ids, stops) for ids in new]


def judge(cfg: Config, run, before: dict[str, float], after: dict[str, float]) -> None:
    """The bars of the default setting and of the toy; whatever else is run has to beat the model it began with."""
    falls = {} if cfg.data or cfg.model != "smollm2" else {"held_out_loss": 0.25, "unseen_topics_loss": 0.10}
    for name, value in after.items():
        if name.endswith("_accuracy"):
            run.result(name, value, baseline=CHANCE, target=None if cfg.data else 0.9)
        else:
            target = before[name] * (1 - falls.get(name, 0.0))
            run.result(name, value, baseline=before[name], target=target, higher=False)


# --- Memory


def memory_plan(cfg: Config) -> tuple[LlamaConfig, memory.Setup]:
    """What is trained and how, for the formulas; nothing is loaded."""
    if cfg.model == "scratch":
        shape = small_config(small_tokenizer(load_data(cfg)["train"]).vocab_size, cfg.max_length)
    else:
        shape = load.llama_config(cfg.model)
    return shape, memory.Setup(
        batch=1,
        seq=cfg.max_length * -(-cfg.batch // cfg.accumulate),  # a part's rows lie end to end in one
        dtype="fp32" if cfg.dtype == "float32" else "bf16",
        lora_rank=cfg.rank if cfg.method == "lora" else 0,
        lora_targets=cfg.targets,
        checkpointing=cfg.checkpointing,
    )


def measure_memory(cfg: Config, run, model: Llama, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    _, setup = memory_plan(cfg)
    setup = replace(setup, seq=batch.tokens.numel())
    run.print("measuring the memory of a step …")
    run.record_memory(
        memory.for_training(model.config, setup, model=model, optimizer=optimizer, loss=lambda: sft_loss(model, batch))
    )
