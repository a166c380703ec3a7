"""Keys and values of all sequences in one pool of blocks, and what one forward pass over many sequences needs of it.

The tokens of a step lie end to end in one row (1, N), so that every product and norm runs once over all of them; only
attention looks at each sequence separately, through its table of blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from finetune import ops
from finetune.inference.blocks import BlockPool
from finetune.inference.native import NativeLlama, unsupported
from finetune.inference.scheduler import Asked, Work
from finetune.inference.virtual_tokens import Virtual
from finetune.lm import head
from finetune.lm.gpt import GPT
from finetune.lm.layers import RopeScaling
from finetune.lm.llama import Llama
from finetune.ops import _op
from finetune.ops.kv_cache import kv_cache, kv_cache_append_, kv_cache_copy_, pool, raw

if TYPE_CHECKING:
    from finetune.inference.adapters import Adapters


class PagedCache:
    """Per layer two pools (blocks, block_size, Hkv, D) and, with 8 bits, their scales. `dtype`: that of the norms, or
    another: torch.bfloat16, torch.int8, torch.float8_e4m3fn."""

    def __init__(self, model: Llama | GPT, blocks: BlockPool, dtype: torch.dtype | None = None) -> None:
        config, weight = model.config, model.norm.weight
        shape = (blocks.count, blocks.block_size, config.kv_heads, config.head_dim)
        self.blocks, self.model = blocks, model
        scaling = getattr(config, "rope_scaling", RopeScaling())
        self.original = scaling.original_length if scaling.kind == "dynamic" else 0  # tokens; 0: no dynamic scaling
        self.layers = [
            [pool(*shape, dtype or weight.dtype, weight.device) for _ in ("k", "v")] for _ in range(config.layers)
        ]
        self.why_not_native = unsupported(model, dtype)
        self.native = None
        if not self.why_not_native:
            self.native = NativeLlama(cast(Llama, model), self.layers, blocks.block_size)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for layer in self.layers for pair in layer for t in pair if t is not None)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies blocks, in every layer, from the first of a pair to the second, one pair after the other."""
        if not pairs:
            return
        tensors = [t for layer in self.layers for pair in layer for t in pair if t is not None]
        # A block that was copied, given back and taken again in one plan is a source and a destination.
        again = {source for source, _ in pairs} & {to for _, to in pairs}
        for together in [[pair] for pair in pairs] if again else [pairs]:
            kv_cache_copy_(tensors, torch.tensor(together, device=tensors[0].device))

    def answers(
        self, model: Llama | GPT, plan: Sequence[Work], asked: Sequence[Asked], adapters: Adapters | None = None
    ) -> list[list[int] | Tensor | None]:
        """One pass over the tokens of `plan`, each with the adapter of its sequence. For each work what was `asked` of
        its last tokens, the one before the first guess and the guesses: "tokens", the most likely next token after
        each; "logits" (1 + guesses, V); "states" (T, C), those of all its tokens after the last norm; or "nothing". A
        tensor is good until the next pass.

        One native call computes what has neither an adapter nor virtual tokens, if the model is packed for it
        (native.py); otherwise its modules do. So an answer does not depend on what is computed with it."""
        self.copy([pair for work in plan for pair in work.copies])
        native = [self.native is not None and model is self.model and work.ordinary for work in plan]
        found: list[list[int] | Tensor | None] = [None] * len(plan)
        for by_call in {*native}:
            mine = [i for i, which in enumerate(native) if which is by_call]
            if not by_call:  # those that attend together, and have one adapter, next to each other
                mine.sort(key=lambda i: (plan[i].count, plan[i].sequence.adapter or ""))
            works, wanted = [plan[i] for i in mine], [asked[i] for i in mine]
            if by_call and self.native:
                results = self.native.answers(works, wanted)
            else:
                results = self.by_modules(model, works, wanted, adapters)
            for i, one in zip(mine, results, strict=True):
                found[i] = one
        return found

    def by_modules(
        self, model: Llama | GPT, plan: Sequence[Work], asked: Sequence[Asked], adapters: Adapters | None
    ) -> list[list[int] | Tensor | None]:
        """`answers` by the model's own forward pass, after the blocks are copied."""
        state, ends = self.forward(model, plan, adapters)
        counts = [
            1 + len(work.sequence.guesses) if what in ("tokens", "logits") else 0
            for work, what in zip(plan, asked, strict=True)
        ]
        states = state.split([work.count for work in plan])
        rows = [at for end, count in zip(ends, counts, strict=True) for at in range(end + 1 - count, end + 1)]
        logits: Sequence[Tensor] = [state] * len(plan)
        if rows:
            hidden = state[rows]
            added = adapters.on_head(hidden, plan, counts) if adapters else None
            logits = head.logits(model, hidden, added).split(counts)  # one product: the weights are read once
        found: list[list[int] | Tensor | None] = []
        for what, one, own in zip(asked, logits, states, strict=True):
            found.append(
                one.argmax(-1).tolist() if what == "tokens"
                else one if what == "logits" else own if what == "states" else None
            )  # fmt: skip
        return found

    def forward(
        self, model: Llama | GPT, plan: Sequence[Work], adapters: Adapters | None = None
    ) -> tuple[Tensor, list[int]]:
        """One pass of the modules over the tokens of `plan`, whose blocks are copied and allotted: their states (N, C)
        after the last norm, in the order of the plan, and where the last token of each work is among them."""
        view = PagedStep(self, plan)
        tokens = torch.tensor([[token for work in plan for token in work.tokens]], device=view.positions.device)
        rows = adapters.rows(plan) if adapters else []
        with adapters.on(rows) if adapters and rows else nullcontext():
            state = model(tokens, positions=view.positions, cache=view, hidden=True, **view.replaced(model, tokens))
            return state[0], view.last


class PagedStep:
    """The cache of one forward pass (finetune/lm/forward.py). `positions` (1, N): those of the tokens, in the order of
    the plan; `last`: where the last token of each sequence is among them."""

    def __init__(self, cache: PagedCache, plan: Sequence[Work]) -> None:
        self.cache = cache
        device = cache.layers[0][0][0].device
        places = [(work, work.start + i) for work in plan for i in range(work.count)]
        self.positions = torch.tensor([[at for _, at in places]], device=device)
        self.slots = torch.tensor([cache.blocks.slot(w.sequence.table, at) for w, at in places], device=device)
        self.spans: Tensor | None = None  # (1, N), for dynamic rope scaling
        if cache.original:
            spans = [max(w.sequence.before + len(w.sequence.prompt), at + 1) for w, at in places]
            self.spans = torch.tensor([spans], device=device)
        # Of virtual tokens: where they are in the row, whose they are, and which of them.
        self.virtual: list[tuple[slice, Virtual, slice]] = []
        start = 0
        for work in plan:
            count = min(work.sequence.before - work.start, work.count)
            if work.sequence.virtual and count > 0:
                which = slice(work.start, work.start + count)
                self.virtual.append((slice(start, start + count), work.sequence.virtual, which))
            start += work.count
        self.last = [end - 1 for end in accumulate(work.count for work in plan)]
        self.lengths = torch.tensor([work.start for work in plan], device=device)  # tokens stored before this step
        self.direct: bool | None = None  # whether attention calls the native operators; None: not asked yet
        # Neighbors in the plan with equally many tokens attend in one call: all that decode, and each prompt's part.
        self.groups: list[tuple[slice, int, Tensor, Tensor]] = []  # tokens, sequences, table (b, blocks), lengths (b,)
        start = 0
        for count, group in groupby(plan, key=lambda work: work.count):
            members = list(group)
            tables = [work.sequence.table.blocks for work in members]
            width = max(map(len, tables))
            padded = [blocks + [0] * (width - len(blocks)) for blocks in tables]
            table = torch.tensor(padded, dtype=torch.int32, device=device)  # the kernels' dtype: no conversion a layer
            lengths = torch.tensor([work.start + work.count for work in members], dtype=torch.int32, device=device)
            self.groups.append((slice(start, start + count * len(members)), len(members), table, lengths))
            start += count * len(members)

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Tensor | None = None,
        *,
        scale: float | None = None,
        window: int = 0,
        softcap: float = 0.0,
    ) -> Tensor:
        """q (1, N, H, D), new k and v (1, N, Hkv, D) → (1, N, H, D). Stores k and v, then every token sees those of its
        own sequence up to itself. Keys and values of a prefix take the place of what was computed for its tokens. A
        cache of 16 bits takes queries of its own dtype."""
        for at, trained, which in self.virtual:
            if trained.kv is not None:
                k[0, at], v[0, at] = trained.kv[layer, :, which]
        (keys, key_scale), (values, value_scale) = self.cache.layers[layer]
        if key_scale is None and keys.dtype != q.dtype:
            seen16 = self.attend(
                layer, q.to(keys.dtype), k.to(keys.dtype), v.to(keys.dtype), scale=scale, window=window, softcap=softcap
            )
            return seen16.to(q.dtype)
        rules: dict[str, Any] = {"scale": scale or q.shape[3] ** -0.5, "window": window, "softcap": softcap}
        new = (k[0], v[0], keys, values, self.slots, key_scale, value_scale)
        given = [
            (q[0, tokens].view(sequences, -1, *q.shape[2:]), keys, values, table, ends, key_scale, value_scale)
            for tokens, sequences, table, ends in self.groups
        ]  # queries (b, Tq, H, D)
        if self.direct is None:
            self.direct = direct(new, given[0], rules)
        seen: list[Any]
        if self.direct:
            raw_pools = raw(keys), raw(values)
            torch.ops.finetune.kv_cache_.default(*new[:2], *raw_pools, *new[4:])
            call = torch.ops.finetune.paged_attention.default
            seen = [call(one[0], *raw_pools, *one[3:], *rules.values())[0] for one in given]
        else:
            kv_cache_append_(*new)
            seen = [ops.paged_attention(*one, **rules) for one in given]
        return seen[0].view(q.shape) if len(seen) == 1 else torch.cat([part.flatten(0, 1) for part in seen])[None]

    def replaced(self, model: Llama | GPT, tokens: Tensor) -> dict[str, Tensor]:
        """`embedded` (1, N, C) for the model, if trained vectors take the place of some tokens' embeddings."""
        prompts = [(at, part.embedded[which]) for at, part, which in self.virtual if part.embedded is not None]
        if not prompts or not isinstance(model, Llama):
            return {}
        x = model.embeddings(tokens)
        for at, vectors in prompts:
            x[0, at] = vectors
        return {"embedded": x}

    def advance(self, new: int, lengths: Tensor | None) -> None:
        """Nothing: the tables count their tokens."""


def direct(new: tuple[Any, ...], given: tuple[Any, ...], rules: dict[str, Any]) -> bool:
    """Whether the native kernels take these calls of a layer, and so those of all: the ops need not ask for each. To
    ask takes as long as a small model's attention."""
    return (
        _op.forced in (None, "cpp")
        and given[0].is_cpu
        and kv_cache.why_not("cpp", "append", *new) is None
        and ops.paged_attention.why_not("cpp", *given, **rules) is None
    )
