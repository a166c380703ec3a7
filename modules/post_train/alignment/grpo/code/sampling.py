"""Answers sampled from the policy by the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from finetune.alignment.logprobs import evaluated
from finetune.inference.engine import Engine
from finetune.inference.sampler import Sampling
from finetune.lm.llama import Llama
from finetune.lm.tokenizer import Tokenizer, answer_text

if TYPE_CHECKING:
    from .main import Config


@dataclass(frozen=True)
class Answer:
    ids: list[int]
    text: str
    finished: bool
    logprobs: list[float] | None = None


class Sampler:
    def __init__(self, cfg: Config, model: Llama, tokenizer: Tokenizer, stops: frozenset[int]) -> None:
        self.cfg, self.model, self.tokenizer, self.stops = cfg, model, tokenizer, stops

    def __call__(
        self, prompts: Sequence[list[int]], count: int, generator: torch.Generator | None
    ) -> list[list[Answer]]:
        n = len(prompts) * count
        seeds = [0] * n if generator is None else torch.randint((1 << 63) - 1, (n,), generator=generator).tolist()
        temperature = 0.0 if generator is None else self.cfg.temperature
        blocks = sum(-(-(len(p) + self.cfg.new_tokens) // 16) for p in prompts) * count
        with evaluated(self.model):
            engine = Engine(self.model, blocks, 16, most_tokens=2048, most_sequences=n, prefix_cache=True)
            found = [
                engine.add(p, Sampling(temperature, seed=seeds[i * count + j]), self.cfg.new_tokens, self.stops)
                for i, p in enumerate(prompts) for j in range(count)
            ]  # fmt: skip
            engine.run()
        answers = [
            Answer(one.answer, answer_text(self.tokenizer, one.answer, self.stops), one.answer[-1] in self.stops)
            for one in found
        ]
        return [answers[i : i + count] for i in range(0, n, count)]


def line_ends(tokenizer: Tokenizer) -> set[int]:
    """The tokens with a line break."""
    return {i for i in range(tokenizer.vocab_size) if "\n" in tokenizer.decode([i])}
