"""The toy setting: a small Llama learns a house's directory in the run; then all people move, and it has to adapt.

The first task is the new floors, the second the new doors. Some wordings of a fact are held out, so that the answer to
a held-out question was learned under others only.
"""

import math
import random

from finetune.data.conversations import Conversation
from finetune.data.toy_directory import asked, deal

HELD_OUT = 80  # of 40 · 8 questions of a task
CHANCE = math.log(10) / 2  # nats a token: the number can only be guessed, the end of the answer is certain


def directories(seed: int) -> dict[str, list[Conversation]]:
    """Conversations: the old `base`, and of either task what is trained on and what is held out."""
    draw = random.Random(seed)
    sets = {"base": [row for what in ("floor", "door") for row in asked(what, deal(draw))]}
    for task, what in (("first", "floor"), ("second", "door")):
        rows = asked(what, deal(draw))
        draw.shuffle(rows)
        sets[task], sets[f"{task}_held_out"] = rows[HELD_OUT:], rows[:HELD_OUT]
    return sets
