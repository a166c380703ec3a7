"""A small language model that has learned one thing: to continue what it has read before.

Its texts are made of nonsense words. In one kind a few words are read again and again in the same order; in the other a
key and a label follow each other, pair after pair, and a key that comes back is followed by the same label:

    dax wug . blick fep . dax wug . …

No pair occurs in another text more often than by chance, so that nothing can be remembered: it has to look back. That
is what in-context learning of labels needs (induction heads: Olsson et al. 2022, arXiv:2209.11895).
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from finetune.data.toy_directory import small_llama
from finetune.lm.llama import Llama, LlamaConfig
from finetune.lm.tokenizer import Tokenizer

CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
LONGEST = 512  # tokens of a text
PAIRS = 16  # keys and labels of a text of training


def nonsense(count: int) -> list[str]:
    """`count` words (at most 845) of consonant, vowel, consonant, the same in every run."""
    rng = random.Random(0)
    found: dict[str, None] = {}
    while len(found) < count:
        found[rng.choice(CONSONANTS) + rng.choice(VOWELS) + rng.choice(CONSONANTS)] = None
    return list(found)


def tokenizer(words: list[str]) -> Tokenizer:
    """One whose vocabulary has each word, with a space in front, as one token."""
    return Tokenizer.train([" " + word for word in words] * 2, vocab_size=259 + 4 * len(words))


def shape(vocab_size: int, dim: int, layers: int) -> LlamaConfig:
    """The shape of a Llama whose heads are wide enough to tell the words apart."""
    return LlamaConfig(vocab_size, dim, layers, dim // 32, dim // 32, 2 * dim, max_length=LONGEST)


def fresh(config: LlamaConfig) -> Llama:
    """A Llama of this shape with random weights."""
    return small_llama(config)


def texts(words: Tensor, end: int, rows: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens (rows, 48), half of the rows of each kind, and (rows, 48) bool: which tokens can be known from those in
    front of them."""
    both = [repeated(words, rows // 2, 3 * PAIRS, g), pairs(words, end, rows - rows // 2, PAIRS, g)]
    tokens, known = (torch.cat(parts) for parts in zip(*both, strict=True))
    return tokens, known


def repeated(words: Tensor, rows: int, length: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """10 words or more that are read again and again."""
    period = torch.randint(10, length // 2 + 1, (rows, 1), generator=g)
    drawn = words[torch.rand(rows, len(words), generator=g).argsort(1)[:, :length]]
    place = torch.arange(length).expand(rows, -1)
    return drawn.gather(1, place % period), place > period


def pairs(
    words: Tensor, end: int, rows: int, count: int, g: torch.Generator, keys: tuple[int, int] = (6, 8)
) -> tuple[Tensor, Tensor]:
    """`count` times a key, its label and `end`; a row has `keys` different keys. Known: labels of keys read before.

    Many keys, since a model that looks back for any label, not for the key's, is right as often as keys are few."""
    least, most = keys
    different = torch.randint(least, most + 1, (rows, 1), generator=g)
    drawn = words[torch.rand(rows, len(words), generator=g).argsort(1)]
    which = (torch.rand(rows, count, generator=g) * different).long()
    key, label = drawn.gather(1, which), drawn.gather(1, most + which)
    tokens = torch.stack([key, label, torch.full_like(key, end)], 2)
    known = torch.zeros(tokens.shape, dtype=torch.bool)
    known[..., 1] = (which[:, :, None] == which[:, None]).tril(-1).any(2)
    return tokens.flatten(1), known.flatten(1)
