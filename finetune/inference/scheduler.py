"""Which tokens the next forward pass computes: continuous batching (Yu et al. 2022, Orca), chunked prefill (Agrawal et
al. 2023, arXiv:2308.16369), preemption by recomputation (Kwon et al. 2023, arXiv:2309.06180, §4.5), priorities.

A sequence has tokens, of which the first `table.tokens` are computed: their keys and values are in the cache. Each step
computes some of the others, at most `most_tokens` of all sequences together. A sequence whose tokens are all computed
gets a new one from the sampler; so decoding is the case of one token left, and a prompt is the case of many.

    1. running sequences with few tokens left (decoding) come first: a long prompt does not make them wait
    2. then prompts under way, then waiting ones, in the order of (priority, arrival), each as much as the budget allows
    3. without a free block the last in that order gives its blocks back and waits; its tokens are computed again later
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from finetune.inference.blocks import BlockPool, NoBlocks, Table
from finetune.inference.grammar import Matcher
from finetune.inference.sampler import Sampling
from finetune.inference.text import TextStream
from finetune.inference.virtual_tokens import Virtual

Asked = Literal["nothing", "tokens", "logits", "states"]  # of one sequence's part of a pass


@dataclass(frozen=True)
class Logprobs:
    """The model's own log-probability (nats) of a chosen token, and those of the most likely ones, best first."""

    chosen: float
    top: dict[int, float]

    @classmethod
    def of(cls, logits: Tensor, token: int, count: int) -> Logprobs:
        """Of one row of logits (V,)."""
        logprobs = logits.float().log_softmax(-1)
        values, tokens = logprobs.topk(min(count, len(logprobs)))
        return cls(float(logprobs[token]), dict(zip(tokens.tolist(), values.tolist(), strict=True)))


@dataclass(eq=False)
class Sequence:
    """One prompt and the answer so far. The smallest `priority` goes first; `arrival` is given by the scheduler."""

    prompt: list[int]
    how: Sampling
    most_new: int  # tokens of the answer, at most
    stop_ids: frozenset[int] = frozenset()
    priority: int = 0
    arrival: int = 0
    answer: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)  # of the answer's tokens, if `how` wants them
    drawn: list[float] = field(default_factory=list)  # log-probability that each was drawn with, if `how.simple`
    table: Table = field(default_factory=Table)
    preempted: int = 0  # how often
    guesses: list[int] = field(default_factory=list)  # of the tokens behind the answer (speculative.py)
    guessed_from: list[Tensor] | None = None  # the distributions (V,) they were drawn from; None: they were copied
    text: TextStream | None = None  # the answer's text, and its stop strings
    grammar: Matcher | None = None  # what the answer must be (grammar.py)
    finish_reason: str = ""  # "stop", "length" or "error" once it is finished
    error: str = ""  # why the answer could not go on
    adapter: str | None = None  # the name of its LoRA adapter; None: the base
    virtual: Virtual | None = None  # trained tokens before the prompt
    receive: Callable[[Sequence, Tensor], None] | None = None  # gets the logits (V,) in place of the sampler
    watch: Callable[[Sequence, int, Tensor], None] | None = None  # gets its tokens' states (T, C) from an index on
    held: bool = False  # nothing is computed of it for now: a beam waits for the others

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.answer

    def between(self, start: int, end: int) -> list[int]:
        """`stored[start:end]`, without a copy of the others."""
        virtual = [0] * (min(end, self.before) - start)
        start, end, own = max(start - self.before, 0), max(end - self.before, 0), len(self.prompt)
        return virtual + self.prompt[start:end] + self.answer[max(start - own, 0) : max(end - own, 0)]

    @property
    def before(self) -> int:
        """Virtual tokens, which come before the prompt."""
        return self.virtual.count if self.virtual else 0

    @property
    def stored(self) -> list[int]:
        """The tokens as the cache has them: virtual ones as 0."""
        return [0] * self.before + self.prompt + self.answer

    @property
    def left(self) -> int:
        """Tokens that are known and not computed yet; guesses do not count."""
        return self.before + len(self.prompt) + len(self.answer) - self.table.tokens

    @property
    def asks(self) -> Asked:
        """What a step that is planned must find of this sequence (PagedCache.answers)."""
        if self.watch:
            return "states"
        if self.left > 0:  # a prompt whose other tokens come later
            return "nothing"
        return "tokens" if self.how.plain and not self.receive and not self.grammar else "logits"

    def allowed(self, answer: list[int]) -> Tensor | None:
        """Which tokens (V,) bool its grammar lets follow `answer`; None without one."""
        return self.grammar.allowed(answer) if self.grammar else None

    @property
    def order(self) -> tuple[int, int]:
        return self.priority, self.arrival


@dataclass
class Work:
    """What one step computes of a sequence: `count` tokens from `start` on, guesses among them, after the blocks
    `copies` are copied."""

    sequence: Sequence
    start: int
    count: int
    copies: list[tuple[int, int]]

    @property
    def ordinary(self) -> bool:
        """Whether it is a matter of tokens and the base's weights alone."""
        return self.sequence.adapter is None and self.start >= self.sequence.before

    @property
    def tokens(self) -> list[int]:
        known = self.sequence.between(self.start, self.start + self.count)
        return known + self.sequence.guesses[: self.count - len(known)]


class Scheduler:
    """Waiting and running sequences over one pool of blocks."""

    def __init__(self, pool: BlockPool, most_tokens: int = 512, most_sequences: int = 64) -> None:
        self.pool, self.most_tokens, self.most_sequences = pool, most_tokens, most_sequences
        self.waiting: list[Sequence] = []  # both sorted by `order`
        self.running: list[Sequence] = []
        self.arrived = self.preemptions = 0
        self.hits = self.misses = 0  # tokens of admitted sequences that the prefix cache had, or not

    def add(self, sequence: Sequence) -> None:
        sequence.arrival = self.arrived
        self.arrived += 1
        bisect.insort(self.waiting, sequence, key=lambda s: s.order)

    def adopt(self, sequence: Sequence) -> None:
        """Adds a sequence that shares another's blocks; if there is no place for it, it gives them back and waits."""
        if self.active < self.most_sequences:
            sequence.arrival = self.arrived
            self.arrived += 1
            bisect.insort(self.running, sequence, key=lambda s: s.order)
        else:
            self.pool.release(sequence.table)
            self.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Ends a sequence, finished or not; its blocks are free."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self.pool.release(sequence.table)

    def plan(self) -> list[Work]:
        """The next step; empty if there is nothing to do."""
        work: dict[Sequence, Work] = {}
        budget = self.most_tokens
        decoding = [s for s in self.running if s.left == 1]
        prompts = [s for s in self.running if s.left > 1]
        for one in decoding + prompts:
            if budget and one in self.running:  # not preempted by an earlier one
                budget -= self.schedule(one, budget, work)
        # A waiting sequence preempts none that computes: it would be preempted in turn.
        while budget and (sequence := next((s for s in self.waiting if not s.held), None)):
            if not (self.active < self.most_sequences and self.fits(sequence, budget)):
                held = [s for s in self.running if s.held]
                if work or not held:
                    break
                self.preempt(held[-1])
                continue
            self.waiting.remove(sequence)
            bisect.insort(self.running, sequence, key=lambda s: s.order)
            self.hits += sequence.table.tokens
            self.misses += sequence.left
            budget -= self.schedule(sequence, budget, work)
        return list(work.values())

    @property
    def active(self) -> int:
        return sum(not s.held for s in self.running)

    def fits(self, sequence: Sequence, budget: int) -> bool:
        """Gives a waiting sequence the blocks of its known prefix; False, with no blocks, if there are too few for the
        rest of what the budget allows."""
        if not sequence.watch:  # the cache has no states
            self.pool.match(sequence.table, sequence.stored)
        if self.pool.needed(sequence.table, min(sequence.left, budget)) <= len(self.pool.free):
            return True
        self.pool.release(sequence.table)
        return False

    def schedule(self, sequence: Sequence, budget: int, work: dict[Sequence, Work]) -> int:
        """Adds what the budget allows of a running sequence to `work`, preempting others where blocks are missing;
        returns the tokens by which the budget shrinks."""
        start, count = sequence.table.tokens, min(sequence.left, budget)
        room = min(budget - count, self.pool.room(sequence.table) - count) if count == sequence.left else 0
        del sequence.guesses[max(room, 0) :]  # guesses preempt nobody
        count += len(sequence.guesses)
        spent = 0
        while True:
            try:
                copies = self.pool.extend(sequence.table, count)
            except NoBlocks:
                victim = self.running[-1]
                self.preempt(victim)
                if dropped := work.pop(victim, None):
                    spent -= dropped.count
                if victim is sequence:
                    return spent
            else:
                work[sequence] = Work(sequence, start, count, copies)
                return spent + count

    def preempt(self, sequence: Sequence) -> None:
        """Back to the waiting ones, without blocks."""
        self.running.remove(sequence)
        self.pool.release(sequence.table)
        sequence.preempted += 1
        sequence.guesses.clear()
        self.preemptions += 1
        bisect.insort(self.waiting, sequence, key=lambda s: s.order)
