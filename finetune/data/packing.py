"""Tokenized conversations with a loss mask, packed into rows; the batches of a step."""

from __future__ import annotations

import zlib
from bisect import bisect_left, insort
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from finetune.data.conversations import Conversation
from finetune.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from finetune.lm.tokenizer import Tokenizer

# What happens to rows of which the chat template does not write something, or which it refuses: the run is refused, the
# rows are skipped, or what is written of them is learned.
Unwritten = Literal["refuse", "skip", "keep"]
IGNORE = -100  # a target that carries no loss


@dataclass(frozen=True)
class Document:
    """One conversation in tokens; mask[i] is 1 if token i is to be learned (answers and their end tokens). `row`: the
    conversation itself."""

    ids: Sequence[int]
    mask: Sequence[int]
    row: Conversation | None = field(default=None, compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def learned(self) -> int:
        """Number of tokens that carry loss; the first token of a document is never predicted."""
        return sum(self.mask[1:])


def tokenize(
    rows: Sequence[Conversation],
    tokenizer: Tokenizer,
    max_length: int,
    unwritten: Unwritten = "refuse",
    say: Callable[[str], None] = lambda _: None,
) -> list[Document]:
    """The documents in which the answers of the rows are learned. One longer than `max_length` tokens is cut, and one
    with no token to learn within them is dropped; `say` is told what happened to how many.

    `unwritten`: what happens to rows of which the chat template does not write something, or which it refuses.
    UserError names the first of them.
    """
    documents, cut, dropped, split, endless = [], 0, 0, 0, 0
    ends = {*tokenizer.backend.get_added_tokens_decoder(), tokenizer.eos_id}
    for row, parts in rendered(rows, tokenizer, unwritten, say):
        split += len(parts) > 1
        for ids, mask, count in parts:
            document = Document(ids[:max_length], mask[:max_length], row[:count])
            last = [i for i, learn in zip(ids, mask, strict=True) if learn][-2:]  # an end, and white space behind it
            endless += bool(last) and ends.isdisjoint(last)
            if document.learned:
                cut += len(ids) > max_length
                documents.append(document)
            else:
                dropped += 1
    if split:
        say(
            f"the chat template writes earlier answers otherwise once others follow: {split:,} of {len(rows):,} "
            f"conversations are learned in several texts, each as it is when the answer is given"
        )
    if cut or dropped:
        count = len(documents) + dropped
        say(f"of {count} conversations {cut} were cut to {max_length} tokens and {dropped} dropped")
    if endless:
        say(f"{endless:,} texts end without a token that ends an answer: the model does not learn from them to stop")
    if count := tokenizer.renderer.straddled:
        say(
            f"{count:,} answers begin within a token that begins in the text before them, and learn it whole: a prompt "
            "that ends there is cut into other tokens; a template whose prompts end with a token of its own avoids it"
        )
        tokenizer.renderer.straddled = 0
    if tokenizer.renderer.unwritten:
        say(f"the chat template does not write these keys: {', '.join(sorted(tokenizer.renderer.unwritten))}")
        tokenizer.renderer.unwritten.clear()
    return documents


def rendered(
    rows: Sequence[Conversation], tokenizer: Tokenizer, unwritten: Unwritten, say: Callable[[str], None]
) -> list[tuple[Conversation, list[tuple[list[int], list[int], int]]]]:
    """The rows that are learned, each with its texts in tokens as Tokenizer.documents gives them."""
    renderer = tokenizer.renderer  # or that there is no template, which is no row's fault
    lost: Counter[str] = Counter()  # rows by what the template does not write of them
    found, refused, first = [], 0, ""
    for row in rows:
        parts = None
        try:
            losses = renderer.losses(row)
            why = f"the chat template does not write {losses[0][1]}" if losses else ""
            lost.update({kind for kind, _ in losses})
            if not losses or unwritten == "keep":
                parts = tokenizer.documents(row)
        except UserError as error:
            refused, why = refused + 1, str(error)
        if why:
            text = next((m["content"] for m in row if m.get("content")), "")
            first = first or f"the row that begins {text[:40]!r}: {why}"
        if parts is not None:
            found.append((row, parts))
    if not first:
        return found
    counts = [f"{what} of {count:,} rows" for what, count in lost.items()]
    counts = [f"does not write {' and '.join(counts)}"] if counts else []
    counts += [f"refuses or cannot tell the answers of {refused:,} rows"] if refused else []
    counted = f"the chat template {' and '.join(counts)} ({len(rows):,} in all)"
    if unwritten == "refuse" or (unwritten == "keep" and refused):
        ways = "--unwritten skip omits such rows" + ("" if refused else ", --unwritten keep learns the rest of them")
        raise UserError(f"{first}. In all, {counted}: {ways}, --template chooses another")
    gone = len(rows) - len(found)
    say(f"{counted}: " + (f"{gone:,} rows are skipped" if gone else "what it writes of them is learned"))
    return found


def needed(documents: list[Document], max_length: int) -> list[Document]:
    """The documents; UserError if there is none."""
    if not documents:
        raise UserError(f"no row has an answer within {max_length} tokens: raise --max-length or shorten the prompts")
    return documents


def held_out_of(documents: Sequence[Document], max_length: int) -> tuple[list[Document], list[Document]]:
    """(training, held-out): a twentieth of the different documents is held out, where none of the rows that were meant
    to be fits. UserError if all are the same."""
    kinds = sorted({tuple(document.ids) for document in documents}, key=lambda ids: zlib.crc32(repr(ids).encode()))
    if len(kinds) < 2:
        raise UserError(
            f"one row only has an answer within {max_length} tokens: a second, different one is needed to evaluate on"
        )
    chosen = set(kinds[: max(1, len(kinds) // 20)])
    parts: tuple[list[Document], list[Document]] = [], []
    for document in documents:
        parts[tuple(document.ids) in chosen].append(document)
    return parts


def check_vocabulary(documents: Iterable[Document], vocab_size: int) -> None:
    """UserError if the tokenizer knows tokens that the model's table lacks, and the rows have one."""
    largest = max((max(document.ids) for document in documents), default=0)
    if largest >= vocab_size:
        raise UserError(f"the rows have token {largest}, the model has {vocab_size}: its tokenizer is another model's")


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Bins of indices whose lengths add up to at most `max_length`: best-fit decreasing (Ding et al. 2024,
    arXiv:2404.10830, §3), bin for bin as trl's pack_dataset(…, strategy="bfd").

    Longest first (ties in order); each goes to the fullest bin that still holds it (ties: the one that has been waiting
    longest), else to a new one.
    """
    if any(not 0 < n <= max_length for n in lengths):
        raise ValueError(f"lengths must be between 1 and {max_length}")
    bins: list[list[int]] = []
    waiting: dict[int, deque[list[int]]] = defaultdict(deque)  # space left → bins with that much, oldest first
    spaces: list[int] = []  # the keys of `waiting` that have bins, rising
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(spaces, lengths[i])
        if place == len(spaces):
            space = max_length
            chosen: list[int] = []
            bins.append(chosen)
        else:
            space = spaces[place]
            chosen = waiting[space].popleft()
            if not waiting[space]:
                del spaces[place]
        chosen.append(i)
        space -= lengths[i]
        if not waiting[space]:
            insort(spaces, space)
        waiting[space].append(chosen)
    return bins


@dataclass(frozen=True)
class Batch:
    """Documents end to end in one row, with no padding: token t belongs to document n if cu_seqlens[n] ≤ t <
    cu_seqlens[n+1]. targets[t] is the next token of the same document if that one is learned, else IGNORE."""

    tokens: Tensor  # (1, T) int64
    targets: Tensor  # (1, T) int64
    positions: Tensor  # (1, T) int64, from 0 in each document
    cu_seqlens: Tensor  # (N+1,) int32

    @property
    def learned(self) -> int:
        return int((self.targets != IGNORE).sum())


def collate(documents: Sequence[Document]) -> Batch:
    """The documents as one packed batch."""
    import torch

    tokens: list[int] = []
    targets: list[int] = []
    positions: list[int] = []
    ends = [0]
    for document in documents:
        ids, mask = list(document.ids), document.mask
        tokens += ids
        targets += [token if learn else IGNORE for token, learn in zip(ids[1:], mask[1:], strict=True)] + [IGNORE]
        positions += range(len(ids))
        ends.append(len(tokens))
    return Batch(
        torch.tensor([tokens], dtype=torch.int64),
        torch.tensor([targets], dtype=torch.int64),
        torch.tensor([positions], dtype=torch.int64),
        torch.tensor(ends, dtype=torch.int32),
    )


def batch_indices(count: int, size: int, step: int, generator: Callable[[int], torch.Generator]) -> list[int]:
    """Indices of the rows of step `step` (from 0) among `count`: `size` at a time through a new permutation each epoch.

    A function of its arguments only, so a resumed run needs no stored position; `generator(epoch)` seeds an epoch.
    """
    import torch

    orders: dict[int, list[int]] = {}
    chosen = []
    for i in range(step * size, (step + 1) * size):
        epoch, place = divmod(i, count)
        if epoch not in orders:
            orders[epoch] = torch.randperm(count, generator=generator(epoch)).tolist()
        chosen.append(orders[epoch][place])
    return chosen
