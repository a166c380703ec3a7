"""Toy question–answer data: floor and door of 40 people, each asked in 8 phrasings; and a small Llama to learn them.

Modules hold out some phrasings, so that answering them requires generalizing across phrasings.
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
PHRASINGS = (  # no text begins with a name: without a space before it, a name is another token
    "On which {what} does {name} live?",
    "Which {what} is {name} at?",
    "I am looking for {name}: which {what}?",
    "Tell me the {what} of {name}.",
    "The {what} of {name}, please.",
    "A parcel for {name}: which {what}?",
    "What is the {what} of {name}?",
    "Do you know the {what} where {name} lives?",
)


def assign_numbers(rng: random.Random) -> dict[str, str]:
    """A random number 0 … 9 for each person, each number equally often."""
    return {name: str(i % 10) for i, name in enumerate(rng.sample(NAMES, len(NAMES)))}


def questions(what: str, numbers: dict[str, str]) -> list[Conversation]:
    """A conversation for each person and phrasing."""
    return [
        [
            {"role": "user", "content": phrasing.format(name=name, what=what)},
            {"role": "assistant", "content": number},
        ]
        for name, number in numbers.items()
        for phrasing in PHRASINGS
    ]


def small_config(vocab_size: int, max_length: int) -> LlamaConfig:
    """The shape of a Llama with 0.1 million parameters."""
    return LlamaConfig(vocab_size, dim=64, layers=2, heads=4, kv_heads=2, hidden=192, max_length=max_length)


def small_llama(config: LlamaConfig) -> Llama:
    """A Llama with initial weights of standard deviation 1/√C. GPT-2's .02 is made for widths above 700: at 64 the
    signal would be lost in the residual stream, and nothing learned for hundreds of steps."""
    model = Llama(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(config.dim**-0.5 / 0.02)
    return model
