"""Context parallelism: a row's tokens on several ranks, attention by passing keys and values around a ring
(Liu et al. 2023, arXiv:2310.01889), on the attention op's own statistics.

The op gives for each query and head the output o of the keys it saw, the largest score `top` and
`total` = Σ 2^(s − top), with scores s = scale · log₂(e) · q·k. Two results over different keys are one
over all of them:

    top = max(top₁, top₂),   w_i = total_i 2^(top_i − top),   o = (w₁ o₁ + w₂ o₂) / (w₁ + w₂),   total = w₁ + w₂

and the op's backward pass, given the o, top and total of *all* keys, gives one block's exact share of the gradients.

Causality would leave the first rank idle, so a row is cut into 2n parts and rank i has parts i and 2n − 1 − i (as in
Llama 3, arXiv:2407.21783, §3.3.2): every rank has the same work in every round.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from finetune.distributed.collectives import Group
from finetune.errors import UserError
from finetune.ops._backends import NATIVE_PROBLEM


def tokens_of(length: int, size: int, rank: int) -> Tensor:
    """(length/size,) int64: the places of the row that a rank has; UserError if 2 · size does not divide the length."""
    if size == 1:
        return torch.arange(length)
    if length % (2 * size):
        raise UserError(f"cp {size} needs a length that {2 * size} divides, not {length}")
    parts = torch.arange(length).chunk(2 * size)
    return torch.cat([parts[rank], parts[2 * size - 1 - rank]])


Statistics = tuple[Tensor, Tensor, Tensor]  # o (B, T, H, D), top and total (B, H, T)


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, softcap: float) -> Statistics:
    """Attention over the keys that are here, with its statistics. UserError without the native library."""
    if NATIVE_PROBLEM:
        raise UserError(f"ring attention needs the attention kernel's statistics: {NATIVE_PROBLEM}")
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.finetune.attention(q, k, v, causal, scale, None, None, 0, softcap)


def merge(a: Statistics, b: Statistics) -> Statistics:
    """The statistics over the keys of both; o in fp32 or wider."""
    (o1, top1, total1), (o2, top2, total2) = a, b
    top = torch.maximum(top1, top2)
    w1, w2 = total1 * (top1 - top).exp2(), total2 * (top2 - top).exp2()
    total = w1 + w2
    share = ((w / total).transpose(1, 2)[..., None] for w in (w1, w2))  # (B, T, H, 1)
    return next(share) * o1 + next(share) * o2, top, total


def rounds(size: int, rank: int) -> list[tuple[int, slice, slice, bool]]:
    """(whose keys, which halves of the own queries, which halves of those keys, causal) of each round of the ring."""
    both, first, second = slice(0, 2), slice(0, 1), slice(1, 2)
    plan = []
    for step in range(size):
        other = (rank - step) % size
        if other == rank:
            plan.append((other, both, both, True))
        elif other < rank:  # their first part lies before both of ours, their second behind both
            plan.append((other, both, first, False))
        else:  # our second part lies behind both of theirs, our first before both
            plan.append((other, second, both, False))
    return plan


def part(x: Tensor, halves: slice, dim: int = 1) -> Tensor:
    """The first half, the second half or all of x along `dim`."""
    half = x.shape[dim] // 2
    start, stop = halves.start * half, halves.stop * half
    return x.narrow(dim, start, stop - start)


def passed_on(x: Tensor, group: Group, tag: int) -> Tensor:
    """What the rank before sends while x goes to the next one."""
    incoming = torch.empty_like(x)
    outgoing = group.send(x, (group.rank + 1) % group.size, tag)
    group.receive(incoming, (group.rank - 1) % group.size, tag)
    outgoing.wait()
    return incoming


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float, group: Group) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        o = torch.zeros(q.shape, dtype=wide, device=q.device)
        top = torch.full((q.shape[0], q.shape[2], q.shape[1]), -math.inf, device=q.device)
        total = torch.zeros_like(top)
        pairs = torch.stack((k, v))  # (2, B, T, Hkv, D)
        for step, (_, queries, keys, causal) in enumerate(rounds(group.size, group.rank)):
            their_k, their_v = part(pairs, keys, 2).unbind(0)
            found = attend(part(q, queries), their_k, their_v, causal, scale, softcap)
            if step == 0:
                o, (top, total) = found[0].to(wide), found[1:]
            else:
                before = part(o, queries), part(top, queries, 2), part(total, queries, 2)
                for whole, new, dim in zip((o, top, total), merge(before, found), (1, 2, 2), strict=True):
                    part(whole, queries, dim).copy_(new)
            if step + 1 < group.size:
                pairs = passed_on(pairs, group, step)
        o = o.to(q.dtype)
        ctx.save_for_backward(q, k, v, o, top, total)
        ctx.group, ctx.scale, ctx.softcap = group, scale, softcap
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, o, top, total = ctx.saved_tensors
        group = ctx.group
        wide = torch.promote_types(q.dtype, torch.float32)
        dq = torch.zeros(q.shape, dtype=wide, device=q.device)
        pairs = torch.stack((k, v))
        grads = torch.zeros(pairs.shape, dtype=wide, device=q.device)  # of the pairs that are here
        for step, (_, queries, keys, causal) in enumerate(rounds(group.size, group.rank)):
            own = [part(x, queries).contiguous() for x in (do, q)]
            theirs = part(pairs, keys, 2).unbind(0)
            statistics = part(o, queries).contiguous(), *(part(x, queries, 2).contiguous() for x in (top, total))
            options = causal, ctx.scale, None, None, 0, ctx.softcap
            found = torch.ops.finetune.attention_backward(*own, *theirs, *statistics, *options)
            part(dq, queries).add_(found[0])
            part(grads, keys, 2).add_(torch.stack(found[1:]))
            if step + 1 < group.size:
                pairs = passed_on(pairs, group, 2 * step)
            grads = passed_on(grads, group, 2 * step + 1)  # after the last round they are back where they belong
        dk, dv = grads.to(q.dtype).unbind(0)
        return dq.to(q.dtype), dk, dv, None, None, None


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, group: Group, *, scale: float | None = None, softcap: float = 0.0
) -> Tensor:
    """Causal attention (B, T, H, D) of the own queries over the keys of all ranks; T is the rank's share of the row,
    the places `tokens_of`. Gradients for q, k and v. k and v are sent n − 1 times, in the backward pass again with
    their gradients, which are sent n times."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return _Ring.apply(q, k, v, scale, softcap, group)


class RingCache:
    """What a model asks for attention where there is a cache: here the cache is the other ranks' keys and values."""

    stateless = True  # a block may run twice

    def __init__(self, group: Group) -> None:
        self.group = group
        self.lengths = torch.zeros(1, dtype=torch.int64)
        self.spans = None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, **rules: Any) -> Tensor:
        if lengths is not None or rules.get("window"):
            raise UserError("ring attention: padded rows and windows are not supported; use cp 1")
        return ring_attention(q, k, v, self.group, scale=rules.get("scale"), softcap=rules.get("softcap", 0.0))

    def advance(self, new: int, lengths: Tensor | None) -> None:
        """Nothing is stored."""
