"""AdamW whose states are shared out over the data-parallel ranks (Rajbhandari et al. 2020, arXiv:1910.02054, stage 1;
Megatron-LM's distributed optimizer).

Gradients are reduce-scattered, each rank updates its shard of every bucket, and the new parameters are all-gathered: as
many bytes as one all-reduce, 1/ranks of the optimizer's memory. Shards are cut by size, not by parameter, so a rank
owns parts of parameters: each is a `Slice`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from finetune import optim
from finetune.distributed.data_parallel import Bucket, Buckets


class Slice(NamedTuple):
    """Elements start … stop of a flattened parameter, updated by this rank; `own` is a view of them."""

    parameter: nn.Parameter
    start: int
    stop: int
    own: nn.Parameter


class ShardedAdamW:
    """AdamW over the shards of `buckets` (made with scattered=True); settings as for optim.AdamW.

    Moves every parameter into one flat tensor a bucket, of which it is a view from then on.
    """

    def __init__(self, buckets: list[Buckets], weight_decay: float = 0.01, **settings: object) -> None:
        self.slices: list[Slice] = []
        self.flats: list[tuple[Bucket, Tensor]] = []
        for each in buckets:
            for bucket in each.buckets:
                self.flats.append((bucket, self.flatten(bucket)))
        decayed = [s.own for s in self.slices if s.parameter.dim() >= 2]
        spared = [s.own for s in self.slices if s.parameter.dim() < 2]
        groups = [
            {"params": params, "weight_decay": decay}
            for params, decay in ((decayed, weight_decay), (spared, 0.0))
            if params
        ]
        # A rank whose shard lies in the padding has nothing to update.
        self.inner = optim.AdamW(groups or [{"params": [nn.Parameter(torch.zeros(0))]}], **settings)  # type: ignore[arg-type]

    @torch.no_grad()
    def flatten(self, bucket: Bucket) -> Tensor:
        """The parameters of a bucket as views of one flat tensor, and this rank's slices of them."""
        flat = torch.zeros_like(bucket.flat)
        width = len(bucket.shard)
        first = bucket.group.rank * width
        for p, at in zip(bucket.parameters, bucket.offsets, strict=True):
            view = flat[at : at + p.numel()]
            view.copy_(p.flatten())
            p.data = view.view_as(p)
            start, stop = max(at, first), min(at + p.numel(), first + width)
            if start < stop:
                own = nn.Parameter(flat[start:stop])
                own.grad = bucket.flat[start:stop]
                self.slices.append(Slice(p, start - at, stop - at, own))
        return flat

    @torch.no_grad()
    def step(self, *, lr: float, grad_scale: float | Tensor = 1.0) -> None:
        """Updates the own shards, then gathers everyone's."""
        self.inner.step(lr=lr, grad_scale=grad_scale)
        for bucket, flat in self.flats:
            shard = flat.chunk(bucket.group.size)[bucket.group.rank]
            flat.copy_(bucket.group.all_gather(shard.clone()))
