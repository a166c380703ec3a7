"""SentencePiece's tokenizer.model: a protobuf message (google/sentencepiece, `sentencepiece_model.proto`).

Only the fields that decide how a BPE cuts a text are read; the wire format needs no library for that.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers

from finetune.errors import UserError
from finetune.lm.io.vocabulary import NORMAL, sentencepiece_bpe
from finetune.runs import reading

LIMIT = 256 << 20
KINDS = {1: "Unigram", 2: "BPE", 3: "word", 4: "character"}
PIECES, TRAINER, NORMALIZER = 1, 2, 3  # fields of ModelProto
FIX = "save the tokenizer in its fast form (transformers: AutoTokenizer.from_pretrained(…).save_pretrained(…))"


@dataclass
class Model:
    """What is read of the file."""

    path: Path
    tokens: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    trainer: dict[int, Any] = field(default_factory=dict)  # by field number
    normalizer: dict[int, Any] = field(default_factory=dict)

    def id(self, number: int, default: int) -> int | None:
        """A special id of the trainer's settings; None where it is negative, for none."""
        value = self.trainer.get(number, default)
        return value if isinstance(value, int) and 0 <= value < len(self.tokens) else None

    def names(self) -> dict[str, str]:
        """The special tokens by the names that tokenizer_config.json uses."""
        ids = {"unk_token": self.id(40, 0), "bos_token": self.id(41, 1), "eos_token": self.id(42, 2)}
        ids["pad_token"] = self.id(43, -1)
        return {name: self.tokens[i] for name, i in ids.items() if i is not None}

    def backend(self) -> tokenizers.Tokenizer:
        """The tokenizer. UserError for another kind than BPE, and for texts that are changed before they are cut."""
        kind = self.trainer.get(3, 1)
        if kind != 2:
            raise UserError(f"{self.path} is of the kind {KINDS.get(kind, kind)}, only BPE is read: {FIX}")
        if self.normalizer.get(2) or self.normalizer.get(4, 1) or not self.normalizer.get(5, 1):
            raise UserError(f"{self.path} normalizes texts, which is not supported: {FIX}")
        prefix = bool(self.normalizer.get(3, 1))
        try:
            return sentencepiece_bpe(self.tokens, self.scores, self.types, prefix=prefix, unknown=self.id(40, 0))
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None


def read(path: Path) -> Model:
    """The model in a file. UserError if it is damaged."""
    model = Model(path)
    try:
        for number, value in fields(reading.file_bytes(path, LIMIT)):
            if number == PIECES:
                piece = dict(fields(value))
                model.tokens.append(piece[1].decode())
                model.scores.append(struct.unpack("<f", piece.get(2, bytes(4)))[0])
                model.types.append(piece.get(3, NORMAL))
            elif number in (TRAINER, NORMALIZER):
                (model.trainer if number == TRAINER else model.normalizer).update(fields(value))
    except (ValueError, KeyError, IndexError, AttributeError, TypeError, struct.error):
        raise UserError(f"{path} is not a tokenizer of SentencePiece, or damaged: fetch it again") from None
    if not model.tokens or len(set(model.tokens)) < len(model.tokens):
        raise UserError(f"{path} is not a tokenizer of SentencePiece, or damaged: fetch it again")
    return model


def fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a message: an int, or bytes for fixed-size numbers, strings and messages."""
    at = 0
    while at < len(data):
        key, at = varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = varint(data, at)
            yield key >> 3, value - (1 << 64) if value >> 63 else value
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"wire type {kind}")
        size, at = varint(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
        if size > len(data) - at:
            raise ValueError("cut short")
        yield key >> 3, data[at : at + size]
        at += size


def varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, the lowest first, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise ValueError("a number of more than ten bytes")
