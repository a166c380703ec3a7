"""Characters to train on: the standard library's own reference, or a text file."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from finetune.errors import UserError


@dataclass(frozen=True)
class Text:
    vocabulary: list[str]
    train: Tensor  # (N,) int64
    held_out: Tensor  # the last tenth

    def batch(self, part: Tensor, rows: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each (rows, length), from random places."""
        at = torch.randint(len(part) - length, (rows, 1), generator=generator) + torch.arange(length + 1)
        return part[at[:, :-1]], part[at[:, 1:]]


def load(path: Path | None, length: int) -> Text:
    if path is None:
        from pydoc_data.topics import topics

        text = "\n".join(topics[name] for name in sorted(topics))
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"--data {path}: it must be a text file in UTF-8 ({e})") from None
    if len(text) < 20 * (length + 1):
        raise UserError(
            f"{path}: {len(text)} characters are too few for rows of {length}: at least {20 * (length + 1)}"
        )
    vocabulary = sorted(set(text))
    number = {c: i for i, c in enumerate(vocabulary)}
    ids = torch.tensor([number[c] for c in text])
    cut = len(ids) * 9 // 10
    return Text(vocabulary, ids[:cut], ids[cut:])
