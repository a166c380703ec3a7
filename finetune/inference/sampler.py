"""The choice of the next token: penalties, temperature, truncations, and a draw that depends on its own request only.

    logits → penalties and bias → grammar → / temperature → top-k → top-p → min-p → typical → softmax → draw

in the order and with the meaning of transformers' processors. The draw inverts the cumulative distribution at one
uniform number, a function of (seed of the request, position of the token): who else is in the batch, preemption and the
order of requests change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from finetune.errors import UserError

LEAST_TEMPERATURE = 1e-6  # below, logits / temperature leave the range of fp32
FEW = 1024  # most likely tokens that top-p looks at first
DOUBT = 2e-5  # how near to top_p a sum of probabilities may be before rounding decides


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one request are chosen; the defaults are greedy decoding. UserError for a value out of range.

    Sources: top_p Holtzman et al. 2020 (arXiv:1904.09751), typical_p Meister et al. 2023 (arXiv:2202.00666), min_p
    Nguyen et al. 2024 (arXiv:2407.01082), repetition_penalty Keskar et al. 2019 (arXiv:1909.05858); presence and
    frequency penalties as OpenAI's API defines them.
    """

    temperature: float = 0.0  # 0: the most likely token
    top_k: int = 0  # only the k most likely tokens; 0: all
    top_p: float = 1.0  # only the smallest set of the most likely tokens that together reach p
    min_p: float = 0.0  # only tokens at least this share of the most likely one's probability
    typical_p: float = 1.0  # only the tokens whose surprise is closest to the entropy, until they reach p
    repetition_penalty: float = (
        1.0  # positive logits of tokens in prompt or answer are divided by it, others multiplied
    )
    presence_penalty: float = 0.0  # subtracted from the logit of every token that the answer has
    frequency_penalty: float = 0.0  # subtracted once for each time that the answer has the token
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token id → added to its logit
    seed: int = 0  # 0 … 2⁶³ − 1
    logprobs: int | None = None  # report the log-probability of each token, and of this many most likely ones

    def __post_init__(self) -> None:
        warm = self.temperature == 0 or LEAST_TEMPERATURE <= self.temperature < math.inf
        for name, fits, bound in (
            ("temperature", warm, f"0 or at least {LEAST_TEMPERATURE:g}"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("typical_p", 0 < self.typical_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0"),
            ("presence_penalty", abs(self.presence_penalty) <= 2, "between −2 and 2"),
            ("frequency_penalty", abs(self.frequency_penalty) <= 2, "between −2 and 2"),
            ("logit_bias", all(map(math.isfinite, self.logit_bias.values())), "finite numbers"),
            ("seed", 0 <= self.seed < 1 << 63, "between 0 and 2⁶³ − 1"),
            ("logprobs", self.logprobs is None or self.logprobs >= 0, "at least 0"),
        ):
            if not fits:
                raise UserError(f"{name} must be {bound}, not {getattr(self, name)!r}")

    @cached_property
    def plain(self) -> bool:
        """Whether the next token is the one of the largest logit, and nothing else is asked."""
        # What the greedy never look at is set to its default.
        return replace(self, seed=0, top_k=0, top_p=1.0, min_p=0.0, typical_p=1.0) == Sampling()

    @cached_property
    def simple(self) -> tuple[float, int, float] | None:
        """(temperature, top_k, top_p), if the next token is drawn by these alone and nothing else is asked."""
        others = replace(self, temperature=0.0, top_k=0, top_p=1.0, seed=0)
        return (self.temperature, self.top_k, self.top_p) if self.temperature and others == Sampling() else None


def uniform(seed: int, position: int, stream: int = 0) -> float:
    """A uniform number in [0, 1): a function of its arguments (Philox, Salmon et al. 2011). `stream`: which of several
    numbers at one position; drafting, accepting and drawing again must not share one."""
    bits = np.random.Philox(key=seed, counter=[0, 0, position, stream]).random_raw(1)
    return float(int(bits[0]) >> 11) * 2.0**-53


def penalized(logits: Tensor, how: Sampling, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """One row of logits (V,) fp32 after bias and penalties; the row itself is left as it is."""
    if how.repetition_penalty != 1 and (prompt or answer):
        seen = torch.tensor(sorted({*prompt, *answer}), device=logits.device)
        values = logits[seen]
        factor = how.repetition_penalty
        logits = logits.index_copy(0, seen, torch.where(values < 0, values * factor, values / factor))
    if (how.presence_penalty or how.frequency_penalty) and answer:
        tokens, counts = torch.tensor(answer, device=logits.device).unique(return_counts=True)
        logits = logits.index_add(0, tokens, -(how.presence_penalty + how.frequency_penalty * counts.float()))
    if how.logit_bias:
        tokens = torch.tensor(list(how.logit_bias), device=logits.device)
        logits = logits.index_add(0, tokens, torch.tensor(list(how.logit_bias.values()), device=logits.device))
    return logits


def warp(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """logits (B, V) / temperature, with −inf for what is not among the top_k, and then for what is not in the smallest
    set of most likely tokens that together reach top_p (Holtzman et al. 2020, arXiv:1904.09751)."""
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return logits.masked_fill(outside(logits, top_p), -torch.inf) if top_p < 1 else logits


def outside(logits: Tensor, top_p: float) -> Tensor:
    """(B, V) bool: which tokens are not in the smallest set of the most likely ones that reach top_p. To sort a large
    vocabulary takes longer than to compute its logits, so the most likely `FEW` are tried first; where they do not
    decide it beyond doubt (too flat, a tie, a sum within rounding of top_p), all are sorted, as transformers does."""
    top, at = logits.softmax(-1).topk(min(FEW, logits.shape[-1]))  # (B, few), the most likely first
    before = top.cumsum(-1, dtype=torch.float64) - top
    inside = before < top_p
    last = inside.sum(-1, keepdim=True) - 1
    beyond = top.gather(-1, (last + 1).clamp(max=top.shape[-1] - 1)) < top.gather(-1, last)
    if bool((beyond & ((before - top_p).abs().amin(-1, keepdim=True) > DOUBT)).all()):
        return torch.ones_like(logits, dtype=torch.bool).scatter_(-1, at, ~inside)
    ascending, order = logits.sort(-1)
    out = ascending.softmax(-1).cumsum(-1) <= 1 - top_p  # from the least likely up
    out[:, -1] = False
    return out.scatter(-1, order, out)


def truncated(logits: Tensor, how: Sampling) -> Tensor:
    """One row of logits (V,) / temperature, with −inf for the tokens that top-k, top-p, min-p and typical-p drop. The
    temperature must not be 0."""
    logits = warp(logits[None], how.temperature, how.top_k, how.top_p)[0]
    if how.min_p > 0:
        p = logits.softmax(-1)
        logits = logits.masked_fill(p < how.min_p * p.max(), -torch.inf)
    if how.typical_p < 1:
        log_p = logits.log_softmax(-1)
        p = log_p.exp()
        entropy = -torch.where(p > 0, log_p * p, 0).sum()
        distance, order = (-log_p - entropy).abs().sort()
        reached = p[order].cumsum(-1)
        last = int((reached < how.typical_p).sum())  # the first token that reaches it stays
        out = distance > distance[min(last, len(distance) - 1)]
        logits = logits.masked_fill(torch.zeros_like(out).scatter(0, order, out), -torch.inf)
    return logits


def probabilities(
    logits: Tensor,
    how: Sampling,
    prompt: Sequence[int] = (),
    answer: Sequence[int] = (),
    allowed: Tensor | None = None,
) -> Tensor:
    """The distribution (V,) fp64 that the next token is drawn from; for greedy decoding all of it is on one token.
    `allowed` (V,) bool: the only tokens that may come."""
    row = penalized(logits.float(), how, prompt, answer)
    if allowed is not None:
        row = row.masked_fill(~allowed.to(row.device), -torch.inf)
    if how.temperature == 0:
        return torch.nn.functional.one_hot(row.argmax(), len(row)).double()
    return truncated(row, how).double().softmax(-1)


def draw(p: Tensor, u: float) -> int:
    """The token at which the cumulative sum of p (V,) first exceeds u · Σp; u in [0, 1). Never one of probability 0."""
    cumulative = p.cumsum(-1)
    at = int(torch.searchsorted(cumulative, u * cumulative[-1], right=True))
    return at if at < len(p) else int(p.nonzero()[-1])  # u · Σp may round up to Σp


def drawn(
    rows: Tensor, how: tuple[float, int, float], places: Sequence[tuple[int, int]]
) -> tuple[list[int], list[float]]:
    """A token for each of rows (n, V), the one that `probabilities` and `draw` give, and its log-probability there; the
    vocabulary is sorted for all at once. how: `Sampling.simple` of all; places: the (seed, position) of each."""
    p = warp(rows.float(), *how).double().softmax(-1)
    cumulative = p.cumsum(-1)
    u = torch.tensor([[uniform(*place)] for place in places], dtype=p.dtype, device=p.device)
    found = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)[:, 0].tolist()
    tokens = [at if at < p.shape[1] else int(p[i].nonzero()[-1]) for i, at in enumerate(found)]
    chosen = torch.tensor(tokens, device=p.device)
    return tokens, p.gather(-1, chosen[:, None])[:, 0].log().tolist()
