"""Byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909), on bytes as in GPT-2: the training of it.

A text is cut into words (GPT-2's pattern), each a sequence of bytes. Again and again the most frequent pair of
neighbors, counted over all words, becomes a new token. Equally frequent: the pair of the smaller ids.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable

from tokenizers import models, pre_tokenizers

from finetune.errors import UserError
from finetune.lm.tokenizer import CUT, GPT2, Tokenizer, byte_level, pieces

END = "<|endoftext|>"
Pair = tuple[int, int]


def train_merges(words: Counter[str], vocab: list[str], size: int) -> list[Pair]:
    """The merges, in order, until `vocab` (grown in place) has `size` tokens or no pair occurs twice.

    words: how often each occurs, in the alphabet of `vocab`. Only what a merge changes is counted again.
    """
    ids = {token: i for i, token in enumerate(vocab)}
    spelled = [[ids[letter] for letter in word] for word in words]
    often = list(words.values())
    counts: Counter[Pair] = Counter()
    where: dict[Pair, set[int]] = defaultdict(set)  # the words that have had the pair

    def add(at: int, sign: int) -> None:
        for pair in zip(spelled[at], spelled[at][1:], strict=False):
            counts[pair] += sign * often[at]
            if sign > 0:
                where[pair].add(at)

    for at in range(len(spelled)):
        add(at, 1)
    merges = []
    while len(vocab) < size and counts:
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        if counts[best] < 2:
            break
        merges.append(best)
        vocab.append(vocab[best[0]] + vocab[best[1]])
        for at in where.pop(best):
            add(at, -1)
            spelled[at] = merged(spelled[at], best, len(vocab) - 1)
            add(at, 1)
        del counts[best]
        counts = +counts
    return merges


def merged(word: list[int], pair: Pair, new: int) -> list[int]:
    """The word with every occurrence of the pair, from the left, replaced by the new token."""
    out, i = [], 0
    while i < len(word):
        if tuple(word[i : i + 2]) == pair:
            out.append(new)
            i += 2
        else:
            out.append(word[i])
            i += 1
    return out


def train(texts: Iterable[str], size: int) -> Tokenizer:
    """A byte-level BPE of `size` tokens: the end-of-text token, the 256 bytes, the merges. No text is unknown to it."""
    if size < 257:
        raise UserError(f"--vocab {size} is too small: 256 bytes and the end of a text need 257")
    words = Counter(word for piece in pieces(texts, CUT) for word, _ in GPT2.pre_tokenize_str(piece))
    vocab = [END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = train_merges(words, vocab, size)
    tokens = [vocab[i] for i in range(len(vocab))]
    model = models.BPE(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[(tokens[a], tokens[b]) for a, b in merges]
    )
    backend = byte_level(model, GPT2)
    backend.add_special_tokens([END])
    return Tokenizer(backend, eos=END, cut=CUT)
