"""Prompts to answer and what judges the answers: a user's, sums for a real model, running parity for the toy."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from finetune.alignment import preferences, rewards
from finetune.alignment.rewards import Reward
from finetune.alignment.rollouts import Prompt
from finetune.data.packing import Document
from finetune.errors import UserError
from finetune.lm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from .main import Config


@dataclass(frozen=True)
class Task:
    """Prompts to train and to evaluate on, and the rewards of their answers. `lines`: an answer ends with its line."""

    train: list[Prompt]
    held_out: list[Prompt]
    rewards: list[Reward]
    lines: bool = False

    def judge(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> tuple[list[float], dict[str, list[float]]]:
        """(weighted sums, each reward's numbers) of an answer to each prompt."""
        names = sorted({name for prompt in prompts for name in prompt.columns})
        columns = {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
        return rewards.total(self.rewards, [prompt.text for prompt in prompts], texts, **columns)


def load(cfg: Config, tokenizer: Tokenizer) -> Task:
    """The task of the settings."""
    given = [rewards.find(name) for name in cfg.reward]
    if cfg.data is not None:
        return own(cfg, tokenizer, given)
    if cfg.model == "scratch":
        prompts = [Prompt(text, tokenizer.encode(text)) for text in parity_prompts()]
        return Task(prompts, prompts, given or [Reward("parity", right_parity)])
    texts = sum_prompts(cfg)
    prompts = [Prompt(text, tokenizer.encode(text)) for text in texts]
    return Task(prompts[cfg.eval_prompts :], prompts[: cfg.eval_prompts], given or [rewards.find("sum")], lines=True)


def line_ends(tokenizer: Tokenizer) -> set[int]:
    """The tokens with a line break."""
    return {i for i in range(tokenizer.vocab_size) if "\n" in tokenizer.decode([i])}


# --- A user's prompts


def own(cfg: Config, tokenizer: Tokenizer, given: list[Reward]) -> Task:
    """The prompts of --data; a twentieth of the different ones (at most cfg.eval_prompts) is held out, always the
    same."""
    assert cfg.data
    if not given:
        raise UserError("--data holds prompts: say what judges the answers with --reward, a name or my_reward.py:name")
    found: dict[tuple[int, ...], Prompt] = {}
    for row in preferences.read(cfg.data, "prompts", cfg.raw):
        ids = preferences.prompt_ids(tokenizer, row.prompt)
        text = preferences.shown(row.prompt)
        found.setdefault(tuple(ids), Prompt(text, ids, row.columns))
    if long := [p for p in found.values() if len(p.ids) + cfg.new_tokens > cfg.max_length]:
        raise UserError(
            f"{len(long)} of {len(found)} prompts of {cfg.data} do not fit --max-length {cfg.max_length} with "
            f"--new-tokens {cfg.new_tokens}: raise the first or shorten them"
        )
    ordered = sorted(found.values(), key=lambda prompt: zlib.crc32(repr(prompt.ids).encode()))
    if len(ordered) < 2:
        raise UserError(f"{cfg.data} has one prompt only: a second one is needed to evaluate on")
    held = min(max(1, len(ordered) // 20), cfg.eval_prompts)
    return Task(ordered[held:], ordered[:held], given, lines=cfg.lines)


# --- Sums for a real model


def sum_prompts(cfg: Config) -> list[str]:
    """`a + b =` for all pairs of operands from a tenth of --largest on, in an order that never changes, each behind
    three solved ones: the model has not been told what to do, it must see it."""
    least = max(1, (cfg.largest + 1) // 10)
    rng = random.Random(0)
    operands = range(least, cfg.largest + 1)
    if len(operands) ** 2 < cfg.eval_prompts + cfg.prompts + cfg.shots:
        raise UserError(
            f"--largest {cfg.largest} gives {len(operands) ** 2} sums, too few for --eval-prompts {cfg.eval_prompts}, "
            f"--prompts {cfg.prompts} and --shots {cfg.shots}"
        )
    pairs = list(product(operands, operands)) if cfg.largest <= 999 else drawn(rng, operands, 10**6)
    rng.shuffle(pairs)
    shown, asked = pairs[: cfg.shots], pairs[cfg.shots :]
    before = "".join(f"{a} + {b} = {a + b}\n" for a, b in shown)
    return [f"{before}{a} + {b} =" for a, b in asked[:20_000]]


def drawn(rng: random.Random, operands: range, count: int) -> list[tuple[int, int]]:
    return list({(rng.choice(operands), rng.choice(operands)): None for _ in range(min(count, 30_000))})


# --- The toy: running parity


BITS = 5


def parity_prompts() -> list[str]:
    return ["".join(f" {bit}" for bit in bits) + " =" for bits in product((0, 1), repeat=BITS)]


def parity_answer(prompt: str) -> str:
    """For each bit whether the number of ones up to it is odd: ` 1 0 1 1 0 =` → ` 1 1 0 1 1`."""
    found, odd = [], 0
    for word in prompt.split()[:BITS]:
        odd ^= int(word)
        found.append(f" {odd}")
    return "".join(found)


def right_parity(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """1.0 where the completion is the running parity of its prompt and nothing else."""
    return [float(text == parity_answer(prompt)) for prompt, text in zip(prompts, completions, strict=True)]


def parity_documents(tokenizer: Tokenizer, careless: float, rng: random.Random) -> list[Document]:
    """All prompts with the answers of a teacher, each bit of which is wrong with the probability `careless`."""
    found = []
    for text in parity_prompts():
        bits = [int(bit) ^ (rng.random() < careless) for bit in parity_answer(text).split()]
        found.append(preferences.document(tokenizer, text, "".join(f" {bit}" for bit in bits)))
    return found


def parity_tokenizer() -> Tokenizer:
    texts = parity_prompts()
    return Tokenizer.train([text + parity_answer(text) for text in texts], 262)
