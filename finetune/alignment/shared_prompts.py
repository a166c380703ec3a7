"""Log-probabilities of several answers to each prompt in one forward pass that reads every prompt once.

G answers of m tokens to a prompt of p tokens have G (p + m) tokens as documents, and p + G (m − 1) here: the prompt's
tokens are in the row once, and the answers behind them attend to its keys and values and to their own. Products, norms
and MLPs run over these tokens alone; only attention repeats the prompt's keys and values. The last token of an answer
predicts nothing and is not in the row.

    prompt 1 | prompt 2 | … | answers to prompt 1, end to end, each without its last token | answers to prompt 2 | …
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from finetune import ops
from finetune.alignment import logprobs
from finetune.lm.gpt import GPT
from finetune.lm.llama import Llama


@dataclass(frozen=True)
class Group:
    """A prompt and the answers to it, in tokens; an answer has one at least."""

    prompt: Sequence[int]
    answers: Sequence[Sequence[int]]

    @property
    def tokens(self) -> int:
        """In the row."""
        return len(self.prompt) + sum(len(answer) - 1 for answer in self.answers)


@dataclass(frozen=True)
class Alike:
    """B answers to prompts of one length P, the longest of which has L tokens in the row."""

    count: int  # B
    queries: Tensor  # (B · L,) places in the row; behind an answer's end those of its first token
    keys: Tensor  # (B · (P + L),) places in the row
    real: Tensor  # (r,) which of the queries are tokens of answers

    @classmethod
    def of(cls, length: int, answers: Sequence[tuple[int, int, int]]) -> Alike:
        """answers: of each the start of its prompt in the row, its own, and how many tokens of it are there."""
        prompt, start, count = (torch.tensor(column)[:, None] for column in zip(*answers, strict=True))  # (B, 1)
        step = torch.arange(int(count.max()))
        own = torch.where(step < count, start + step, start)  # (B, L)
        keys = torch.cat([prompt + torch.arange(length), own], 1)
        return cls(len(answers), own.flatten(), keys.flatten(), (step < count).flatten().nonzero()[:, 0])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **rules: Any) -> Tensor:
        """q (T, H, D), k and v (T, Hkv, D) of the row → (r, H, D)."""
        q, k, v = (
            x[places].unflatten(0, (self.count, -1))
            for x, places in ((q, self.queries), (k, self.keys), (v, self.keys))
        )
        return ops.attention(q, k, v, causal=True, **rules).flatten(0, 1)[self.real]


class Layout:
    """The row of some groups; for `Llama.forward` a cache without earlier tokens, which rules what each token sees.

    tokens, positions (1, T); rows (n,): the place in the row that predicts each answer token, in the order of groups
    and answers; targets (n,): these tokens; owners (n,): the answer that each belongs to, counted over all groups."""

    spans: Tensor | None = None
    stateless = True  # a block may run again in the backward pass

    def __init__(self, groups: Sequence[Group]) -> None:
        tokens = [token for group in groups for token in group.prompt]
        positions = [place for group in groups for place in range(len(group.prompt))]
        starts = [0, *accumulate(len(group.prompt) for group in groups)]
        rows: list[int] = []
        targets: list[int] = []
        counts: list[int] = []
        alike: dict[int, list[tuple[int, int, int]]] = {}  # by the prompt's length
        for group, start in zip(groups, starts, strict=False):
            length = len(group.prompt)
            for answer in group.answers:
                at, kept = len(tokens), len(answer) - 1
                rows += [start + length - 1, *range(at, at + kept)]
                targets += answer
                counts.append(len(answer))
                tokens += answer[:-1]
                positions += range(length, length + kept)
                if kept:
                    alike.setdefault(length, []).append((start, at, kept))
        self.tokens, self.positions = torch.tensor([tokens]), torch.tensor([positions])
        self.rows, self.targets = torch.tensor(rows), torch.tensor(targets)
        self.owners = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        self.prompts, self.cu_seqlens = starts[-1], torch.tensor(starts, dtype=torch.int32)
        self.alike = [Alike.of(length, answers) for length, answers in alike.items()]
        places = [torch.arange(self.prompts), *(one.queries[one.real] for one in self.alike)]
        self.order = torch.cat(places).argsort()
        self.lengths = torch.zeros(1, dtype=torch.int64)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, **rules: Any) -> Tensor:
        """q (1, T, H, D), k and v (1, T, Hkv, D) → (1, T, H, D)."""
        own = (x[:, : self.prompts] for x in (q, k, v))
        found = [ops.attention(*own, causal=True, cu_seqlens=self.cu_seqlens, **rules)[0]]
        # The repeated keys and values are not kept for the backward pass: they would be more than all else of a layer.
        found += [checkpoint(one.attend, q[0], k[0], v[0], use_reentrant=False, **rules) for one in self.alike]
        return torch.cat(found)[self.order][None]

    def advance(self, new: int, lengths: Tensor | None) -> None:
        """Nothing: no keys are kept."""


def token_logprobs(model: Llama | GPT, layout: Layout, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(log-probabilities of the answers' tokens, entropies in nats of the distributions that they come from), both (n,)
    fp32 with gradients, in the order of `layout.targets`; the numbers of `logprobs.with_entropies`."""
    hidden = model(layout.tokens, positions=layout.positions, cache=layout, hidden=True)[0]  # (T, C)
    return logprobs.of_states(model, hidden[layout.rows], layout.targets, temperature)
