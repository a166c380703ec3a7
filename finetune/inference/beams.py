"""Several answers to one prompt that share its blocks: parallel samples, and beam search.

    beam search keeps the `width` answers with the largest  Σ log p  and extends each by every token; of the best
    candidates those that end are kept aside with the score  Σ log p / length^penalty  (Wu et al. 2016,
    arXiv:1609.08144, without the coverage term), the others go on

as transformers' `num_beams` does it, with its default rule for the end: the best unfinished answer, at its present
length, scores no better than the worst of `width` finished ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Tokens
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from finetune.errors import UserError
from finetune.inference.engine import Engine
from finetune.inference.grammar import Matcher
from finetune.inference.sampler import Sampling, drawn
from finetune.inference.scheduler import Sequence
from finetune.inference.text import TextStream
from finetune.inference.virtual_tokens import Virtual


def samples(
    engine: Engine,
    prompt: Tokens[int],
    how: Sampling,
    most_new: int,
    count: int,
    stop_ids: Iterable[int] = (),
    text: Callable[[], TextStream] | None = None,
    adapter: str | None = None,
    grammar: Matcher | None = None,
    virtual: Virtual | None = None,
) -> list[Sequence]:
    """Queues `count` answers to one prompt, which is computed once; all are in the list after its last step. Answer i
    has the seed `how.seed + i`; `text` makes the stream of each."""
    given: dict[str, Any] = {
        "stop_ids": stop_ids,
        "text": text() if text else None,
        "adapter": adapter,
        "grammar": grammar,
        "virtual": virtual,
    }
    found = [engine.add(prompt, how, most_new, **given)]

    def split(first: Sequence, logits: Tensor) -> None:
        first.receive = None
        for i in range(1, count):
            found.append(engine.fork(first, replace(how, seed=(how.seed + i) % (1 << 63))))
            found[-1].text = text() if text else None
        answers: list[Tensor | list[int]] = [logits[None]] * count
        if how.simple and not grammar:  # as the engine draws the tokens behind this one
            tokens, logprobs = drawn(logits.expand(count, -1), how.simple, [(one.how.seed, 0) for one in found])
            answers = [[token] for token in tokens]
            for one, logprob in zip(found, logprobs, strict=True):
                one.drawn.append(logprob)
        for one, answer in zip(list(found), answers, strict=True):
            engine.choose(one, answer)

    found[0].receive = split
    return found


class BeamSearch:
    """One beam search in an engine, next to other requests; its answers are in `best` when the engine has run.

    UserError for a width or a penalty out of range, and for what `Engine.add` refuses.
    """

    def __init__(
        self,
        engine: Engine,
        prompt: Tokens[int],
        width: int,
        most_new: int,
        stop_ids: Iterable[int] = (),
        length_penalty: float = 1.0,
        adapter: str | None = None,
        grammar: Matcher | None = None,
        virtual: Virtual | None = None,
    ) -> None:
        if width < 1:
            raise UserError(f"beam search needs at least one beam, not {width}")
        self.engine, self.width, self.penalty, self.stops = engine, width, length_penalty, frozenset(stop_ids)
        self.most_new = most_new
        first = engine.add(prompt, Sampling(), most_new, adapter=adapter, grammar=grammar, virtual=virtual)
        first.receive = self.receive
        self.scores: dict[Sequence, float] = {first: 0.0}  # the unfinished answers, the best first
        self.waiting: dict[Sequence, Tensor] = {}  # log-probabilities of those that are computed in this round
        self.finished: list[tuple[float, list[int]]] = []  # the best first

    @property
    def best(self) -> list[list[int]]:
        """The finished answers, the best first."""
        return [answer for _, answer in self.finished]

    def receive(self, sequence: Sequence, logits: Tensor) -> None:
        logprobs, allowed = logits.float().log_softmax(-1), sequence.allowed(sequence.answer)
        self.waiting[sequence] = logprobs if allowed is None else logprobs.masked_fill(~allowed, -torch.inf)
        sequence.held = True
        if len(self.waiting) == len(self.scores):
            self.extend()

    def extend(self) -> None:
        """One round: every answer is one token longer, or finished."""
        parents = list(self.scores)
        sums = torch.stack([self.scores[one] + self.waiting[one] for one in parents])  # (beams, V)
        count = min(max(2, 1 + len(self.stops)) * self.width, sums.numel())
        values, places = sums.flatten().topk(count)
        going: list[tuple[Sequence, int, float]] = []
        for rank, (value, place) in enumerate(zip(values.tolist(), places.tolist(), strict=True)):
            if value == -torch.inf:  # a grammar allows no more
                break
            parent, token = parents[place // sums.shape[1]], place % sums.shape[1]
            answer = [*parent.answer, token]
            if token in self.stops or len(answer) == self.most_new:
                if rank < self.width:
                    self.finished.append((value / len(answer) ** self.penalty, answer))
            elif len(going) < self.width:
                going.append((parent, token, value))
        self.finished = sorted(self.finished, key=lambda pair: -pair[0])[: self.width]
        self.waiting.clear()
        if going and len(self.finished) == self.width:
            length = len(going[0][0].answer) + 1
            if going[0][2] / length**self.penalty <= self.finished[-1][0]:
                going = []
        # Children share their parent's blocks; the first goes on in its place.
        children: list[tuple[Sequence, int, float]] = []
        for parent, token, value in reversed(going):
            first = all(parent is not other for other, _, _ in going[: len(going) - 1 - len(children)])
            children.append((parent if first else self.engine.fork(parent, parent.how), token, value))
        self.scores = {child: value for child, _, value in reversed(children)}
        for child, token, _ in children:
            child.answer.append(token)
            child.held = False
        for parent in parents:
            if parent not in self.scores:
                self.engine.end(parent)
