"""Generation from a list of prompts: a thin user of the engine (engine.py), which serves them all together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from finetune.errors import UserError
from finetune.inference.engine import Engine, check_prompt
from finetune.inference.sampler import Sampling
from finetune.inference.virtual_tokens import Virtual
from finetune.lm.gpt import GPT
from finetune.lm.llama import Llama
from finetune.peft.virtual_tokens import Prefix, Prompt

BLOCK = 16  # tokens of a cache block
MOST_TOKENS = 2048  # of a step


def generate(
    model: Llama | GPT,
    prompts: Sequence[Sequence[int]] | Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop_ids: Iterable[int] = (),
    generator: torch.Generator | None = None,
    attention_mask: Tensor | None = None,
    virtual: Prompt | Prefix | None = None,
) -> list[list[int]]:
    """Continues each prompt by up to `max_new_tokens` tokens; returns the new ones, the stop token included.

    prompts: lists of ids of any lengths, or a tensor (B, T) padded on the left or right with `attention_mask` (B, T),
    1 for real tokens. temperature 0 is greedy; otherwise logits / temperature, then top_k (0 = all), then top_p, in the
    order and with the meaning of transformers' processors. A row ends at the first of `stop_ids`. `generator`: each
    prompt's seed is drawn from it, and a row depends on its prompt and its seed only. `virtual`: trained virtual tokens
    before each prompt.
    UserError: an empty prompt, one too long for the model, a token outside the vocabulary, a setting out of range.
    """
    how = check_sampling(temperature, top_k, top_p, max_new_tokens)
    rows, before = as_lists(prompts, attention_mask), Virtual(model, virtual) if virtual is not None else None
    for i, row in enumerate(rows):
        check_prompt(model, row, max_new_tokens, before, f"prompt {i}")
    if not rows or not max_new_tokens:
        return [[] for _ in rows]
    lengths = [(before.count if before else 0) + len(row) + max_new_tokens for row in rows]
    blocks = sum(-(-length // BLOCK) for length in lengths)
    engine = Engine(
        model, blocks, BLOCK, most_tokens=max(MOST_TOKENS, len(rows)), most_sequences=len(rows), prefix_cache=False
    )
    seeds = torch.randint((1 << 63) - 1, (len(rows),), generator=generator).tolist() if temperature else [0] * len(rows)
    stops = frozenset(stop_ids)
    sequences = [
        engine.add(row, replace(how, seed=seed), max_new_tokens, stops, virtual=before)
        for row, seed in zip(rows, seeds, strict=True)
    ]
    engine.run()
    return [sequence.answer for sequence in sequences]


def check_sampling(temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, max_new_tokens: int = 0) -> Sampling:
    """UserError for settings that cannot be sampled with; the defaults are `generate`'s."""
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens must be at least 0, not {max_new_tokens}")
    return Sampling(temperature, top_k, top_p)


def as_lists(prompts: Sequence[Sequence[int]] | Tensor, mask: Tensor | None) -> list[list[int]]:
    """The prompts as lists of ids, without padding."""
    if not isinstance(prompts, Tensor):
        return [list(row) for row in prompts]
    if prompts.dim() != 2 or (mask is not None and mask.shape != prompts.shape):
        raise UserError("prompts must be (batch, time), and attention_mask of the same shape")
    if mask is None:
        return prompts.tolist()
    return [row[keep.bool()].tolist() for row, keep in zip(prompts, mask, strict=True)]
