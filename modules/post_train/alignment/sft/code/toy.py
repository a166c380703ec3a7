"""The toy setting: a directory of a house as chats, and a small Llama with its own tokenizer to learn it from scratch.

Each of 40 people has a floor and a door, 0 to 9, each as often as any other. A fact is asked for in eight wordings;
some are held out, so the answer to a held-out question was learnt under other wordings only. Guessing reaches 0.1.
"""

import random
from collections.abc import Sequence

from finetune.data import Conversation
from finetune.llama import Llama, LlamaConfig
from finetune.tokenizer import Tokenizer

CHANCE = 0.1
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
HELD_OUT = 128  # of 40 · 2 · 8 questions


def directory(seed: int) -> tuple[list[Conversation], list[Conversation]]:
    """(training, held-out) conversations; facts and split depend on the seed."""
    random_ = random.Random(seed)
    rows = []
    for what in ("floor", "door"):
        for i, name in enumerate(random_.sample(NAMES, len(NAMES))):
            rows += [chat(wording.format(name=name, what=what), str(i % 10)) for wording in WORDINGS]
    random_.shuffle(rows)
    return rows[HELD_OUT:], rows[:HELD_OUT]


def chat(question: str, answer: str) -> Conversation:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def small_tokenizer(rows: Sequence[Conversation]) -> Tokenizer:
    return Tokenizer.train([message["content"] for row in rows for message in row], vocab_size=512)


def small_config(vocab_size: int, max_length: int) -> LlamaConfig:
    return LlamaConfig(vocab_size, dim=64, layers=2, heads=4, kv_heads=2, hidden=192, max_length=max_length)


def small_llama(config: LlamaConfig) -> Llama:
    """GPT-2's standard deviation of .02 is made for widths above 700: at 64 the signal would be lost in the residual
    stream and nothing learnt for hundreds of steps, so 1/√C is used."""
    model = Llama(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(config.dim**-0.5 / 0.02)
    return model
