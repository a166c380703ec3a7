"""Tensor parallelism (Shoeybi et al. 2019, arXiv:1909.08053): one layer on several ranks, and the conjugate functions
that join its parts.

    a region        y = x → f → column-parallel layers → row-parallel layer → g
    f, g            identity / all-reduce:      forward nothing, all-reduce    backward all-reduce, nothing
    f̄, ḡ            along the sequence:         forward all-gather, reduce-scatter    backward the other way around

With sequence parallelism (Korthikanti et al. 2022, arXiv:2205.05198) the activations between two regions are split
along the sequence: f̄ and ḡ replace f and g. An all-reduce is a reduce-scatter and an all-gather, so as many bytes are
sent.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.distributed.collectives import MAX, Group
from finetune.distributed.mesh import share
from finetune.errors import UserError

SEQUENCE = 1  # the dimension of (B, T, C) that sequence parallelism splits
IGNORED = -100


# --- The conjugate functions


class _Enter(torch.autograd.Function):
    """f: every rank uses x whole, so its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.group.all_reduce(dy.contiguous().clone()), None


class _Leave(torch.autograd.Function):
    """g: the sum of the ranks' partial x; each partial sum gets the gradient of the whole."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return group.all_reduce(x.contiguous().clone())

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return dy, None


class _Gather(torch.autograd.Function):
    """f̄: the ranks' parts joined along `dim`; every rank uses the whole."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return group.all_gather(x, dim)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.group.reduce_scatter(dy, ctx.dim), None, None


class _Scatter(torch.autograd.Function):
    """ḡ: this rank's part along `dim` of the sum of the ranks' partial x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return group.reduce_scatter(x, dim)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.group.all_gather(dy, ctx.dim), None, None


class _Join(torch.autograd.Function):
    """The ranks' columns joined, of widths that may differ; each rank keeps the gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, widths: list[int]) -> Tensor:
        ctx.start, ctx.width = sum(widths[: group.rank]), x.shape[-1]
        padded = F.pad(x, (0, max(widths) - x.shape[-1]))
        parts = group.all_gather(padded[None])  # (ranks, …, widest)
        return torch.cat([part[..., :width] for part, width in zip(parts, widths, strict=True)], -1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return dy[..., ctx.start : ctx.start + ctx.width].contiguous(), None, None


def enter(x: Tensor, group: Group, sequence: bool = False) -> Tensor:
    """f, or with `sequence` f̄: the input (B, T or T/ranks, C) of a region → (B, T, C) on every rank."""
    if group.size == 1:
        return x
    return _Gather.apply(x, group, SEQUENCE) if sequence else _Enter.apply(x, group)


def leave(x: Tensor, group: Group, sequence: bool = False) -> Tensor:
    """g, or with `sequence` ḡ: partial sums (B, T, C) → their sum (B, T or T/ranks, C)."""
    if group.size == 1:
        return x
    return _Scatter.apply(x, group, SEQUENCE) if sequence else _Leave.apply(x, group)


def own_part(x: Tensor, group: Group, dim: int = SEQUENCE) -> Tensor:
    """This rank's equal part of x along `dim`. UserError if the ranks do not divide it."""
    if x.shape[dim] % group.size:
        raise UserError(
            f"sequence parallelism: tp {group.size} does not divide {x.shape[dim]} tokens; choose a length that it does"
        )
    return x.chunk(group.size, dim)[group.rank]


# --- Layers


class ColumnParallel(nn.Module):
    """A linear layer whose outputs are shared out: y_r = x W_rᵀ + b_r. weight (own outputs, in), bias (own outputs,).

    enters: x goes through f here; not where a region's layers share one f. joined: y is gathered on all ranks.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        group: Group,
        *,
        enters: bool = True,
        sequence: bool = False,
        joined: bool = False,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.group, self.enters, self.sequence, self.joined = group, enters, sequence, joined

    def forward(self, x: Tensor) -> Tensor:
        x = enter(x, self.group, self.sequence) if self.enters else x
        y = F.linear(x, self.weight, self.bias)
        if not self.joined or self.group.size == 1:
            return y
        widths = self.group.all_gather(torch.tensor([y.shape[-1]], device=y.device)).tolist()
        return _Join.apply(y, self.group, widths)


class RowParallel(nn.Module):
    """A linear layer whose inputs are shared out: y = Σ_r x_r W_rᵀ + b. weight (out, own inputs); the bias is whole on
    every rank and added once, after g."""

    def __init__(self, weight: Tensor, bias: Tensor | None, group: Group, *, sequence: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.group, self.sequence = group, sequence

    def forward(self, x: Tensor) -> Tensor:
        y = leave(F.linear(x, self.weight), self.group, self.sequence)
        return y if self.bias is None else y + self.bias


class VocabularyParallel(nn.Module):
    """An embedding table whose rows are shared out: a rank looks up its own tokens, gives 0 for the others, and g sums.
    weight (own rows, C); `start` is the first own token."""

    def __init__(self, weight: Tensor, start: int, group: Group, *, sequence: bool = False) -> None:
        super().__init__()
        self.weight, self.start = nn.Parameter(weight), start
        self.group, self.sequence = group, sequence

    def forward(self, tokens: Tensor) -> Tensor:
        if self.group.size == 1:
            return F.embedding(tokens, self.weight)
        own = (tokens >= self.start) & (tokens < self.start + len(self.weight))
        x = F.embedding(torch.where(own, tokens - self.start, 0), self.weight)  # (B, T, C)
        return leave(x.masked_fill(~own[..., None], 0), self.group, self.sequence)


class SplitPositions(nn.Module):
    """A table of position embeddings, whole on every rank, of which each looks up its own part of the sequence."""

    def __init__(self, weight: Tensor, group: Group) -> None:
        super().__init__()
        self.weight, self.group = nn.Parameter(weight), group

    def forward(self, positions: Tensor) -> Tensor:
        return F.embedding(own_part(positions, self.group), self.weight)


# --- Loss


class _CrossEntropy(torch.autograd.Function):
    """Three all-reduces of (N,): the largest logit, the sum of exponentials, the target's logit. No rank ever has the
    logits of the whole vocabulary."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, start: int, group: Group) -> Tensor:
        n, width = logits.shape
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        top = wide.amax(-1) if width else wide.new_full((n,), -torch.inf)
        group.all_reduce(top, MAX)
        p = (wide - top[:, None]).exp_()
        total = group.all_reduce(p.sum(-1))
        own = (targets >= start) & (targets < start + width)
        local = torch.where(own, targets - start, 0)
        picked = wide.gather(1, local[:, None])[:, 0] - top if width else torch.zeros_like(top)
        picked = group.all_reduce(picked.masked_fill(~own, 0))
        counted = targets != IGNORED
        p.div_(total[:, None]).masked_fill_(~counted[:, None], 0)
        ctx.save_for_backward(p, local, own)
        ctx.dtype = logits.dtype
        return (total.log() - picked).masked_fill(~counted, 0)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        p, local, own = ctx.saved_tensors
        grad = p.clone()
        if grad.shape[1]:
            grad.scatter_add_(1, local[:, None], -own[:, None].to(grad.dtype))
        return (grad * dloss[:, None]).to(ctx.dtype), None, None, None


def vocabulary_parallel_cross_entropy(logits: Tensor, targets: Tensor, start: int, group: Group) -> Tensor:
    """Loss (N,) in nats, fp32 or wider, of targets (N,) in the whole vocabulary or −100 (ignored: loss and gradient 0).

    logits (N, own columns) are of the tokens start, start + 1, …; the same loss on every rank (Shoeybi et al., §3).
    """
    return _CrossEntropy.apply(logits, targets, start, group)


def head_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, start: int, group: Group, softcap: float = 0.0
) -> Tensor:
    """Cross entropy (N,) of hidden (N, C), which every rank has whole and which has passed f, and own rows of the
    output projection. softcap c > 0: logits l are c · tanh(l / c), in fp32."""
    logits = F.linear(hidden, weight)
    if softcap:
        logits = softcap * (logits.float() / softcap).tanh()
    return vocabulary_parallel_cross_entropy(logits, targets, start, group)


def split(linear: nn.Linear, group: Group, kind: str, **options: Any) -> ColumnParallel | RowParallel:
    """A whole linear layer as this rank's part of it; kind: column or row."""
    dim = 0 if kind == "column" else 1
    start, stop = share(linear.weight.shape[dim], group.size, group.rank)
    weight = linear.weight.detach().narrow(dim, start, stop - start).clone()
    bias = None if linear.bias is None else linear.bias.detach().clone()
    if kind == "row":
        return RowParallel(weight, bias, group, **options)
    return ColumnParallel(weight, None if bias is None else bias[start:stop].clone(), group, **options)
