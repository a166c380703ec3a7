"""Speculative decoding (Leviathan et al. 2023, arXiv:2211.17192): cheap guesses of the next tokens, checked in one
forward pass of the model, which reads its weights once for all of them.

A guess x from the draft's distribution q is accepted with probability min(1, p(x) / q(x)); the first that is rejected
is replaced by a draw from max(0, p − q), normalized. The tokens so found have the model's own distribution p, whatever
q is. Guesses copied from the text (q has all its weight on one token) need no second draw: the model's own draw is
made, and the guess is accepted if it is the same token. Then the answer is the one without speculation, token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from finetune.errors import UserError
from finetune.inference import scheduler
from finetune.inference.blocks import BlockPool, NoBlocks
from finetune.inference.cache import PagedCache
from finetune.inference.sampler import Sampling, draw, probabilities, uniform
from finetune.lm.gpt import GPT
from finetune.lm.llama import Llama

ACCEPT, AGAIN, GUESS = 1, 2, 3  # streams of random numbers; 0 is the model's own draw


class Drafter(Protocol):
    """Guesses for sequences that decode."""

    def propose(self, sequences: Sequence[scheduler.Sequence]) -> None:
        """Sets `guesses` of each, and `guessed_from` if they were drawn from a distribution."""

    def forget(self, sequence: scheduler.Sequence) -> None:
        """The sequence is finished."""


class PromptLookup:
    """Guesses copied from the text: what followed the last few tokens the last time that they occurred (Saxena 2023,
    "Prompt lookup decoding"). `count` tokens, after a match of `longest` tokens or fewer."""

    def __init__(self, count: int = 4, longest: int = 3) -> None:
        self.count, self.longest = count, longest

    def propose(self, sequences: Sequence[scheduler.Sequence]) -> None:
        for sequence in sequences:
            sequence.guesses, sequence.guessed_from = self.following(sequence.tokens), None

    def following(self, tokens: list[int]) -> list[int]:
        for length in range(min(self.longest, len(tokens) - 1), 0, -1):
            wanted = tokens[-length:]
            for at in range(len(tokens) - length - 1, -1, -1):
                if tokens[at : at + length] == wanted:
                    return tokens[at + length : at + length + self.count]
        return []

    def forget(self, sequence: scheduler.Sequence) -> None:
        """Nothing is kept."""


class DraftModel:
    """Guesses of a smaller model with the same vocabulary, which has a cache of its own. Its draws are made with the
    request's temperature and truncations; greedy requests are guessed greedily."""

    def __init__(self, model: Llama | GPT, blocks: int, block_size: int = 16, count: int = 4) -> None:
        self.model, self.count = model, count
        self.pool = BlockPool(blocks, block_size, prefix_cache=False)
        self.cache = PagedCache(model, self.pool)
        self.shadows: dict[scheduler.Sequence, scheduler.Sequence] = {}

    @torch.no_grad()
    def propose(self, sequences: Sequence[scheduler.Sequence]) -> None:
        for sequence in sequences:
            sequence.guesses, sequence.guessed_from = [], []
        for _ in range(self.count):
            going = [one for one in sequences if self.follow(one)]
            plan = []
            for one in going:
                shadow = self.shadows[one]
                start, count = shadow.table.tokens, shadow.left
                try:
                    plan.append((one, scheduler.Work(shadow, start, count, self.pool.extend(shadow.table, count))))
                except NoBlocks:
                    continue  # no guesses for this one
            if not plan:
                return
            rows = self.cache.answers(self.model, [work for _, work in plan], ["logits"] * len(plan))  # (1, V) each
            for (one, _), (row,) in zip(plan, cast(list[Tensor], rows), strict=True):
                answer = one.answer + one.guesses
                try:
                    q = probabilities(row, one.how, one.prompt, answer, one.allowed(answer))
                except UserError:  # its grammar cannot go on: the engine finds that, too
                    continue
                token = draw(q, uniform(one.how.seed, len(answer), GUESS) if one.how.temperature else 0.0)
                one.guesses.append(token)
                assert one.guessed_from is not None
                one.guessed_from.append(q)

    def follow(self, sequence: scheduler.Sequence) -> bool:
        """Brings the draft's copy of a sequence up to its tokens and guesses; False if it does not fit the model."""
        tokens = sequence.tokens + sequence.guesses
        if len(tokens) >= self.model.config.max_length:
            return False
        shadow = self.shadows.setdefault(sequence, scheduler.Sequence(sequence.prompt, Sampling(), 0))
        same = 0
        for mine, theirs in zip(shadow.tokens[: shadow.table.tokens], tokens, strict=False):
            if mine != theirs:
                break
            same += 1
        self.pool.shrink(shadow.table, min(same, len(tokens) - 1))  # rejected guesses
        shadow.answer = tokens[len(sequence.prompt) :]
        return True

    def forget(self, sequence: scheduler.Sequence) -> None:
        if shadow := self.shadows.pop(sequence, None):
            self.pool.release(shadow.table)


def agreed(guesses: Sequence[int], tokens: Sequence[int]) -> list[int]:
    """The new tokens of a greedy sequence. tokens: the most likely one after 0, 1, … of the guesses."""
    same = 0
    while same < len(guesses) and guesses[same] == tokens[same]:
        same += 1
    return list(tokens[: same + 1])


def verified(sequence: scheduler.Sequence, logits: Tensor) -> list[int]:
    """The new tokens of a sequence with guesses: those accepted and one of the model's own. logits (1 + guesses, V):
    row i is the model's after the first i guesses."""
    how, answer = sequence.how, list(sequence.answer)
    guesses: list[int | None] = [*sequence.guesses, None]
    for i, guess in enumerate(guesses):
        p = probabilities(logits[i], how, sequence.prompt, answer, sequence.allowed(answer))
        at = len(answer)
        q = sequence.guessed_from[i] if sequence.guessed_from and guess is not None else None
        if guess is None or q is None or not how.temperature:
            token = draw(p, uniform(how.seed, at) if how.temperature else 0.0)
        elif uniform(how.seed, at, ACCEPT) * float(q[guess]) < float(p[guess]):
            token = guess
        else:
            token = draw((p - q).clamp(min=0), uniform(how.seed, at, AGAIN))
        answer.append(token)
        if token != guess:
            break
    return answer[len(sequence.answer) :]
