"""Answers of a run that people read: the same prompts before, during and after training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from finetune.runs import checkpoint
from finetune.runs.run import Run

SHOWN = 6  # in the terminal


def show(
    run: Run,
    prompts: Sequence[str],
    before: Sequence[str],
    during: Sequence[str],
    after: Sequence[str],
    more: Sequence[Mapping[str, str]] = (),
) -> None:
    """A table of the first prompts (of each the last line) and their answers; answers.json keeps all. `during` may be
    of fewer prompts; `more`: further columns of each row."""
    rows = []
    for i, (prompt, first, last) in enumerate(zip(prompts, before, after, strict=True)):
        row = {"prompt": prompt, "before": first}
        if i < len(during):
            row["during"] = during[i]
        rows.append(row | {"after": last} | dict(more[i] if more else {}))
    last_lines = [row | {"prompt": row["prompt"].splitlines()[-1]} for row in rows[:SHOWN]]
    run.table("answers of the policy", last_lines)
    checkpoint.write_json(run.dir / "answers.json", rows)


@dataclass(frozen=True)
class Estimate:
    """The mean over answers and its standard error (0 of one answer)."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        x = torch.tensor(values, dtype=torch.float64)
        return cls(x.mean().item(), x.std().item() / len(x) ** 0.5 if len(x) > 1 else 0.0)


def distinct(texts: Sequence[str], n: int = 2) -> float:
    """Share of the n-grams of words of all texts together that are different ones (Li et al. 2016, arXiv:1510.03055):
    near 0 where a policy has collapsed onto a few phrases. Texts without n words do not count; 1 if none has."""
    grams = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0
