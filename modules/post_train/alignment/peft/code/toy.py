"""The toy setting: a small Llama learns the directory of a house; then all people move, and it has to adapt.

The first task is the new floors, the second the new doors. Some phrasings of a fact are held out, so answering them
requires generalizing across phrasings.
"""

import math
import random

from finetune.data.conversations import Conversation
from finetune.data.toy_directory import assign_numbers, questions

HELD_OUT = 80  # of 40 · 8 questions of a task
CHANCE = math.log(10) / 2  # nats a token: the number can only be guessed, the end of the answer is certain


def directories(seed: int) -> dict[str, list[Conversation]]:
    """Conversations of the old directory (`base`), and for each task a training and a held-out set."""
    rng = random.Random(seed)
    sets = {"base": [row for what in ("floor", "door") for row in questions(what, assign_numbers(rng))]}
    for task, what in (("first", "floor"), ("second", "door")):
        rows = questions(what, assign_numbers(rng))
        rng.shuffle(rows)
        sets[task], sets[f"{task}_held_out"] = rows[HELD_OUT:], rows[:HELD_OUT]
    return sets
