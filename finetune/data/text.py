"""A text to pre-train on, and its tokens: both are read in pieces from files, so that neither has to fit in memory."""

import hashlib
import os
import pydoc_data.topics
import re
import stat
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from finetune.errors import UserError
from finetune.lm.tokenizer import PIECE, Tokenizer, pieces
from finetune.runs.checkpoint import writing

UNKNOWN = "\ufffd"  # what a character that the text does not have is read as


@dataclass(frozen=True)
class Text:
    """A text file, or the help pages of this Python. Its last tenth is held out."""

    path: Path | None  # none: the help pages of this Python
    characters: int
    digest: str  # twelve digits of its SHA-256: Python's help pages differ from version to version

    @property
    def cut(self) -> int:
        """The first held-out character."""
        return self.characters * 9 // 10

    def pieces(self, start: int = 0, stop: int | None = None) -> Iterator[str]:
        """The characters from `start` to `stop`, in pieces."""
        place, stop = 0, self.characters if stop is None else stop
        for piece in read(self.path):
            if place >= stop:
                return
            if place + len(piece) > start:
                yield piece[max(start - place, 0) : stop - place]
            place += len(piece)


def open_text(path: Path | None) -> Text:
    """Reads the text once to count and hash it. UserError if it is empty, or not UTF-8 text."""
    state, characters, blank = hashlib.sha256(), 0, True
    for piece in read(path):
        state.update(piece.encode())
        characters += len(piece)
        blank = blank and not piece.strip()
    if blank:
        raise UserError(f"--data {path} is empty")
    return Text(path, characters, state.hexdigest()[:12])


def read(path: Path | None) -> Iterator[str]:
    """The text in pieces; without a path, the help pages of this Python."""
    if path is None:
        pages = sorted(pydoc_data.topics.topics.items())
        yield from ("\n" * (i > 0) + page for i, (_, page) in enumerate(pages))
        return
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f"--data {path} is not a regular file")
        with open(path, encoding="utf-8") as file:
            while piece := file.read(PIECE):
                yield piece
    except (OSError, ValueError) as e:
        raise UserError(f"--data {path} cannot be read as UTF-8 text: {e}") from None


def character_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A tokenizer whose tokens are the characters of a text in pieces."""
    characters = {character for piece in texts for character in set(piece)}
    vocab = {character: i for i, character in enumerate([UNKNOWN, *sorted(characters - {UNKNOWN})])}
    backend = Backend(models.WordLevel(vocab, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return Tokenizer(backend, cut=re.compile(r"[\s\S]"))


def encoded(tokenizer: Tokenizer, texts: Iterable[str], folder: Path) -> np.ndarray:
    """The token ids (N,), two bytes each if that is enough, mapped from a file in `folder` without a name: it vanishes
    with this process, however that ends."""
    kind = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    with writing(folder), tempfile.TemporaryFile(dir=folder) as file:
        for piece in pieces(texts, tokenizer.cut) if tokenizer.cut else ["".join(texts)]:
            file.write(np.array(tokenizer.encode(piece), kind).tobytes())
        file.flush()
        count = file.tell() // kind().itemsize
        return np.memmap(file, kind, "r", shape=(count,)) if count else np.empty(0, kind)
