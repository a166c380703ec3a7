"""Encoding with byte-pair merges, with special tokens.

text, merges (in the order in which they were learned) and specials (strings, none empty) → the list of tokens.

Special tokens are found first, from left to right, of several that fit at a place the longest; each is one token. What
stands between them is encoded part by part: single characters, then, as long as any pair of neighbors is in `merges`,
the pair that was learned first is merged wherever it stands, from left to right without overlap. Nothing is merged
across a special token. Joined, the tokens are the text; no token is empty.

    >>> bpe_encode("abcab", [("b", "c"), ("a", "b")])
    ['a', 'bc', 'ab']
    >>> bpe_encode("ab<|end|>ab", [("a", "b")], specials=["<|end|>"])
    ['ab', '<|end|>', 'ab']
"""

import re
from collections.abc import Sequence
from itertools import pairwise


def bpe_encode(text: str, merges: Sequence[tuple[str, str]], specials: Sequence[str] = ()) -> list[str]:
    parts = [text]
    if specials:
        longest_first = sorted(specials, key=len, reverse=True)
        parts = re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text)
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    tokens: list[str] = []
    for part in parts:
        tokens += [part] if part in specials else encoded(part, ranks)
    return tokens


def encoded(part: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    symbols = list(part)
    while True:
        pairs = [pair for pair in pairwise(symbols) if pair in ranks]
        if not pairs:
            return symbols
        best = min(pairs, key=lambda pair: ranks[pair])
        found, i = [], 0
        while i < len(symbols):
            step = 2 if tuple(symbols[i : i + 2]) == best else 1
            found.append("".join(symbols[i : i + step]))
            i += step
        symbols = found
