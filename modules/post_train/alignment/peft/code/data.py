"""Data of the module: a base model, loaded or trained here, and the two tasks that it is adapted to."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from finetune.data import conversations, packing, python_docs
from finetune.data import rows as row_files
from finetune.data.conversations import Conversation
from finetune.data.packing import Document
from finetune.data.toy_directory import small_config, small_llama
from finetune.errors import UserError
from finetune.lm import template_tokens
from finetune.lm.io import hub, load
from finetune.lm.llama import Llama
from finetune.lm.tokenizer import Tokenizer
from finetune.peft import bases
from finetune.runs import display
from finetune.runs.run import Run

from . import toy
from .methods import Method, adapt
from .training import train

if TYPE_CHECKING:
    from .main import Config


@dataclass
class Task:
    """A base model, and two tasks to adapt it to."""

    base: Llama
    tokenizer: Tokenizer
    train: list[Document]
    held_out: list[Document]
    second: list[Document]  # the other adapter's; none with --data
    second_held_out: list[Document]


def load_task(cfg: "Config", run: Run) -> Task:
    """The tasks, tokenized, and the base model, which from scratch is trained here."""
    sets = task_conversations(cfg, run.print)
    tokenizer = load_tokenizer(cfg, sets, run.console)
    if cfg.template is not None and (file := template_tokens.file_of(cfg.template)):
        run.depends_on("template", file)
    if cfg.model == "scratch":
        run.seed("base")
        base = small_llama(small_config(tokenizer.vocab_size, cfg.max_length + longest(cfg)))
    else:
        source = bases.model_of(run, cfg.model)
        room = load.llama_config(source).max_length
        if cfg.max_length + longest(cfg) > room:
            raise UserError(
                f"--max-length {cfg.max_length}: with {longest(cfg)} virtual tokens the model has room for {room}"
            )
        base = load.llama(source)
        if cfg.template is not None:
            template_tokens.end_ids(base, tokenizer)
    documents = tokenize(cfg, sets, tokenizer, run.print)
    for part in documents.values():
        packing.check_vocabulary(part, base.config.vocab_size)
    count = sum(len(document) for document in documents["first"][:64])
    if longest(cfg) > count:
        raise UserError(f"--methods: {longest(cfg)} virtual tokens begin as tokens of the rows, which have {count}")
    if cfg.model == "scratch":
        whole = adapt(Method("full"), base, 1.0, 0.0, [], torch.empty(0), run.generator("base"))
        train(cfg, run, whole, documents["base"], cfg.lr_full, "base", cfg.base_steps, "base")
    return Task(base, tokenizer, documents["first"], documents["first_held_out"], documents.get("second", []),
                documents.get("second_held_out", []))  # fmt: skip


def load_tokenizer(cfg: "Config", sets: dict[str, list[Conversation]], console: Console) -> Tokenizer:
    """The model's tokenizer, with the chat template of --template; from scratch a new one."""
    scratch = cfg.model == "scratch"
    tokenizer = small_tokenizer(sets) if scratch else load.tokenizer(hub.resolve(cfg.model, console))
    if cfg.template is None:
        return tokenizer
    _, added = template_tokens.adopt(tokenizer, cfg.template)
    if added and not scratch:
        raise UserError(
            f"--template {cfg.template} needs the tokens {', '.join(added)}, which the model lacks, and most methods "
            "train no embeddings: train them with `run sft` first, or choose zephyr, mistral or alpaca"
        )
    display.say(console, f"chat template: {cfg.template}; an answer ends with {tokenizer.eos}")
    return tokenizer


def small_tokenizer(sets: dict[str, list[Conversation]]) -> Tokenizer:
    """A BPE of 512 tokens, trained on all sets."""
    return Tokenizer.train(
        [m.get("content", "") for rows in sets.values() for row in rows for m in row], vocab_size=512
    )


def task_conversations(cfg: "Config", say: Callable[[str], None] = lambda _: None) -> dict[str, list[Conversation]]:
    """first, first_held_out and, unless there is --data, the same of a second task; base for a model from scratch."""
    if cfg.model == "scratch":
        sets = toy.directories(cfg.seed)
    else:
        pairs = python_docs.python_pairs() if cfg.data is None else []
        train, held_out, _ = python_docs.split_pairs([p for p in pairs if not p.topic.startswith("reference")])
        sets = {"first": [p.conversation() for p in train], "first_held_out": [p.conversation() for p in held_out]}
        sets |= {"second": [backwards(p) for p in train], "second_held_out": [backwards(p) for p in held_out]}
    if cfg.data is not None:
        read, forms = row_files.read(cfg.data, cfg.form, cfg.train_on)
        say(forms)
        rows = random.Random(0).sample(read, len(read))
        if len(rows) < 2:
            raise UserError(f"{cfg.data} has one row only: a second one is needed to evaluate on")
        count = max(1, len(rows) // 10)
        sets = {name: rows for name, rows in sets.items() if name == "base"}
        sets |= {"first": rows[count:], "first_held_out": rows[:count]}
    for name in sets:
        if name.endswith("held_out"):  # the same for every seed, so that seeds can be compared
            sets[name] = random.Random(0).sample(sets[name], min(cfg.eval_rows, len(sets[name])))
    if cfg.shuffle_answers:
        dealt = random.Random(cfg.seed).sample(sets["first"], len(sets["first"]))
        both = zip(sets["first"], dealt, strict=True)
        sets["first"] = [conversations.with_answer_of(row, other) for row, other in both]
    return sets


def backwards(pair: python_docs.Pair) -> Conversation:
    """The second task: the documentation is the question, the name of what it documents the answer."""
    question = f"What in Python is documented so: {pair.answer}"
    return [{"role": "user", "content": question}, {"role": "assistant", "content": pair.name}]


def longest(cfg: "Config") -> int:
    """The most virtual tokens of any method."""
    return max((m.size for m in cfg.chosen if m.kind in ("prompt", "prefix")), default=0)


def tokenize(
    cfg: "Config", sets: dict[str, list[Conversation]], tokenizer: Tokenizer, say: Callable[[str], None]
) -> dict[str, list[Document]]:
    """The sets' rows that have an answer within the length. If no held-out row has, training rows are held out."""

    def documents(name: str) -> list[Document]:
        return packing.tokenize(
            sets[name], tokenizer, cfg.max_length, cfg.unwritten, lambda text: say(f"{name}: {text}")
        )

    found = {name: documents(name) for name in sets}
    for name in ("first", "second"):
        if found.get(name) and not found[f"{name}_held_out"]:
            found[name], found[f"{name}_held_out"] = packing.held_out_of(found[name], cfg.max_length)
    packing.needed(found["first"], cfg.max_length)
    return found
