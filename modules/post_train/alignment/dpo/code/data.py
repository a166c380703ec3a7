"""Pairs of a better and a worse answer: a user's, or sampled from the model and ordered by a reward."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.alignment import preferences, rewards
from finetune.alignment.openings import openings as openings  # main.py asks this file for all data
from finetune.alignment.openings import toy_openings as toy_openings
from finetune.alignment.openings import toy_score as toy_score
from finetune.data.packing import Document
from finetune.errors import UserError
from finetune.inference.generate import generate
from finetune.lm.tokenizer import Tokenizer, answer_text, stop_ids

if TYPE_CHECKING:
    import torch

    from finetune.lm.llama import Llama

    from .main import Config

Score = Callable[[Sequence[str], Sequence[str]], list[float]]  # of (prompts, answers)


@dataclass(frozen=True)
class Answer:
    """Tokens of a prompt and of one answer to it, the end token included if the model gave one; its text."""

    prompt: list[int]
    ids: list[int]
    text: str

    def document(self) -> Document:
        """Only the answer is learned. Its tokens are those that were sampled: text would be cut into others."""
        return Document(self.prompt + self.ids, [0] * len(self.prompt) + [1] * len(self.ids))


@dataclass(frozen=True)
class Pair:
    """Two answers in tokens. gap: how much better the chosen one is by the reward; None where people chose."""

    chosen: Document
    rejected: Document
    gap: float | None = None

    def __len__(self) -> int:
        return len(self.chosen) + len(self.rejected)


@dataclass
class Sets:
    """train, held_out: pairs; prompts (text, tokens) to sample from; judged: single answers with their labels, to train
    on by KTO where the data have no pairs."""

    train: list[Pair]
    held_out: list[Pair]
    prompts: list[tuple[str, list[int]]]
    judged: list[tuple[Document, bool]] = field(default_factory=list)


# --- A user's pairs


def read(cfg: Config, tokenizer: Tokenizer, say: Callable[[str], None]) -> Sets:
    """The rows of --data; a twentieth of the prompts (at most cfg.eval_pairs pairs) is held out, always the same."""
    assert cfg.data
    rows = preferences.read(cfg.data, "pairs", cfg.raw)
    keyed = [(zlib.crc32(json.dumps(row.prompt).encode()), row) for row in rows]
    keys = sorted({key for key, _ in keyed})
    if len(keys) < 2:
        raise UserError(f"{cfg.data} has one prompt only: pairs of a second one are needed to evaluate on")
    held_out = set(keys[: max(1, len(keys) // 20)])
    parts = [[row for key, row in keyed if (key in held_out) == held] for held in (False, True)]
    made = []
    for part in parts:
        documents = preferences.documents(tokenizer, part, cfg.max_length, say)
        made.append([Pair(chosen, rejected) for chosen, rejected in documents])
    prompts = [(prompt_text(row.prompt), preferences.prompt_ids(tokenizer, row.prompt)) for row in parts[1]]
    return Sets(made[0], made[1][: cfg.eval_pairs], fitting(unique(prompts), cfg))


def prompt_text(prompt: preferences.Text) -> str:
    """A prompt for people: the text, or the last message."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def unique(prompts: list[tuple[str, list[int]]]) -> list[tuple[str, list[int]]]:
    return list({tuple(ids): (text, ids) for text, ids in prompts}.values())


def fitting(prompts: list[tuple[str, list[int]]], cfg: Config) -> list[tuple[str, list[int]]]:
    return [one for one in prompts if len(one[1]) + cfg.new_tokens <= cfg.max_length]


def judged(cfg: Config, tokenizer: Tokenizer, say: Callable[[str], None]) -> list[tuple[Document, bool]]:
    """Rows of KTO: (document, whether it is good) of --data; a pair is two."""
    assert cfg.data
    rows = preferences.read(cfg.data, "judged", cfg.raw)
    found = [(preferences.document(tokenizer, row.prompt, row.completion), row.good) for row in rows]
    kept = [row for row in found if len(row[0]) <= cfg.max_length]
    if len(kept) < len(found):
        say(f"{len(found) - len(kept):,} of {len(found):,} rows are longer than {cfg.max_length} tokens and skipped")
    if len(kept) < 2 or len({good for _, good in kept}) < 2:
        raise UserError(f"{cfg.data}: KTO needs good and bad answers within {cfg.max_length} tokens")
    return kept


# --- Pairs of the model's own answers


def sampled(
    cfg: Config, model: Llama, tokenizer: Tokenizer, texts: Sequence[str], score: Score, generator: torch.Generator,
    file: Path, tick: Callable[[str], None],
) -> Sets:  # fmt: skip
    """Two answers to each prompt, ordered by their score. The last cfg.eval_prompts prompts are held out, with every
    pair of unequal scores; of the others pairs are trained on if their scores differ by cfg.gap. Kept in `file`, from
    which a resumed run reads them."""
    prompts = [(text, tokenizer.encode(text)) for text in texts]
    if file.exists():
        found = [[Answer(**one) for one in two] for two in json.loads(file.read_text())]
    else:
        found = ask_twice(cfg, model, tokenizer, prompts, generator, tick)
        file.write_text(json.dumps([[asdict(one) for one in two] for two in found]) + "\n")
    scores = [score([text] * 2, [one.text for one in two]) for text, two in zip(texts, found, strict=True)]
    pairs: list[Pair | None] = []
    for (one, other), (a, b) in zip(found, scores, strict=True):
        better, worse = (one, other) if a > b else (other, one)
        pairs.append(Pair(better.document(), worse.document(), abs(a - b)) if a != b else None)
    border = len(pairs) - cfg.eval_prompts
    train = [pair for pair in pairs[:border] if pair and pair.gap >= cfg.gap]  # type: ignore[operator]
    held_out = [pair for pair in pairs[border:] if pair]
    if not train or not held_out:
        raise UserError(
            f"of {len(pairs)} pairs of answers none differs by --gap {cfg.gap:g}: lower it, or raise --prompts"
        )
    return Sets(train, held_out[: cfg.eval_pairs], prompts[border:])


def ask_twice(
    cfg: Config, model: Llama, tokenizer: Tokenizer, prompts: Sequence[tuple[str, list[int]]],
    generator: torch.Generator, tick: Callable[[str], None],
) -> list[list[Answer]]:  # fmt: skip
    """Two sampled answers to each prompt, 64 prompts at a time."""
    found: list[list[Answer]] = []
    for start in range(0, len(prompts), 64):
        tick(f"sampling two answers to each of {len(prompts):,} prompts: {start:,}")
        some = [one for one in prompts[start : start + 64] for _ in range(2)]
        new = ask(cfg, model, tokenizer, [ids for _, ids in some], generator)
        found += [new[i : i + 2] for i in range(0, len(new), 2)]
    return found


def ask(
    cfg: Config, model: Llama, tokenizer: Tokenizer, prompts: Sequence[list[int]], generator: torch.Generator
) -> list[Answer]:
    """A sampled answer to each prompt, of at most cfg.new_tokens tokens."""
    stops = stop_ids(model, tokenizer)
    model.eval()
    new = generate(model, prompts, cfg.new_tokens, cfg.temperature, stop_ids=stops, generator=generator)
    model.train()
    return [
        Answer(list(prompt), ids, answer_text(tokenizer, ids, stops)) for prompt, ids in zip(prompts, new, strict=True)
    ]


def scorer(name: str) -> Score:
    """The reward of a name as a function of prompts and answers."""
    reward = rewards.find(name)

    def score(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        return [reward.weight * value for value in reward(prompts, answers)]

    return score
