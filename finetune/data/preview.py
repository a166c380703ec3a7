"""Documents as the model sees them, shown before a run: `run sft --dry-run`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from finetune.data import packing
from finetune.data.packing import Document
from finetune.lm.tokenizer import Tokenizer
from finetune.runs import display

SHOWN = 3  # documents
LONGEST = 1200  # characters of one stretch, longer ones are shortened in the middle
LEARNED = "bold green"


def show(
    console: Console,
    documents: Mapping[str, Sequence[Document]],
    tokenizer: Tokenizer,
    max_length: int,
    packed: bool,
    rows: int,
) -> None:
    """Prints three training documents with the learned text in green (without color: between « and »), and the counts
    of every set. `rows`: how many rows of at most `max_length` tokens the run reads; `packed`: of several documents."""
    train = documents["train"]
    marks = console.no_color or console.color_system is None
    for number, document in enumerate(train[:SHOWN], start=1):
        head = f"row {number}: {len(document)} tokens, {document.learned} learned"
        console.print(Text(f"\n{head}", "bold"))
        console.print(text_of(document, tokenizer, marks), overflow="fold", no_wrap=False)
    legend = "what is between « and » is learned" if marks else "what is green is learned"
    console.print(Text(f"\n{legend}", "" if marks else LEARNED))
    table: list[Any] = [
        [name, f"{len(part):,}", f"{sum(map(len, part)):,}", f"{sum(d.learned for d in part):,}", share(part)]
        for name, part in documents.items()
    ]
    display.table(console, ("set", ">texts", ">tokens", ">learned", ">share"), table, "what would be trained on")
    bins = packing.pack([len(d) for d in train], max_length) if packed else train
    longest = max(map(len, train))
    plural = "s"[: len(bins) > 1]
    display.say(
        console,
        f"{len(bins):,} row{plural} of at most {max_length:,} tokens (the longest text has {longest:,}); the run reads "
        f"{rows:,}: {rows / len(bins):,.1f} epochs",
    )


def share(documents: Sequence[Document]) -> str:
    """The share of the tokens that are learned."""
    return f"{sum(d.learned for d in documents) / sum(map(len, documents)):.1%}"


def text_of(document: Document, tokenizer: Tokenizer, marks: bool) -> Text:
    """The document's text, its learned stretches colored or between marks."""
    text = Text()
    for learned, part in stretches(document, tokenizer):
        if len(part) > LONGEST:
            gone = len(part) - LONGEST
            part = f"{part[: LONGEST // 2]} [… {gone:,} characters …] {part[-LONGEST // 2 :]}"
        text.append(f"«{part}»" if learned and marks else part, LEARNED if learned else "")
    return text


def stretches(document: Document, tokenizer: Tokenizer) -> Iterator[tuple[bool, str]]:
    """(learned, text) of the document's stretches, with control characters written as escapes. The first token is never
    predicted, whatever its mask is."""
    mask = [0, *document.mask[1:]]
    end, before = 0, ""
    for learned, stretch in itertools.groupby(mask):
        end += len(list(stretch))
        whole = tokenizer.decode(document.ids[:end])  # not the stretch alone: many decoders drop a blank at the begin
        text = whole[len(before) :]
        before = whole
        yield bool(learned), "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
