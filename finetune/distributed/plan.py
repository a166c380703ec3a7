"""Plans: which layers of the project's own models are split how. A model's code stays one; a plan names its layers.

A parameter of a rank is a *piece* of the whole model's parameter of the same name. Units (heads, hidden units, tokens)
are shared out as evenly as they go: 6 heads over 4 ranks are 2, 2, 1, 1. Nothing is padded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from finetune.distributed.mesh import share
from finetune.errors import UserError
from finetune.lm.gpt import GPTConfig
from finetune.lm.llama import LlamaConfig

Config = GPTConfig | LlamaConfig


@dataclass(frozen=True)
class Form:
    """How a layer is split. unit: what is shared out along its outputs (column) or inputs (row)."""

    kind: Literal["column", "row", "vocabulary"]
    unit: Literal["queries", "keys", "hidden", "tokens"]
    repeats: int = 1  # GPT-2's qkv: three matrices in one


# Layer names, `*` for a block's number. Layers that are not named are whole on every rank.
GPT_PLAN = {
    "embed": Form("vocabulary", "tokens"),
    "blocks.*.attn.qkv": Form("column", "queries", repeats=3),
    "blocks.*.attn.o": Form("row", "queries"),
    "blocks.*.mlp.up": Form("column", "hidden"),
    "blocks.*.mlp.down": Form("row", "hidden"),
}
LLAMA_PLAN = {
    "embed": Form("vocabulary", "tokens"),
    "head": Form("vocabulary", "tokens"),
    "blocks.*.attn.q": Form("column", "queries"),
    "blocks.*.attn.k": Form("column", "keys"),
    "blocks.*.attn.v": Form("column", "keys"),
    "blocks.*.attn.o": Form("row", "queries"),
    "blocks.*.mlp.gate": Form("column", "hidden"),
    "blocks.*.mlp.up": Form("column", "hidden"),
    "blocks.*.mlp.down": Form("row", "hidden"),
}
# Regions: f at the entry, g in their row-parallel layer.
REGIONS = ("attn", "mlp")


def plan_of(config: Config) -> dict[str, Form]:
    return GPT_PLAN if isinstance(config, GPTConfig) else LLAMA_PLAN


def form(config: Config, layer: str) -> Form | None:
    """The form of a layer by its whole name, such as blocks.3.mlp.up; None: it is whole on every rank."""
    return plan_of(config).get(re.sub(r"^blocks\.\d+\.", "blocks.*.", layer))


def units(config: Config, unit: str) -> tuple[int, int]:
    """(how many, rows each): heads that share a key–value head stay together."""
    if unit == "tokens":
        return config.vocab_size, 1
    if unit == "hidden":
        return config.hidden, 1
    group = config.heads // config.kv_heads if unit == "queries" else 1
    return config.kv_heads, group * config.head_dim


@dataclass(frozen=True)
class Piece:
    """The part of a whole tensor that a rank has: `ranges` (start, stop) along `dim`, one after another; no dim: all.

    counted: this rank is the one that counts it in a norm. partial: its gradient is this rank's share of a sum.
    """

    shape: torch.Size  # of the whole tensor
    dim: int | None = None
    ranges: tuple[tuple[int, int], ...] = ()
    counted: bool = True
    partial: bool = False

    def cut(self, whole: Tensor) -> Tensor:
        """The piece of a whole tensor."""
        if self.dim is None:
            return whole
        return torch.cat([whole.narrow(self.dim, start, stop - start) for start, stop in self.ranges], self.dim)

    def put(self, whole: Tensor, piece: Tensor) -> None:
        """Writes the piece into the whole tensor."""
        if self.dim is None:
            whole.copy_(piece)
            return
        at = 0
        for start, stop in self.ranges:
            whole.narrow(self.dim, start, stop - start).copy_(piece.narrow(self.dim, at, stop - start))
            at += stop - start

    @property
    def local(self) -> torch.Size:
        """The shape of the piece."""
        if self.dim is None:
            return self.shape
        shape = list(self.shape)
        shape[self.dim] = sum(stop - start for start, stop in self.ranges)
        return torch.Size(shape)


def piece(config: Config, name: str, shape: torch.Size, tp: int, rank: int, sequence: bool = False) -> Piece:
    """The piece of parameter `name` (of `shape` in the whole model) on tensor-parallel rank `rank` of `tp`."""
    layer, _, kind = name.rpartition(".")
    how = form(config, layer)
    if how is None or (how.kind == "row" and kind == "bias"):
        # It is applied to this rank's part of the sequence only, or, the norms of queries and keys, to its heads only.
        own_heads = layer.endswith((".q_norm", ".k_norm"))
        partial = tp > 1 and (sequence or own_heads)
        return Piece(shape, counted=rank == 0, partial=partial)
    count, rows = units(config, how.unit)
    start, stop = share(count, tp, rank)
    dim = 1 if how.kind == "row" else 0
    whole = count * rows
    ranges = tuple((i * whole + start * rows, i * whole + stop * rows) for i in range(how.repeats))
    return Piece(shape, dim, ranges)


def check(config: Config, tp: int, stages: int, cp: int, length: int, sequence: bool) -> None:
    """UserError names the first size that cannot be split so. stages: pipeline stages times chunks of each."""
    for unit, what in (("keys", "key–value heads"), ("hidden", "hidden units"), ("tokens", "tokens")):
        count, _ = units(config, unit)
        if count < tp:
            raise UserError(f"tp {tp} is too large: there are {count} {what} to share out, each rank needs one")
    if stages > config.layers:
        raise UserError(f"{stages} pipeline stages are too many: the model has {config.layers} layers")
    if cp > 1 and length % (2 * cp):
        raise UserError(f"cp {cp} needs a length that {2 * cp} divides, not {length}: a rank has two parts of it")
    if sequence and (length // cp) % tp:
        raise UserError(f"sequence parallelism needs a length that tp {tp} · cp {cp} divides, not {length}")
    if cp > 1 and isinstance(config, LlamaConfig) and config.window_layers:
        raise UserError("cp: layers with a window are not supported by ring attention; use cp 1")
    if cp > 1 and isinstance(config, LlamaConfig) and config.rope_scaling.kind == "dynamic":
        raise UserError("cp: dynamic rope scaling is not supported by ring attention; use cp 1")
