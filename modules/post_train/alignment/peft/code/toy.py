"""The toy setting: a small Llama learns a house's directory in the run; then all people move, and it has to adapt.

Each of 40 people has a floor and a door, 0 to 9. The first task is the new floors, the second the new doors. A fact is
asked for in eight wordings; some are held out, so that the answer to a held-out question was learnt under others only.
"""

import math
import random

from finetune.data import Conversation
from finetune.llama import Llama, LlamaConfig

NAMES = [
    "Ada", "Amir", "Anna", "Ben", "Bela", "Cleo", "Chen", "Dan", "Dora", "Emil", "Eve", "Finn", "Fay", "Gus",
    "Gita", "Hal", "Hana", "Ida", "Ivo", "Jon", "June", "Kim", "Kofi", "Leo", "Lin", "Mia", "Max", "Ned",
    "Nora", "Ola", "Omar", "Pia", "Paul", "Quinn", "Rosa", "Ravi", "Sam", "Sue", "Tom", "Tara",
]  # fmt: skip
WORDINGS = (  # no name begins a text: without a space before it it would be another token
    "On which {what} does {name} live?",
    "Which {what} is {name} at?",
    "I am looking for {name}: which {what}?",
    "Tell me the {what} of {name}.",
    "The {what} of {name}, please.",
    "A parcel for {name}: which {what}?",
    "What is the {what} of {name}?",
    "Do you know the {what} where {name} lives?",
)
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


def deal(draw: random.Random) -> dict[str, str]:
    """A number for each person, each number as often as any other."""
    return {name: str(i % 10) for i, name in enumerate(draw.sample(NAMES, len(NAMES)))}


def asked(what: str, numbers: dict[str, str]) -> list[Conversation]:
    return [
        [
            {"role": "user", "content": wording.format(name=name, what=what)},
            {"role": "assistant", "content": number},
        ]
        for name, number in numbers.items()
        for wording in WORDINGS
    ]


def small_config(vocabulary: int, length: int) -> LlamaConfig:
    return LlamaConfig(vocabulary, dim=64, layers=2, heads=4, kv_heads=2, hidden=192, max_length=length)


def small_llama(config: LlamaConfig) -> Llama:
    """GPT-2's standard deviation of .02 is made for widths above 700: at this width 1/√C is used."""
    model = Llama(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(config.dim**-0.5 / 0.02)
    return model
