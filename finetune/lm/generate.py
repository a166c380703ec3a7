"""Generation with a key–value cache: greedy, temperature, top-k, top-p, stop tokens, rows of unequal length."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from finetune.errors import UserError
from finetune.lm import head
from finetune.lm.forward import RowCache, check_tokens
from finetune.lm.gpt import GPT
from finetune.lm.llama import Llama

if TYPE_CHECKING:
    from finetune.lm.tokenizer import Tokenizer

LEAST_TEMPERATURE = 1e-6  # below, logits / temperature leave the range of fp32
ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")  # of a turn, whatever else a model's files say


class KVCache(RowCache):
    """Keys and values of up to `max_length` tokens a row, allocated at once: per layer (B, max_length, Hkv, D) twice.

    Bytes per token: 2 · layers · Hkv · D · bytes of the dtype. Row b holds `lengths[b]` tokens from index 0 on, so no
    row is padded: `lengths` tells the attention where each one ends.
    """

    def __init__(self, model: Llama | GPT, rows: int, max_length: int) -> None:
        config, weight = model.config, model.norm.weight
        if max_length > config.max_length:
            raise UserError(f"{max_length} tokens do not fit the model's maximum length of {config.max_length}")
        shape = (config.layers, rows, max_length, config.kv_heads, config.head_dim)
        self.k = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.v = torch.zeros_like(self.k)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=weight.device)
        self.rows = torch.arange(rows, device=weight.device)
        self.longest = 0
        self.even = True  # all rows hold equally many tokens

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes

    def append(self, layer: int, k: Tensor, v: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Stores the new k, v (B, T, Hkv, D) of a layer behind each row's tokens; returns all keys, all values
        (B, Tk, Hkv, D) and the number (B,) of real ones. With `lengths` only the first lengths[b] of the T count."""
        new = k.shape[1]
        end = self.longest + new
        if end > self.k.shape[2]:
            raise UserError(f"{end} tokens do not fit the cache of {self.k.shape[2]}")
        keys, values = self.k[layer], self.v[layer]
        if self.even:
            keys[:, self.longest : end], values[:, self.longest : end] = k, v
        elif new == 1:
            keys[self.rows, self.lengths], values[self.rows, self.lengths] = k[:, 0], v[:, 0]
        else:
            raise UserError("several tokens at once can be added only while all rows of the cache are equally long")
        return keys[:, :end], values[:, :end], self.lengths + (new if lengths is None else lengths)

    def advance(self, new: int, lengths: Tensor | None) -> None:
        """Counts the tokens of a forward in, once every layer has stored them."""
        self.lengths = self.lengths + (new if lengths is None else lengths)
        if lengths is None:
            self.longest += new
        else:
            self.longest = int(self.lengths.max())
            self.even = bool((self.lengths == self.longest).all())


@torch.no_grad()
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
) -> list[list[int]]:
    """Continues each prompt by up to `max_new_tokens` tokens; returns the new ones, the stop token included.

    prompts: lists of ids of any lengths, or a tensor (B, T) padded on the left or right with `attention_mask` (B, T),
    1 for real tokens. temperature 0 is greedy; otherwise logits / temperature, then top_k (0 = all), then top_p, in the
    order and with the meaning of transformers' processors. A row ends at the first of `stop_ids`. With dynamic rope
    scaling theta follows the longest row of the batch, as in transformers.
    UserError: an empty prompt, one too long for the model, a token outside the vocabulary, a setting out of range.
    """
    check_sampling(temperature, top_k, top_p, max_new_tokens)
    rows = as_lists(prompts, attention_mask)
    check_prompts(model, rows, max_new_tokens)
    if not rows or not max_new_tokens:
        return [[] for _ in rows]
    device = model.norm.weight.device
    lengths = torch.tensor([len(row) for row in rows], device=device)
    longest = max(map(len, rows))
    tokens = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)  # (B, T), right-padded
    cache = KVCache(model, len(rows), longest + max_new_tokens)
    state = model(tokens, lengths=lengths, cache=cache, hidden=True)[cache.rows, lengths - 1]  # (B, C)
    new: list[list[int]] = [[] for _ in rows]
    stops, running = set(stop_ids), set(range(len(rows)))
    for left in reversed(range(max_new_tokens)):
        picked = sample(head.logits(model, state), temperature, top_k, top_p, generator)  # (B,)
        for row, token in enumerate(picked.tolist()):
            if row in running:
                new[row].append(token)
                if token in stops:
                    running.remove(row)
        if not running or not left:
            break
        state = model(picked[:, None], cache=cache, hidden=True)[:, 0]
    return new


def check_sampling(temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, max_new_tokens: int = 0) -> None:
    """UserError for settings that cannot be sampled with; the defaults are `generate`'s."""
    warm = temperature == 0 or (math.isfinite(temperature) and temperature >= LEAST_TEMPERATURE)
    if not warm or top_k < 0 or not 0 < top_p <= 1 or max_new_tokens < 0:
        raise UserError(
            f"generation needs temperature 0 or ≥ {LEAST_TEMPERATURE:g}, top_k ≥ 0, 0 < top_p ≤ 1 and max_new_tokens "
            f"≥ 0, not {temperature}, {top_k}, {top_p} and {max_new_tokens}"
        )


def stop_ids(model: Llama | GPT, tokenizer: Tokenizer) -> set[int]:
    """The tokens that end an answer: those that config.json and generation_config.json list (a GGUF: its ends of text,
    turn and message), the tokenizer's end token, and the usual ends of a turn."""
    found = {tokenizer.eos_id} | {tokenizer.backend.token_to_id(name) for name in ENDS}
    for ids in (model.token_ids, model.generation_ids):
        listed = ids.get("eos_token_id")
        found |= set(listed) if isinstance(listed, list) else {listed}
    return {i for i in found if i is not None}


def answer_text(tokenizer: Tokenizer, ids: Sequence[int], stops: Iterable[int]) -> str:
    """The text of an answer, without the token that ended it."""
    ended = bool(ids) and ids[-1] in set(stops)
    return tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True)


def sample(
    logits: Tensor,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token (B,) for each row of logits (B, V)."""
    if temperature == 0:
        return logits.argmax(-1)
    weights = warp(logits.float(), temperature, top_k, top_p).softmax(-1)
    return torch.multinomial(weights, 1, generator=generator)[:, 0]


def warp(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """logits (B, V) / temperature, with −inf for what is not among the top_k, and then for what is not in the smallest
    set of most likely tokens that together reach top_p (Holtzman et al. 2020, arXiv:1904.09751)."""
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        ascending, order = logits.sort(-1)
        out = ascending.softmax(-1).cumsum(-1) <= 1 - top_p  # from the least likely up
        out[:, -1] = False
        logits = logits.masked_fill(out.scatter(-1, order, out), -torch.inf)
    return logits


def as_lists(prompts: Sequence[Sequence[int]] | Tensor, mask: Tensor | None) -> list[list[int]]:
    """The prompts as lists of ids, without padding."""
    if not isinstance(prompts, Tensor):
        return [list(row) for row in prompts]
    if prompts.dim() != 2 or (mask is not None and mask.shape != prompts.shape):
        raise UserError("prompts must be (batch, time), and attention_mask of the same shape")
    if mask is None:
        return prompts.tolist()
    return [row[keep.bool()].tolist() for row, keep in zip(prompts, mask, strict=True)]


def check_prompts(model: Llama | GPT, rows: list[list[int]], max_new_tokens: int) -> None:
    """UserError for a prompt that is empty, too long, or outside the vocabulary."""
    limit = model.config.max_length
    for i, row in enumerate(rows):
        if not row:
            raise UserError(f"prompt {i} is empty: give at least one token")
        check_tokens(torch.tensor(row), model.config.vocab_size)
        if len(row) + max_new_tokens > limit:
            raise UserError(
                f"prompt {i} has {len(row)} tokens; with {max_new_tokens} new ones it does not fit the model's "
                f"{limit}: shorten it or ask for fewer"
            )
