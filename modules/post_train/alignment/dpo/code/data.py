"""Pairs of a better and a worse answer: a user's, or sampled from the model and ordered by a reward."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from finetune.alignment import openings, preferences, rewards
from finetune.data import packing
from finetune.data.packing import Document
from finetune.errors import UserError
from finetune.inference.generate import generate
from finetune.inference.packed import pack
from finetune.lm.io import hub, load
from finetune.lm.llama import Llama
from finetune.lm.tokenizer import Tokenizer, answer_text, stop_ids
from finetune.runs.run import Run

if TYPE_CHECKING:
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


def both(pairs: Iterable[Pair]) -> list[tuple[Document, Document]]:
    """Chosen and rejected answer of each pair."""
    return [(pair.chosen, pair.rejected) for pair in pairs]


def flat(groups: Iterable[Sequence[Document]]) -> list[Document]:
    return [document for group in groups for document in group]


# --- A user's pairs


def read_pairs(cfg: Config, tokenizer: Tokenizer, say: Callable[[str], None]) -> Sets:
    """The rows of --data; a twentieth of the prompts (at most cfg.eval_pairs pairs) is held out, always the same."""
    assert cfg.data
    parts = preferences.split(preferences.read(cfg.data, "pairs", cfg.raw), cfg.data)
    made = []
    for part in parts:
        documents = preferences.documents(tokenizer, part, cfg.max_length, say)
        made.append([Pair(chosen, rejected) for chosen, rejected in documents])
    prompts = [(preferences.shown(row.prompt), preferences.prompt_ids(tokenizer, row.prompt)) for row in parts[1]]
    return Sets(made[0], made[1][: cfg.eval_pairs], fitting(unique(prompts), cfg))


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


def reward_scorer(name: str) -> Score:
    """The reward of a name as a function of prompts and answers."""
    reward = rewards.find(name)

    def score(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        return [reward.weight * value for value in reward(prompts, answers)]

    return score


# --- What a run trains on


def load_pairs(cfg: Config, run: Run, model: Llama, tokenizer: Tokenizer) -> Sets:
    """The pairs of --data, or of the model's own answers."""
    if cfg.data is not None:
        sets = judged_sets(cfg, tokenizer, run.print) if cfg.loss == "kto" else read_pairs(cfg, tokenizer, run.print)
    else:
        total = cfg.prompts + cfg.eval_prompts
        texts = openings.openings(total) if cfg.model != "scratch" else toy_prompts(cfg)
        sampler = model if cfg.model == "scratch" else packed(cfg)
        with run.console.status("sampling") as status:
            sets = sampled(
                cfg, sampler, tokenizer, texts, required(scorer(cfg)), run.generator("pairs"),
                run.dir / "pairs.json", status.update,
            )  # fmt: skip
    packing.check_vocabulary(flat(both(sets.train + sets.held_out)), model.config.vocab_size)
    if cfg.flipped:
        rng = random.Random(cfg.seed)
        turned = set(rng.sample(range(len(sets.train)), round(cfg.flipped * len(sets.train))))
        sets.train = [Pair(p.rejected, p.chosen, p.gap) if i in turned else p for i, p in enumerate(sets.train)]
    return sets


def required(score: Score | None) -> Score:
    assert score
    return score


def packed(cfg: Config) -> Llama:
    """A second copy of the model in int8, which samples several times as fast; it is dropped after that."""
    return pack(load.llama(hub.resolve(cfg.model), torch.float32), "int8")  # type: ignore[return-value]


def judged_sets(cfg: Config, tokenizer: Tokenizer, say: Callable[[str], None]) -> Sets:
    """Single judgments of --data, a tenth of each kind held out: a held-out pair is a good answer with a bad one, to
    whichever prompts."""
    rows = judged(cfg, tokenizer, say)
    kinds = [[d for d, good in rows if good == which] for which in (True, False)]
    cut = [max(1, len(part) // 10) if len(part) > 1 else 0 for part in kinds]
    if not all(cut):
        raise UserError(f"{cfg.data}: two good and two bad answers are the least, to train and to evaluate on")
    held = [part[:n] for part, n in zip(kinds, cut, strict=True)]
    pairs = [Pair(good, bad) for good in held[0] for bad in held[1]][: cfg.eval_pairs]
    # Trained on as judgments, not as pairs: each is listed once, in the order of the file.
    first = {id(d) for part in held for d in part}
    train = [(d, good) for d, good in rows if id(d) not in first]
    sets = Sets([], pairs, [(tokenizer.decode(p), p) for p in prompts_of(held[0] + held[1])][: cfg.samples])
    sets.judged = train
    return sets


def prompts_of(documents: Sequence[Document]) -> list[list[int]]:
    return [list(d.ids)[: list(d.mask).index(1)] for d in documents]


def scorer(cfg: Config) -> Score | None:
    """What judges samples; None where people's pairs are the only judge."""
    if cfg.reward is not None:
        return reward_scorer(cfg.reward)
    if cfg.data is not None:
        return None
    return openings.toy_score if cfg.model == "scratch" else reward_scorer("vader")


def toy_prompts(cfg: Config) -> list[str]:
    """The toy's openings, as often as needed."""
    texts = openings.toy_openings()
    total = cfg.prompts + cfg.eval_prompts
    return (texts * -(-total // len(texts)))[:total]
