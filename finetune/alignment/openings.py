"""Prompts without a question: beginnings that a text can go on from, well or badly, and a made-up language for toys.

A reward of sentiment (vader.py) needs texts whose sentiment is open. Both kinds of beginnings are continued as they
stand, by no chat template.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product

from finetune.errors import UserError

# --- English

THINGS = (
    "movie", "hotel", "weather", "teacher", "restaurant", "journey", "book", "concert", "job", "neighbor", "party",
    "doctor", "city", "garden", "game", "meeting", "wedding", "school", "train", "holiday", "house", "dog", "exam",
    "phone", "winter", "team", "dinner", "letter", "museum", "news", "boss", "beach", "storm", "song", "speech",
    "hospital", "village", "car", "lesson", "morning",
)  # fmt: skip
BEGINNINGS = (
    "The {} was", "I think that the {} is", "We talked about the {} because it", "My friend said that the {}",
    "After the {}, everyone felt", "She looked at the {} and felt", "To be honest, the {}", "When I remember the {}, I",
    "The best part of the {} was", "The problem with the {} was", "He wrote that the {} had",
    "Nobody expected the {} to",
    "In the end the {}", "People say the {}", "It was the {} that made me", "Because of the {} they", "The {} and I",
    "Last year the {}", "What I feel about the {} is", "If the {} had been", "Thanks to the {}, we", "The {} made her",
    "At first the {} seemed", "All I can say about the {} is that it", "Their {} has always been",
    "Once upon a time a {}", "The old {} was", "A good {} should", "Every {} has", "You asked about the {}: it",
    "The report on the {} says", "Yesterday the {}", "I will never forget the {}, which", "Our {} turned out to be",
    "The {} left him", "On the way to the {} we", "The children and the {}", "For years the {}",
    "Tomorrow the {} will", "Without the {} life", "The first {} I saw was", "There is something about the {} that",
)  # fmt: skip


def openings(count: int) -> list[str]:
    """`count` different ones, always the same."""
    every = [beginning.format(thing) for beginning, thing in product(BEGINNINGS, THINGS)]
    if count > len(every):
        raise UserError(f"--prompts and --eval-prompts together are {count}: there are {len(every)} openings")
    return random.Random(0).sample(every, count)


# --- The toy: sentences of a made-up language whose words are good, bad or neither

GOOD = ("sunny", "kind", "bright", "sweet", "calm", "happy", "warm", "brave")
BAD = ("rainy", "cruel", "dark", "sour", "loud", "sad", "cold", "weak")
NEITHER = ("round", "wooden", "daily", "local", "plain", "tall", "blue", "early")
TOY_WORDS = 5  # of an answer


def toy_openings() -> list[str]:
    return [f"{verb} the {thing} is" for verb, thing in product(("now", "today", "often", "still", "here"), THINGS)]


def toy_sentences(prompts: Sequence[str], rng: random.Random) -> list[str]:
    """An answer to each prompt: words drawn from all three kinds alike. The model is first taught these."""
    words = GOOD + BAD + NEITHER
    return ["".join(f" {rng.choice(words)}" for _ in range(TOY_WORDS)) for _ in prompts]


def toy_score(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Good words minus bad words."""
    return [float(sum((w in GOOD) - (w in BAD) for w in answer.split())) for answer in answers]
