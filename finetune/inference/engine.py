"""The loop of a server: plan, one forward pass over the tokens of all sequences, one new token for each that is ready.

engine = Engine(model, blocks=256)
sequence = engine.add([1, 2, 3], Sampling(), most_new=20)
engine.run()
sequence.answer
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Tokens

import torch
import torch.nn.functional as F

from finetune.errors import UserError
from finetune.inference.blocks import BlockPool
from finetune.inference.cache import PagedCache
from finetune.inference.sampler import Sampling, draw, probabilities, uniform
from finetune.inference.scheduler import Scheduler, Sequence
from finetune.lm.forward import check_tokens
from finetune.lm.gpt import GPT
from finetune.lm.llama import Llama


class Engine:
    """Serves one model. `blocks` of `block_size` tokens are allocated at once; `most_tokens` and `most_sequences` bound
    a step; `cache_dtype`: torch.int8 or torch.float8_e4m3fn for a cache of 8 bits."""

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
    ) -> None:
        self.model = model
        self.pool = BlockPool(blocks, block_size, prefix_cache)
        self.scheduler = Scheduler(self.pool, most_tokens, most_sequences)
        self.cache = PagedCache(model, self.pool, cache_dtype)

    def add(
        self, prompt: Tokens[int], how: Sampling, most_new: int, stop_ids: Iterable[int] = (), priority: int = 0
    ) -> Sequence:
        """Queues a prompt. UserError if it is empty, has a token outside the vocabulary, or can never fit."""
        limit, room = self.model.config.max_length, self.pool.count * self.pool.block_size
        if not prompt:
            raise UserError("the prompt is empty: give at least one token")
        check_tokens(torch.tensor(prompt), self.model.config.vocab_size)
        for most, name in ((limit, "the model's maximum length"), (room, "the cache")):
            if len(prompt) + most_new > most:
                raise UserError(
                    f"the prompt has {len(prompt)} tokens; with {most_new} new ones it does not fit {name} of {most}"
                )
        sequence = Sequence(list(prompt), how, most_new, frozenset(stop_ids), priority)
        if most_new:
            self.scheduler.add(sequence)
        return sequence

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.waiting or self.scheduler.running)

    def run(self) -> None:
        """Steps until every sequence is finished."""
        while self.busy:
            self.step()

    @torch.no_grad()
    def step(self) -> list[Sequence]:
        """One forward pass; the sequences that got a token."""
        plan = self.scheduler.plan()
        if not plan:
            return []
        device = self.model.embed.weight.device
        view = self.cache.step(plan)
        new = [token for work in plan for token in work.sequence.tokens[work.start : work.start + work.count]]
        state = self.model(torch.tensor([new], device=device), positions=view.positions, cache=view, hidden=True)[0]
        for work in plan:
            self.pool.publish(work.sequence.table, work.sequence.tokens[: work.start + work.count])
        ready = [i for i, work in enumerate(plan) if not work.sequence.left]
        logits = F.linear(state[view.last[ready]], self.model.head_weight)  # (sequences, V)
        for i, row in zip(ready, logits, strict=True):
            self.choose(plan[i].sequence, row)
        return [plan[i].sequence for i in ready]

    def choose(self, sequence: Sequence, logits: torch.Tensor) -> None:
        """Appends the next token; ends the sequence at a stop token or its last one."""
        how = sequence.how
        p = probabilities(logits, how, sequence.prompt, sequence.answer)
        token = draw(p, uniform(how.seed, len(sequence.answer)) if how.temperature else 0.0)
        sequence.answer.append(token)
        if token in sequence.stop_ids or len(sequence.answer) == sequence.most_new:
            self.scheduler.remove(sequence)
