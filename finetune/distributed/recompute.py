"""Recomputation: what the backward pass needs is made again instead of kept (Chen et al. 2016, arXiv:1604.06174).

block        only each block's input is kept; its forward pass runs twice, with its collectives
selective    what is large and cheap is made again: outputs of norms and of the MLP's activation. Their inputs are kept
             anyway, by their own backward passes, and nothing is sent again. (Korthikanti et al. 2022,
             arXiv:2205.05198, so treat the attention core, of which the project's attention keeps no matrix.)
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from finetune.distributed.random import Streams

Recompute = Literal["none", "selective", "block"]


def again_in_backward(function: Callable[..., Tensor], streams: Streams) -> Callable[..., Tensor]:
    """The function, whose inner tensors are made again in the backward pass, with the same random numbers."""

    def run(*inputs: Any) -> Tensor:
        states = streams.states()
        return checkpoint(
            function, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), streams.again(states))
        )

    return run


class Recipe(NamedTuple):
    """What is kept in the place of a tensor."""

    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    shape: torch.Size


class Selective:
    """Context of forward passes of `blocks` in which autograd keeps recipes of outputs that are cheap to make again.

    dropped: bytes that the latest pass did not keep.
    """

    def __init__(self, blocks: nn.ModuleList) -> None:
        self.made: dict[int, tuple[Tensor, Recipe]] = {}  # by address, while their tensors live
        self.dropped = 0
        for block in blocks:
            each: Any = block
            for norm in (each.attn_norm, each.mlp_norm):
                norm.forward = self.remembered(norm.forward)
            each.mlp.activate = self.remembered(each.mlp.activate)
            each.register_forward_hook(lambda *_: self.made.clear())
        self.hooks: Any = None

    def remembered(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*inputs: Tensor) -> Tensor:
            y = function(*inputs)
            if self.hooks is not None and torch.is_grad_enabled():
                recipe = Recipe(function, tuple(x.detach() for x in inputs), y.shape)
                self.made[y.data_ptr()] = y, recipe
                self.dropped += y.nbytes
            return y

        return run

    def pack(self, x: Tensor) -> Tensor | Recipe:
        there = self.made.get(x.data_ptr())
        if there is None or (there[0].numel(), there[0].dtype) != (x.numel(), x.dtype) or not x.is_contiguous():
            return x
        return there[1]._replace(shape=x.shape)

    def unpack(self, kept: Tensor | Recipe) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            return kept.function(*kept.inputs).view(kept.shape)

    def __enter__(self) -> None:
        self.dropped = 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)
        self.hooks.__enter__()

    def __exit__(self, *details: Any) -> None:
        self.hooks.__exit__(*details)
        self.hooks = None
        self.made.clear()
