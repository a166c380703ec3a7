"""A text that is read in pieces, and its tokens in a file: neither has to fit into memory."""

import hashlib
import os
import pydoc_data.topics
import stat
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from finetune.errors import UserError
from finetune.lm.tokenizer import PIECE, Tokenizer, pieces
from finetune.runs.checkpoint import writing


@dataclass(frozen=True)
class Text:
    path: Path | None  # none: the help pages of this Python
    characters: int
    digest: str  # twelve digits of its SHA-256: Python's help pages differ from version to version

    @property
    def cut(self) -> int:
        """The last tenth is held out."""
        return self.characters * 9 // 10

    def pieces(self, start: int = 0, stop: int | None = None) -> Iterator[str]:
        """The characters start … stop, some at a time."""
        place, stop = 0, self.characters if stop is None else stop
        for piece in read(self.path):
            if place >= stop:
                return
            if place + len(piece) > start:
                yield piece[max(start - place, 0) : stop - place]
            place += len(piece)


def open_text(path: Path | None) -> Text:
    """Reads the text once. UserError if it is empty, or no UTF-8 text."""
    state, characters, blank = hashlib.sha256(), 0, True
    for piece in read(path):
        state.update(piece.encode())
        characters += len(piece)
        blank = blank and not piece.strip()
    if blank:
        raise UserError(f"--data {path} is empty")
    return Text(path, characters, state.hexdigest()[:12])


def read(path: Path | None) -> Iterator[str]:
    if path is None:
        pages = sorted(pydoc_data.topics.topics.items())
        yield from ("\n" * (i > 0) + page for i, (_, page) in enumerate(pages))
        return
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f"--data {path} is no regular file")
        with open(path, encoding="utf-8") as file:
            while piece := file.read(PIECE):
                yield piece
    except (OSError, ValueError) as e:
        raise UserError(f"--data {path} cannot be read as UTF-8 text: {e}") from None


def encoded(tokenizer: Tokenizer, texts: Iterable[str], folder: Path) -> np.ndarray:
    """The ids (N,), in two bytes each if that is enough, mapped from a nameless file in `folder`: it is gone when this
    process is, however it ends."""
    kind = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    with writing(folder), tempfile.TemporaryFile(dir=folder) as file:
        for piece in pieces(texts, tokenizer.cut) if tokenizer.cut else ["".join(texts)]:
            file.write(np.array(tokenizer.encode(piece), kind).tobytes())
        file.flush()
        count = file.tell() // kind().itemsize
        return np.memmap(file, kind, "r", shape=(count,)) if count else np.empty(0, kind)
