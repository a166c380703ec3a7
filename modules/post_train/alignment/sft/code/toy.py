"""The toy setting: a directory of a house as chats, and a small tokenizer of its own.

Some wordings of a fact are held out, so the answer to a held-out question was learned under others only. Guessing
reaches 0.1.
"""

import random
from collections.abc import Sequence

from finetune.data.conversations import Conversation
from finetune.data.toy_directory import asked, deal
from finetune.lm.tokenizer import Tokenizer

CHANCE = 0.1
HELD_OUT = 128  # of 40 · 2 · 8 questions


def directory(seed: int) -> tuple[list[Conversation], list[Conversation]]:
    """(training, held-out) conversations; facts and split depend on the seed."""
    draw = random.Random(seed)
    rows = [row for what in ("floor", "door") for row in asked(what, deal(draw))]
    draw.shuffle(rows)
    return rows[HELD_OUT:], rows[:HELD_OUT]


def small_tokenizer(rows: Sequence[Conversation]) -> Tokenizer:
    return Tokenizer.train([message.get("content", "") for row in rows for message in row], vocab_size=512)
