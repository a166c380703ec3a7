"""Sharded checkpoints: every rank writes what it alone has, and any other layout reads it.

One safetensors file a rank. Its header says of each tensor which part of the whole model's tensor it is: `ranges` along
`dim`, and with a distributed optimizer the elements start … stop of that part. A reader joins the parts of one whole
tensor at a time and cuts its own piece out of it, so that neither the ranks of the writer nor sizes that they do not
divide matter, and no rank holds the whole model.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from finetune.distributed import plan
from finetune.distributed.distributed_optimizer import ShardedAdamW
from finetune.distributed.model import ParallelModel, is_expert
from finetune.distributed.plan import Piece
from finetune.distributed.stage import skeleton
from finetune.errors import UserError
from finetune.lm.gpt import GPT
from finetune.lm.llama import Llama
from finetune.runs import checkpoint, reading

WEIGHT = "weight"


class Part(msgspec.Struct):
    """One tensor of a file: elements start … stop of the piece of the whole tensor `name`; kind: weight, or an
    optimizer state's name."""

    name: str
    kind: str
    shape: list[reading.Index]
    dim: int | None
    ranges: list[tuple[reading.Index, reading.Index]]
    start: reading.Index
    stop: reading.Index
    step: reading.Index = 0  # of AdamW

    @property
    def piece(self) -> Piece:
        return Piece(torch.Size(self.shape), self.dim, tuple(self.ranges))

    def fits(self) -> bool:
        """Whether the ranges lie within the shape, and the elements within the piece."""
        if self.dim is not None and not 0 <= self.dim < len(self.shape):
            return False
        inside = self.dim is None or all(a <= b <= self.shape[self.dim] for a, b in self.ranges)
        return inside and self.start <= self.stop <= self.piece.local.numel()


class Header(msgspec.Struct):
    world: reading.Count
    parts: list[Part]


def file_of(folder: Path, rank: int) -> Path:
    return folder / f"shard_{rank:05d}.safetensors"


# --- Writing


def save(model: ParallelModel, folder: Path, rank: int, world: int) -> str:
    """Writes this rank's file, whole or not at all; its SHA-256. Every rank must call it, with the folder there."""
    parts: list[Part] = []
    tensors: dict[str, Tensor] = {}
    for part, tensor in own_parts(model):
        tensors[str(len(parts))] = tensor.detach().cpu().contiguous().clone()
        parts.append(part)
    header = msgspec.json.encode(Header(world, parts)).decode()
    checkpoint.write_tensors(file_of(folder, rank), tensors, {"parts": header})
    return checkpoint.sha256(file_of(folder, rank))


def own_parts(model: ParallelModel) -> Iterator[tuple[Part, Tensor]]:
    """The weights and optimizer states that this rank writes: every one is written by exactly one rank."""
    pieces = {p: (name, piece) for name, p, piece in model.named()}
    mesh = model.mesh

    def first(name: str) -> bool:
        """Whether this rank is the first of those that have the parameter."""
        return (mesh.edp_cp if is_expert(name) else mesh.dp_cp).first

    def part(p: nn.Parameter, kind: str, start: int, stop: int, step: int = 0) -> Part:
        name, piece = pieces[p]
        return Part(name, kind, list(piece.shape), piece.dim, list(piece.ranges), start, stop, step)

    for p, (name, piece) in pieces.items():
        if first(name) and piece.counted:
            yield part(p, WEIGHT, 0, p.numel()), p
    if model.optimizer is None:
        return
    for p, start, stop, state in states(model):
        name, piece = pieces[p]
        if piece.counted and (first(name) or model.sharded):
            for kind, value in state.items():
                if isinstance(value, Tensor):
                    yield part(p, kind, start, stop, state["step"]), value.flatten()


def states(model: ParallelModel) -> Iterator[tuple[nn.Parameter, int, int, dict[str, Any]]]:
    """(parameter, its elements start … stop, AdamW's states of them) on this rank."""
    if isinstance(model.optimizer, ShardedAdamW):
        inner = model.optimizer.inner
        yield from ((s.parameter, s.start, s.stop, inner.state[s.own]) for s in model.optimizer.slices)
    elif model.optimizer is not None:
        yield from ((p, 0, p.numel(), model.optimizer.state[p]) for _, p, _ in model.named())


# --- Reading


class Reader:
    """The whole tensors of a sharded checkpoint, one at a time. UserError names what is missing or damaged."""

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.folder = Path(folder)
        files = sorted(self.folder.glob("shard_*.safetensors"))
        if not files:
            raise UserError(f"{folder} holds no shard_*.safetensors: it is no sharded checkpoint")
        self.found: dict[tuple[str, str], list[tuple[Any, str, Part]]] = {}
        worlds = set()
        for path in files:
            try:
                opened = safe_open(path, "pt")
                raw = (opened.metadata() or {}).get("parts", "")
                header = msgspec.json.decode(raw, type=Header)
            except (OSError, SafetensorError, msgspec.MsgspecError) as e:
                raise UserError(f"{path} is damaged or not of a sharded checkpoint: {e}") from None
            worlds.add(header.world)
            for key, part in enumerate(header.parts):
                self.found.setdefault((part.name, part.kind), []).append((opened, str(key), part))
        if worlds != {len(files)}:
            raise UserError(f"{folder} is incomplete: {len(files)} files, written by {sorted(worlds)} ranks")

    def kinds(self, name: str) -> list[str]:
        """The optimizer's states of a parameter."""
        return [kind for of, kind in self.found if of == name and kind != WEIGHT]

    def step(self, name: str, kind: str) -> int:
        return self.found[name, kind][0][2].step

    def tensor(self, name: str, kind: str = WEIGHT) -> Tensor:
        """The whole tensor, joined of its parts."""
        parts = self.found.get((name, kind))
        if not parts:
            raise UserError(f"{self.folder} holds no {kind} of {name}")
        shape = torch.Size(parts[0][2].shape)
        covered = sum(part.stop - part.start for _, _, part in parts)
        if covered != shape.numel() or any(part.shape != list(shape) or not part.fits() for _, _, part in parts):
            raise UserError(f"{self.folder}: {name} is incomplete, {covered} of {shape.numel()} elements are there")
        pieces: dict[tuple[Any, ...], tuple[Piece, Tensor]] = {}
        for opened, key, part in parts:
            values, piece = opened.get_tensor(key).flatten(), part.piece
            if len(values) != part.stop - part.start:
                raise UserError(f"{self.folder}: a part of {name} has {len(values)} elements, not those that it names")
            _, flat = pieces.setdefault((piece.dim, *piece.ranges), (piece, values.new_empty(piece.local.numel())))
            flat[part.start : part.stop] = values
        whole = torch.empty(shape, dtype=values.dtype)
        for piece, flat in pieces.values():
            piece.put(whole, flat.view(piece.local))
        return whole


def load(model: ParallelModel, folder: Path, optimizer: bool = True) -> None:
    """Weights, and with `optimizer` AdamW's states, of a checkpoint of any layout."""
    reader = Reader(folder)
    model.load(reader.tensor)
    if not optimizer or model.optimizer is None:
        return
    names = {p: (name, piece) for name, p, piece in model.named()}
    for p, start, stop, state in states(model):
        name, piece = names[p]
        state.clear()
        for kind in reader.kinds(name):
            local = piece.cut(reader.tensor(name, kind)).contiguous()
            state[kind] = (local.flatten()[start:stop] if model.sharded else local).clone()
            state["step"] = reader.step(name, kind)


def whole_model(folder: Path, config: plan.Config) -> GPT | Llama:
    """The project's model with a checkpoint's weights, in this process."""
    reader = Reader(folder)
    model = skeleton(config)
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        tensor = reader.tensor(name)
        if tensor.shape != parameter.shape:
            raise UserError(f"{folder}: {name} has the shape {list(tensor.shape)}, not {list(parameter.shape)}")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor))
    return model
