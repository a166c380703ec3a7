"""Data of the module: conversations to train and evaluate on, and their tokens."""

import json
import random
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.data import conversations, packing, python_docs, rows
from finetune.data.conversations import Conversation
from finetune.data.packing import Document
from finetune.data.toy_directory import assign_numbers, questions
from finetune.errors import UserError
from finetune.lm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from .main import Config

Say = Callable[[str], None]  # prints a line
CHANCE = 0.1  # accuracy of guessing in the toy directory
HELD_OUT = 128  # of the toy directory's 40 · 2 · 8 questions


def load_data(cfg: "Config", say: Say = lambda _: None) -> dict[str, list[Conversation]]:
    """train, held_out and, of Python's documentation, unseen_topics; the latter two no larger than cfg.eval_rows."""
    if cfg.data is not None:
        found, forms = rows.read(cfg.data, cfg.form, cfg.train_on)
        say(forms)
        train, held_out = split(found, cfg.data)
        sets = {"train": train, "held_out": held_out}
    elif cfg.model == "scratch":
        train, held_out = directory(cfg.seed)
        sets = {"train": train, "held_out": held_out}
    else:
        names = ("train", "held_out", "unseen_topics")
        parts = python_docs.split_pairs(python_docs.python_pairs())
        sets = {name: [pair.conversation() for pair in part] for name, part in zip(names, parts, strict=True)}
    for name in sets:
        if name != "train":  # the same rows for every seed, so that seeds can be compared
            sets[name] = random.Random(0).sample(sets[name], min(cfg.eval_rows, len(sets[name])))
    if cfg.shuffle_answers:
        sets["train"] = shuffled(sets["train"], cfg.seed)
    return sets


def split(found: list[Conversation], source: Path) -> tuple[list[Conversation], list[Conversation]]:
    """(training, held-out): a twentieth of the different rows is held out, always the same ones."""
    keyed = [(zlib.crc32(json.dumps(row).encode()), row) for row in found]
    keys = sorted({key for key, _ in keyed})
    if len(keys) < 2:
        raise UserError(f"{source} has one row only: a second, different one is needed to evaluate on")
    held_out = set(keys[: max(1, len(keys) // 20)])
    return [row for key, row in keyed if key not in held_out], [row for key, row in keyed if key in held_out]


def shuffled(rows: list[Conversation], seed: int) -> list[Conversation]:
    """The rows with their last answers in another order: the control, in which nothing can be learned."""
    dealt = random.Random(seed).sample(rows, len(rows))
    return [conversations.with_answer_of(row, other) for row, other in zip(rows, dealt, strict=True)]


def tokenize(
    cfg: "Config", sets: dict[str, list[Conversation]], tokenizer: Tokenizer, say: Say
) -> dict[str, list[Document]]:
    """The sets' rows that have an answer within the length. If no held-out row has, training rows are held out."""

    def documents(name: str) -> list[Document]:
        return packing.tokenize(
            sets[name], tokenizer, cfg.max_length, cfg.unwritten, lambda text: say(f"{name}: {text}")
        )

    found = {name: documents(name) for name in sets}
    packing.needed(found["train"], cfg.max_length)
    if not found["held_out"]:
        found["train"], found["held_out"] = packing.held_out_of(found["train"], cfg.max_length)
        say(
            f"no held-out row has an answer within {cfg.max_length} tokens: {len(found['held_out'])} rows of the "
            "training set are held out instead"
        )
    return {name: part for name, part in found.items() if part}


# --- The toy setting: the directory of a house (finetune/data/toy_directory.py) as chats


def directory(seed: int) -> tuple[list[Conversation], list[Conversation]]:
    """(training, held-out) conversations; facts and split depend on the seed.

    Some phrasings of a fact are held out, so answering them requires generalizing across phrasings.
    """
    rng = random.Random(seed)
    rows = [row for what in ("floor", "door") for row in questions(what, assign_numbers(rng))]
    rng.shuffle(rows)
    return rows[HELD_OUT:], rows[:HELD_OUT]


def small_tokenizer(rows: Sequence[Conversation]) -> Tokenizer:
    """A BPE of 512 tokens, trained on the rows."""
    return Tokenizer.train([message.get("content", "") for row in rows for message in row], vocab_size=512)
