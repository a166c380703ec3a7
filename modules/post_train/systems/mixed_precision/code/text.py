"""Text as characters: the standard library's own reference (pydoc_data.topics), or a file."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from finetune.errors import UserError
from finetune.runs import reading

LIMIT = 1 << 30  # bytes of a text


@dataclass(frozen=True)
class Text:
    """A text as numbers, its last tenth held out."""

    vocabulary: list[str]
    train: Tensor  # (N,) int32
    held_out: Tensor  # the last tenth

    def batch(self, part: Tensor, rows: int, length: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each (rows, length), at random positions."""
        at = torch.randint(len(part) - length, (rows, 1), generator=rng) + torch.arange(length + 1)
        return part[at[:, :-1]].long(), part[at[:, 1:]].long()


def load(path: Path | None, length: int) -> Text:
    if path is None:
        from pydoc_data.topics import topics

        text = "\n".join(topics[name] for name in sorted(topics))
    else:
        text = reading.text_file(path, LIMIT).replace("\r\n", "\n").replace("\r", "\n")
    if len(text) < 20 * (length + 1):
        raise UserError(
            f"{path}: {len(text)} characters are too few for rows of {length}: at least {20 * (length + 1)}"
        )
    vocabulary = sorted(set(text))
    number = np.zeros(0x110000, np.int32)  # of each code point
    number[[ord(c) for c in vocabulary]] = np.arange(len(vocabulary))
    ids = torch.from_numpy(number[np.frombuffer(text.encode("utf-32-le"), np.uint32)])
    cut = len(ids) * 9 // 10
    return Text(vocabulary, ids[:cut], ids[cut:])
