"""Training of byte-pair encoding.

words: each word (at least one character) and how often it occurs (at least once) → the list of merges in the order in
which they are learned, at most `merges`, fewer if no pair is left.

Words start as single characters. In each round every pair of neighboring symbols counts as often as its word occurs, at
every place where it stands ("aaa" has the pair (a, a) twice); pairs never cross words. The most frequent pair is
learned, of several the one that is smaller as a Python tuple of strings. Then it is merged in all words, from left to
right without overlap ("aaa" becomes aa a).

    >>> bpe_train({"low": 5, "lower": 2, "new": 6}, merges=3)
    [('l', 'o'), ('lo', 'w'), ('e', 'w')]
"""

from collections import Counter
from itertools import pairwise


def bpe_train(words: dict[str, int], merges: int) -> list[tuple[str, str]]:
    split = {word: list(word) for word in words}
    learned = []
    for _ in range(merges):
        counts: Counter[tuple[str, str]] = Counter()
        for word, symbols in split.items():
            for pair in pairwise(symbols):
                counts[pair] += words[word]
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        learned.append(best)
        split = {word: merged(symbols, best) for word, symbols in split.items()}
    return learned


def merged(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    found, i = [], 0
    while i < len(symbols):
        step = 2 if tuple(symbols[i : i + 2]) == pair else 1
        found.append("".join(symbols[i : i + step]))
        i += step
    return found
