"""n-gram models of characters with Witten–Bell smoothing (Witten & Bell 1991, method C): what a neural model must beat.

    P_n(c | h) = (count(h c) + types(h) · P_{n−1}(c | h′)) / (count(h) + types(h)),   P_0 = 1 / V

h: the n − 1 characters before c; h′: h without its first; types(h): how many different characters followed h.
"""

import math

import numpy as np


def held_out_bits(train: str, held_out: str, order: int = 5) -> dict[str, float]:
    """Held-out bits per character of n-gram models up to `order`, at most 5. All characters that
    training lacks count as one."""
    vocab = sorted(set(train))
    number = {character: i for i, character in enumerate(vocab, start=1)}
    train_ids, held_out_ids = (np.array([number.get(c, 0) for c in part]) for part in (train, held_out))
    nats = held_out_nats(train_ids, held_out_ids, len(vocab) + 1, order)
    names = ("unigram", "bigram", "trigram", "four_gram", "five_gram")[:order]
    return {name: value / math.log(2) for name, value in zip(names, nats, strict=True) if name != "four_gram"}


def held_out_nats(train: np.ndarray, held_out: np.ndarray, vocab: int, order: int) -> list[float]:
    """Mean −ln P of the held-out characters under the models of order 1 … `order`, each trained on `train`.

    Both are integer ids below `vocab`. held_out follows train: its first characters are predicted from train's last.
    """
    text = np.concatenate([train, held_out])
    first = len(train)
    p = np.full(len(held_out), 1 / vocab)
    context = np.zeros(len(text), dtype=np.int64)  # number of the context before each position, equal where it is
    found = []
    for n in range(1, order + 1):
        start = n - 1  # the first position with a whole context
        seen = context[start:first]
        pairs, pair_counts = np.unique(seen * vocab + text[start:first], return_counts=True)
        contexts, totals = np.unique(seen, return_counts=True)
        types = np.bincount(np.searchsorted(contexts, pairs // vocab), minlength=len(contexts))
        now = context[first:]
        total, kinds = lookup(contexts, now, totals), lookup(contexts, now, types)
        count = lookup(pairs, now * vocab + text[first:], pair_counts)
        p = np.where(total > 0, (count + kinds * p) / np.maximum(total + kinds, 1), p)
        found.append(float(-np.log(p).mean()))
        longer = np.full(len(text), -1, dtype=np.int64)  # the context grows by the character n places before
        longer[n:] = context[n:] + (text[: len(text) - n] + 1) * (context.max() + 1)
        context = np.unique(longer, return_inverse=True)[1]
    return found


def lookup(keys: np.ndarray, wanted: np.ndarray, values: np.ndarray) -> np.ndarray:
    """values of the sorted keys, 0 where a wanted one is not among them."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
