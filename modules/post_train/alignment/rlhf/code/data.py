"""Prompts, answers and pairs: a user's, or the model's own answers judged by a gold reward that stands for people."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.alignment import openings, preferences, rewards, toy_writer
from finetune.alignment.rollouts import Prompt, Sampler, rollouts
from finetune.data.packing import Document
from finetune.errors import UserError
from finetune.lm.tokenizer import Tokenizer, stop_ids
from finetune.runs import checkpoint

if TYPE_CHECKING:
    import torch

    from finetune.lm.llama import Llama

    from .main import Config

Score = Callable[[Sequence[str], Sequence[str]], list[float]]  # of (prompts, answers)
SENTENCE = re.compile(r"[^.!?\n]*\w[^.!?\n]*[.!?](?=\s|$)")


@dataclass(frozen=True)
class Answer:
    """An answer to a prompt as it was sampled: tokens, the end token included if the model gave one; its text."""

    prompt: Prompt
    ids: list[int]
    text: str
    ended: bool

    def document(self) -> Document:
        """Only the answer is learned or judged. Its tokens are those that were sampled: text may be cut into others."""
        return Document(self.prompt.ids + self.ids, [0] * len(self.prompt.ids) + [1] * len(self.ids))


@dataclass(frozen=True)
class Pair:
    """A better and a worse answer. gap: of their gold rewards; None where people chose."""

    chosen: Document
    rejected: Document
    gap: float | None = None


@dataclass
class Sets:
    """What the three stages learn from. held_out: prompts that none of them sees; pairs: a user's, else empty, since
    the model has to be fine-tuned before it can be asked for them."""

    demonstrations: list[Document]
    prompts: list[Prompt]
    held_out: list[Prompt]
    pairs: list[Pair]
    held_out_pairs: list[Pair]


# --- A user's pairs


def read(cfg: Config, tokenizer: Tokenizer, say: Callable[[str], None]) -> Sets:
    """The pairs of --data; a twentieth of the prompts is held out, always the same. The chosen answers are the
    demonstrations."""
    assert cfg.data
    pairs: list[list[Pair]] = []
    prompts: list[list[Prompt]] = []
    for part in preferences.split(preferences.read(cfg.data, "pairs", cfg.raw), cfg.data):
        pairs.append([Pair(*two) for two in preferences.documents(tokenizer, part, cfg.max_length, say)])
        texts = {preferences.shown(row.prompt): preferences.prompt_ids(tokenizer, row.prompt) for row in part}
        fitting = [Prompt(text, ids) for text, ids in texts.items() if len(ids) + cfg.new_tokens <= cfg.max_length]
        if not fitting:
            raise UserError(f"no prompt leaves room for {cfg.new_tokens} new tokens: raise --max-length")
        prompts.append(fitting)
    return Sets([p.chosen for p in pairs[0]], prompts[0], prompts[1][: cfg.eval_prompts], *pairs)


# --- The project's own: openings that are continued


def own(cfg: Config, tokenizer: Tokenizer) -> Sets:
    """Openings, the last of them held out. The toy's demonstrations are sentences of random words; a model that can
    write already is asked for its own (`demonstrate`)."""
    total, toy = cfg.prompts + cfg.eval_prompts, cfg.model == "scratch"
    texts = openings.toy_openings() if toy else openings.openings(total)
    if total > len(texts):
        raise UserError(f"--prompts and --eval-prompts together are {total}: there are {len(texts)} openings")
    prompts = [Prompt(text, tokenizer.encode(text)) for text in texts[:total]]
    made: list[Document] = []
    if toy:
        rng = random.Random(cfg.seed)
        made = toy_writer.toy_documents(tokenizer, [rng.choice(texts) for _ in range(cfg.demonstrations)], rng)
    return Sets(made, prompts[: cfg.prompts], prompts[cfg.prompts :], [], [])


def demonstrate(answers: Sequence[Answer], tokenizer: Tokenizer) -> list[Document]:
    """The first sentence of each answer that has one, and the end token behind it: what a labeler would write who asks
    for one whole sentence. A model that was trained on chats never ends a text that it continues."""
    found = [(answer, SENTENCE.match(answer.text)) for answer in answers]
    made = [preferences.document(tokenizer, a.prompt.text, sentence[0]) for a, sentence in found if sentence]
    if not made:
        raise UserError(f"of {len(answers)} answers none has a whole sentence: raise --new-tokens or --demonstrations")
    return made


# --- Answers


def ask(
    cfg: Config, model: Llama, tokenizer: Tokenizer, prompts: Sequence[Prompt], each: int, generator: torch.Generator
) -> list[Answer]:
    """`each` sampled answers to each prompt, one behind the other, of at most cfg.new_tokens tokens."""
    found = rollouts(
        Sampler(model, None), tokenizer, [p.ids for p in prompts], each, cfg.new_tokens, temperature=cfg.temperature,
        stop_ids=stop_ids(model, tokenizer), generator=generator,
    )  # fmt: skip
    return [
        Answer(prompt, *one)
        for prompt, group in zip(prompts, found, strict=True)
        for one in zip(group.answers, group.texts, group.finished, strict=True)
    ]


def ask_all(
    cfg: Config, model: Llama, tokenizer: Tokenizer, prompts: Sequence[Prompt], each: int, generator: torch.Generator,
    file: Path, tick: Callable[[str], None],
) -> list[list[Answer]]:  # fmt: skip
    """`each` answers to each prompt, about 128 at a time. Kept in `file`, from which a resumed run reads them."""
    if file.exists():
        raw = json.loads(file.read_text())
        return [[Answer(Prompt(**one.pop("prompt")), **one) for one in group] for group in raw]
    found: list[list[Answer]] = []
    some = max(1, 128 // each)
    for start in range(0, len(prompts), some):
        tick(f"sampling {len(prompts) * each:,} answers: {start * each:,}")
        new = ask(cfg, model, tokenizer, prompts[start : start + some], each, generator)
        found += [new[i : i + each] for i in range(0, len(new), each)]
    checkpoint.write_json(file, [[asdict(one) for one in group] for group in found])
    return found


def judged(score: Score, answers: Sequence[Answer]) -> list[float]:
    """The gold rewards of answers."""
    return score([a.prompt.text for a in answers], [a.text for a in answers])


def pairs_of(groups: Sequence[Sequence[Answer]], score: Score, gap: float) -> list[Pair]:
    """Neighbors of a group in pairs, the one of the higher gold reward first, if their rewards differ by `gap` at
    least (0: at all). Each answer is in one pair only."""
    found = []
    for group in groups:
        values = judged(score, group)
        for i in range(0, len(group) - 1, 2):
            difference = values[i] - values[i + 1]
            if abs(difference) >= gap and difference:
                better, worse = (group[i], group[i + 1]) if difference > 0 else (group[i + 1], group[i])
                found.append(Pair(better.document(), worse.document(), abs(difference)))
    return found


def scorer(cfg: Config) -> Score | None:
    """The gold reward: what judges answers in place of people; None where people's pairs are the only judge."""
    if cfg.gold is None and cfg.data is not None:
        return None
    if cfg.gold is None and cfg.model == "scratch":
        return openings.toy_score
    reward = rewards.find(cfg.gold or "vader")

    def score(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        return [reward.weight * value for value in reward(prompts, answers)]

    return score
