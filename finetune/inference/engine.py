"""The loop of a server: plan, one forward pass over the tokens of all sequences, one new token for each that is ready.

engine = Engine(model, blocks=256)
sequence = engine.add([1, 2, 3], Sampling(), most_new=20)
engine.run()
sequence.answer
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Tokens
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from finetune.errors import UserError
from finetune.inference.adapters import Adapters
from finetune.inference.blocks import BlockPool, Table
from finetune.inference.cache import PagedCache
from finetune.inference.fingerprint import Fingerprint
from finetune.inference.grammar import Matcher
from finetune.inference.invariance import dependent
from finetune.inference.sampler import Sampling, drawn
from finetune.inference.scheduler import Logprobs, Scheduler, Sequence, Work
from finetune.inference.speculative import Drafter, agreed, verified
from finetune.inference.text import TextStream
from finetune.inference.virtual_tokens import Virtual
from finetune.lm.forward import check_tokens
from finetune.lm.gpt import GPT
from finetune.lm.llama import Llama


class Engine:
    """Serves one model. `blocks` of `block_size` tokens are allocated at once; `most_tokens` and `most_sequences` bound
    a step; `cache_dtype`: torch.int8 or torch.float8_e4m3fn for a cache of 8 bits; `drafter`: speculative decoding;
    `adapters`: folders of LoRA adapters by name, one of which a request may choose. `batch_invariant`: the same bits in
    any company, which a model with packed weights gives; UserError names what depends on the company in another."""

    def __init__(
        self,
        model: Llama | GPT,
        blocks: int,
        block_size: int = 16,
        *,
        most_tokens: int = 512,
        most_sequences: int = 64,
        prefix_cache: bool = True,
        cache_dtype: torch.dtype | None = None,
        drafter: Drafter | None = None,
        adapters: Mapping[str, str | Path] | None = None,
        batch_invariant: bool = False,
    ) -> None:
        if batch_invariant and (reason := dependent(model)):
            raise UserError(f"answers would depend on the batch they are in: {reason}")
        self.model, self.drafter = model, drafter
        self.proposed = self.accepted = 0  # guesses of the drafter
        self.changed: list[Sequence] = []  # those that got tokens in the last step
        self.pool = BlockPool(blocks, block_size, prefix_cache)
        self.scheduler = Scheduler(self.pool, most_tokens, most_sequences)
        self.cache = PagedCache(model, self.pool, cache_dtype)
        self.adapters = Adapters(model, adapters or {}, batch_invariant)
        self.fingerprint = Fingerprint(model)

    def add(
        self,
        prompt: Tokens[int],
        how: Sampling,
        most_new: int,
        stop_ids: Iterable[int] = (),
        priority: int = 0,
        text: TextStream | None = None,
        adapter: str | None = None,
        grammar: Matcher | None = None,
        watch: Callable[[Sequence, int, Tensor], None] | None = None,
        virtual: Virtual | None = None,
    ) -> Sequence:
        """Queues a prompt, for the base or with an adapter; the answer ends at a stop token, at a stop string of
        `text`, or after `most_new` tokens. `grammar`: what the answer must be; it is this sequence's alone, and the
        stop tokens are those that end it. `watch`: as in `Sequence`; it ends the sequence. `virtual`: trained tokens
        before the prompt. UserError if the prompt is empty, has a token outside the vocabulary, or can never fit, and
        for an unknown adapter."""
        if adapter is not None and adapter in self.adapters.virtual:
            if virtual:
                raise UserError(f"adapter '{adapter}' and the request both have virtual tokens: give one of the two")
            virtual, adapter = self.adapters.virtual[adapter], None
        check_prompt(self.model, prompt, most_new, virtual)
        check_room(prompt, most_new, virtual, "the cache", self.pool.count * self.pool.block_size)
        vocabulary = self.model.config.vocab_size
        if strange := [token for token in how.logit_bias if not 0 <= token < vocabulary]:
            raise UserError(f"logit_bias: token {strange[0]} is not in the vocabulary of {vocabulary}")
        table = Table(self.root(adapter, virtual, len(prompt)))
        sequence = Sequence(
            list(prompt), how, most_new, frozenset(stop_ids), priority, text=text, adapter=adapter, table=table,
            grammar=grammar, watch=watch, virtual=virtual,
        )  # fmt: skip
        if most_new or watch:
            self.scheduler.add(sequence)
        return sequence

    def root(self, adapter: str | None, virtual: Virtual | None, length: int) -> bytes:
        """What the prefix cache's keys of a sequence begin with: everything but its tokens that changes its keys and
        values, such as the prompt's `length` with dynamic rope scaling. UserError for an unknown adapter."""
        content = self.adapters.digest(adapter)
        if not self.pool.prefix_cache:
            return b""
        if virtual:
            length, content = length + virtual.count, content + virtual.digest
        stretched = 0 < self.cache.original < length
        words = f"{self.cache.layers[0][0][0].dtype} {length if stretched else 0} {len(content)} "
        return hashlib.sha256(words.encode() + self.fingerprint() + content).digest()

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.waiting or self.scheduler.running)

    def run(self) -> None:
        """Steps until every sequence is finished."""
        while self.busy:
            self.step()

    @torch.no_grad()
    def step(self) -> list[Sequence]:
        """One forward pass; the sequences that got tokens."""
        if self.drafter:
            decoding = [one for one in self.scheduler.running if one.left == 1 and not one.watch]
            self.drafter.propose(decoding)
            for one in decoding:
                del one.guesses[one.most_new - len(one.answer) - 1 :]
        plan = self.scheduler.plan()
        if not plan:
            return []
        found = self.cache.answers(self.model, plan, [work.sequence.asks for work in plan], self.adapters)
        draw_alike(plan, found)
        self.changed = []
        for work, answer in zip(plan, found, strict=True):
            sequence = work.sequence
            if self.pool.unnamed(sequence.table):
                self.pool.publish(sequence.table, sequence.stored)
            if answer is None:
                continue
            if sequence.watch:
                sequence.watch(sequence, work.start, cast(Tensor, answer))
            elif sequence.receive:
                sequence.receive(sequence, cast(Tensor, answer)[0])
            else:
                self.choose(sequence, answer)
        return self.changed

    def fork(self, sequence: Sequence, how: Sampling) -> Sequence:
        """A second sequence with the same tokens, which shares all blocks until one of the two writes."""
        other = replace(
            sequence, how=how, answer=[*sequence.answer], logprobs=[*sequence.logprobs], drawn=[*sequence.drawn],
            guesses=[], table=self.pool.fork(sequence.table), grammar=sequence.grammar and sequence.grammar.copy(),
        )  # fmt: skip
        self.scheduler.adopt(other)
        return other

    def choose(self, sequence: Sequence, found: Tensor | list[int]) -> None:
        """Adds the next token, with guesses several, up to the one that ends the answer; the cache forgets guesses that
        were rejected. found: the logits (1 + guesses, V), or the most likely tokens if the sequence asked for these."""
        try:
            new = agreed(sequence.guesses, found) if isinstance(found, list) else verified(sequence, found)
        except UserError as error:  # its grammar cannot go on
            sequence.finish_reason, sequence.error, new = "error", str(error), []
        self.proposed += len(sequence.guesses)
        self.accepted += max(len(new) - 1, 0)
        for token, row in zip(new, found, strict=False):
            sequence.answer.append(token)
            if sequence.how.logprobs is not None:
                sequence.logprobs.append(Logprobs.of(cast(Tensor, row), token, sequence.how.logprobs))
            ended = token in sequence.stop_ids
            if sequence.text and not ended:
                sequence.text.push(token)
                ended = sequence.text.stopped
            if ended or len(sequence.answer) == sequence.most_new:
                sequence.finish_reason = "stop" if ended else "length"
                if sequence.text:
                    sequence.text.finish()
                break
        sequence.guesses = []
        self.changed.append(sequence)
        known = sequence.before + len(sequence.prompt) + len(sequence.answer)
        self.pool.shrink(sequence.table, min(sequence.table.tokens, known - 1))
        if sequence.finish_reason:
            self.end(sequence)

    def end(self, sequence: Sequence) -> None:
        """Removes a sequence, finished or not; its blocks are free."""
        self.scheduler.remove(sequence)
        if self.drafter:
            self.drafter.forget(sequence)


def draw_alike(plan: list[Work], found: list[list[int] | Tensor | None]) -> None:
    """Replaces the logits of sequences that are sampled alike by the tokens that are drawn from them."""
    alike: dict[tuple[float, int, float], list[int]] = {}
    for i, (work, answer) in enumerate(zip(plan, found, strict=True)):
        one = work.sequence
        drawable = isinstance(answer, Tensor) and not (one.watch or one.receive or one.grammar or one.guesses)
        if drawable and one.how.simple:
            alike.setdefault(one.how.simple, []).append(i)
    for how, rows in alike.items():
        places = [(plan[i].sequence.how.seed, len(plan[i].sequence.answer)) for i in rows]
        tokens, logprobs = drawn(torch.cat([cast(Tensor, found[i]) for i in rows]), how, places)
        for i, token, logprob in zip(rows, tokens, logprobs, strict=True):
            found[i] = [token]
            plan[i].sequence.drawn.append(logprob)


def check_prompt(
    model: Llama | GPT, prompt: Tokens[int], most_new: int, virtual: Virtual | None = None, name: str = "the prompt"
) -> None:
    """UserError for a prompt that is empty, has a token outside the vocabulary, or is too long for the model."""
    if not prompt:
        raise UserError(f"{name} is empty: give at least one token")
    check_tokens(torch.tensor(prompt), model.config.vocab_size)
    check_room(prompt, most_new, virtual, "the model's maximum length", model.config.max_length, name)


def check_room(
    prompt: Tokens[int], most_new: int, virtual: Virtual | None, where: str, most: int, name: str = "the prompt"
) -> None:
    count = virtual.count if virtual else 0
    if count + len(prompt) + most_new > most:
        more = f" and {count} virtual ones" if count else ""
        raise UserError(
            f"{name} has {len(prompt)} tokens{more}; with {most_new} new ones it does not fit {where} of {most}: "
            "shorten it or ask for fewer"
        )
