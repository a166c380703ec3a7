"""What toy runs learn: the directory of a house. Each of 40 people has a floor and a door, 0 to 9, asked for in eight
wordings, so that the answer to a question can be learned under others only. And a small Llama to learn it from scratch.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from finetune.lm.llama import Llama, LlamaConfig

if TYPE_CHECKING:
    from finetune.data.conversations import Conversation

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


def deal(draw: random.Random) -> dict[str, str]:
    """A number for each person, each number as often as any other."""
    return {name: str(i % 10) for i, name in enumerate(draw.sample(NAMES, len(NAMES)))}


def asked(what: str, numbers: dict[str, str]) -> list[Conversation]:
    """Each person's number, asked for in every wording."""
    return [
        [
            {"role": "user", "content": wording.format(name=name, what=what)},
            {"role": "assistant", "content": number},
        ]
        for name, number in numbers.items()
        for wording in WORDINGS
    ]


def small_config(vocab_size: int, max_length: int) -> LlamaConfig:
    return LlamaConfig(vocab_size, dim=64, layers=2, heads=4, kv_heads=2, hidden=192, max_length=max_length)


def small_llama(config: LlamaConfig) -> Llama:
    """GPT-2's standard deviation of .02 is made for widths above 700: at 64 the signal would be lost in the residual
    stream and nothing learned for hundreds of steps, so 1/√C is used."""
    model = Llama(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(config.dim**-0.5 / 0.02)
    return model
