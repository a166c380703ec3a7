"""Data parallelism: gradients in buckets, each summed over the ranks as soon as its last gradient is there, while the
backward pass goes on (Li et al. 2020, arXiv:2006.15704, §3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from finetune.distributed.collectives import Group, Pending

BUCKET = 1 << 22  # bytes; a parameter larger than this has a bucket for itself


class Bucket:
    """Parameters whose gradients lie one after another in `flat`, which is padded to a multiple of the ranks."""

    def __init__(self, parameters: Sequence[nn.Parameter], group: Group) -> None:
        self.parameters, self.group = list(parameters), group
        first = self.parameters[0]
        size = sum(p.numel() for p in self.parameters)
        self.flat = torch.zeros(-(-size // group.size) * group.size, dtype=first.dtype, device=first.device)
        self.offsets: list[int] = []
        at = 0
        for p in self.parameters:
            self.offsets.append(at)
            p.grad = self.flat[at : at + p.numel()].view_as(p)  # autograd adds to a gradient that is there in place
            at += p.numel()
        self.shard = self.flat.chunk(group.size)[group.rank]  # what this rank owns with a distributed optimizer
        self.waiting: dict[nn.Parameter, int] = {}
        self.pending: Pending | None = None

    def begin(self, passes: int) -> None:
        self.flat.zero_()
        self.waiting = dict.fromkeys(self.parameters, passes)

    def start(self, scattered: bool) -> None:
        if scattered:
            self.scattered = torch.empty_like(self.shard)
            self.pending = self.group.start_reduce_scatter(self.scattered, self.flat)
        else:
            self.pending = self.group.start_all_reduce(self.flat)

    def finish(self, scattered: bool) -> None:
        if self.pending is not None:
            self.pending.wait()
            self.pending = None
        if scattered:
            self.shard.copy_(self.scattered)


class Buckets:
    """The gradients of `parameters` (in the order of the forward pass), summed over `group`.

        buckets.begin(passes)       gradients 0; `passes` backward passes will come
        loss.backward() …           a bucket's sum starts with the last gradient of its last pass
        buckets.finish()            what has not started is started, and all are waited for

    Buckets start in one order on all ranks, the last parameters' first. A parameter without a gradient counts as 0.
    overlapped: else no sum starts before `finish`, for gradients that are not complete before then.
    scattered: each rank gets the sum of its own shard only (`Bucket.shard`), for a distributed optimizer.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        group: Group,
        *,
        size: int = BUCKET,
        overlapped: bool = True,
        scattered: bool = False,
    ) -> None:
        self.scattered = scattered
        self.buckets: list[Bucket] = []
        self.of: dict[nn.Parameter, Bucket] = {}
        full: list[nn.Parameter] = []
        for p in reversed(parameters):
            if full and (sum(q.nbytes for q in full) + p.nbytes > size or p.dtype != full[0].dtype):
                self.buckets.append(Bucket(full, group))
                full = []
            full.append(p)
        if full:
            self.buckets.append(Bucket(full, group))
        for bucket in self.buckets:
            self.of |= dict.fromkeys(bucket.parameters, bucket)
        self.started = len(self.buckets)
        self.early = 0  # of the latest step: buckets that started before `finish`
        for p in parameters if overlapped else ():
            p.register_post_accumulate_grad_hook(self.arrived)

    def begin(self, passes: int) -> None:
        self.started = 0
        for bucket in self.buckets:
            bucket.begin(passes)

    def arrived(self, p: Any) -> None:
        waiting = self.of[p].waiting
        if waiting:
            waiting[p] -= 1
            if waiting[p] == 0:
                del waiting[p]
                self.start_complete()

    def start_complete(self) -> None:
        while self.started < len(self.buckets) and not self.buckets[self.started].waiting:
            self.buckets[self.started].start(self.scattered)
            self.started += 1

    def finish(self) -> None:
        self.early = self.started
        for bucket in self.buckets[self.started :]:
            bucket.waiting.clear()
            bucket.start(self.scattered)
        self.started = len(self.buckets)
        for bucket in self.buckets:
            bucket.finish(self.scattered)

    def gradients(self) -> list[Tensor]:
        """The flat tensors that hold all gradients, or this rank's shards of them."""
        return [bucket.shard if self.scattered else bucket.flat for bucket in self.buckets]
