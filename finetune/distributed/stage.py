"""A rank's part of a model: some blocks of the project's GPT or Llama, their layers replaced by parallel ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from finetune.distributed import plan, tensor_parallel
from finetune.distributed.context_parallel import RingCache
from finetune.distributed.experts import Mixture, MixtureSettings
from finetune.distributed.mesh import Mesh, share
from finetune.distributed.plan import Piece
from finetune.distributed.random import Streams
from finetune.distributed.recompute import Recompute, Selective, again_in_backward
from finetune.errors import UserError
from finetune.lm import head
from finetune.lm.forward import check_tokens
from finetune.lm.gpt import GPT, GPTConfig
from finetune.lm.layers import init_parameter
from finetune.lm.llama import Llama
from finetune.runs.run import stable_hash

Source = Callable[[str], Tensor]  # the whole parameter of a name in the whole model
RESIDUAL = ("attn.o", "mlp.down")  # layers that write into the residual stream


class Named(NamedTuple):
    """A parameter of this rank, and the piece of the whole model's parameter `name` that it is."""

    name: str
    parameter: nn.Parameter
    piece: Piece


def skeleton(config: plan.Config) -> GPT | Llama:
    """The whole model without memory for its weights."""
    with torch.device("meta"):
        return GPT(config) if isinstance(config, GPTConfig) else Llama(config)


def shapes(config: plan.Config) -> dict[str, torch.Size]:
    """The shapes of the whole model's parameters, by name."""
    key = repr(config)
    if key not in _shapes:
        _shapes[key] = {name: p.shape for name, p in skeleton(config).named_parameters()}
    return _shapes[key]


_shapes: dict[str, dict[str, torch.Size]] = {}


def initial(config: plan.Config, seed: int, experts: int = 0) -> Source:
    """GPT-2's initial weights, each drawn by (seed, its name): the same in every layout, and no rank needs more than
    one whole parameter at a time."""
    norm = 1.0 - getattr(config, "norm_plus_one", False)

    def draw(name: str) -> Tensor:
        if ".router." in name:
            whole = torch.empty(experts, config.dim)
        else:
            whole = torch.full(shapes(config)[re.sub(r"\.experts\.\d+\.", ".", name)], norm)
        generator = torch.Generator().manual_seed(stable_hash(seed, name))
        init_parameter(name, whole, config.layers, RESIDUAL, generator)
        return whole

    return draw


class Stage(nn.Module):
    """Blocks `layers` (start, stop) of a model, with the embedding if first and the loss if last, on this rank of tp.

    model is the project's GPT or Llama, which runs as it is: a stage that is not first is given what it would have
    embedded, and the layers named by the plan are replaced by parallel ones of the same parameter names.
    dropout: share of the elements of every region's output that are dropped where gradients are wanted.
    """

    def __init__(
        self,
        config: plan.Config,
        mesh: Mesh,
        layers: tuple[int, int],
        first: bool,
        last: bool,
        *,
        sequence: bool = False,
        dropout: float = 0.0,
        recompute: Recompute = "none",
        streams: Streams | None = None,
        mixture: MixtureSettings | None = None,
    ) -> None:
        super().__init__()
        self.config, self.mesh, self.first, self.last = config, mesh, first, last
        self.sequence = sequence and mesh.tp.size > 1
        self.offset = layers[0]
        self.blocks = f"{layers[0]}–{layers[1] - 1}"  # for people
        model = skeleton(config)
        self.tied = model.head_weight is model.embed.weight
        model.blocks = nn.ModuleList(list(model.blocks)[slice(*layers)])
        if mixture is not None:
            for block in model.blocks:
                whole: Any = block
                with torch.device("meta"):
                    kind: Any = type(whole.mlp)
                    whole.mlp = Mixture(config.dim, partial(kind, config), mixture, mesh)
        unused: Any = nn.Identity()
        if not (first or (last and self.tied)):
            model.embed = unused
        if not first and isinstance(model, GPT):
            model.positions = unused
        if not last:
            model.norm = unused
            if not self.tied:
                model.head = unused
        self.pieces: dict[str, Piece] = {}  # by the name within `model`
        for name, parameter in model.named_parameters():
            whole = self.whole_name(name)
            tp = mesh.tp
            self.pieces[name] = plan.piece(config, whole, parameter.shape, tp.size, tp.rank, self.sequence)
        if mesh.tp.size > 1:
            self.split_layers(model)
        self.model = model
        for name in list(self.pieces):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(torch.empty(self.pieces[name].local)))
        self.streams, self.dropout = streams or Streams(mesh.layout, mesh.rank, 0), dropout
        if dropout:
            for block in model.blocks:
                for region in plan.REGIONS:
                    getattr(block, region).register_forward_hook(self.drop)
        self.selective = Selective(model.blocks) if recompute == "selective" else nullcontext()
        for block in model.blocks if recompute == "block" else ():
            block.forward = again_in_backward(block.forward, self.streams)

    def whole_name(self, name: str) -> str:
        """The name in the whole model: blocks are numbered from this stage's first one here."""
        parts = name.split(".")
        if parts[0] == "blocks" and len(parts) > 1:
            parts[1] = str(int(parts[1]) + self.offset)
        return ".".join(parts)

    def split_layers(self, model: GPT | Llama) -> None:
        """Replaces the layers that the plan names, and puts f at the entry of their regions."""
        tp, sequence = self.mesh.tp, self.sequence
        for name, layer in list(model.named_modules()):
            form = plan.form(self.config, self.whole_name(name))
            if form is None or isinstance(layer, nn.Identity):
                continue
            weight = torch.empty(self.pieces[f"{name}.weight"].local, device="meta")
            bias = self.pieces.get(f"{name}.bias")
            empty_bias = None if bias is None else torch.empty(bias.local, device="meta")
            new: nn.Module
            if form.kind == "vocabulary":
                new = tensor_parallel.VocabularyParallel(weight, self.first_token, tp, sequence=sequence)
            elif form.kind == "column":
                new = tensor_parallel.ColumnParallel(weight, empty_bias, tp, enters=False)
            else:
                new = tensor_parallel.RowParallel(weight, empty_bias, tp, sequence=sequence)
            model.set_submodule(name, new)
        for block in model.blocks:
            for region in plan.REGIONS:
                getattr(block, region).register_forward_pre_hook(self.enter)
            if isinstance(model, GPT):
                start, stop = share(self.config.heads, tp.size, tp.rank)
                attention: Any = block.attn
                attention.heads = stop - start
        if sequence and self.first and isinstance(model, GPT):
            model.positions = tensor_parallel.SplitPositions(model.positions.weight, tp)  # type: ignore[assignment]

    def enter(self, region: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tensor_parallel.enter(inputs[0], self.mesh.tp, self.sequence), *inputs[1:]

    def drop(self, region: nn.Module, inputs: Any, y: Tensor) -> Tensor:
        """Dropout of what a region adds to the residual stream: whole on every rank of tp, or its own part of it."""
        if not torch.is_grad_enabled():
            return y
        return self.streams.dropout(y, self.dropout, "split" if self.sequence else "whole")

    @property
    def first_token(self) -> int:
        return share(self.config.vocab_size, self.mesh.tp.size, self.mesh.tp.rank)[0]

    def named(self) -> Iterator[Named]:
        """This rank's parameters under their names in the whole model."""
        for name, parameter in self.model.named_parameters():
            piece = self.pieces[name]
            if self.tied and name == "embed.weight" and self.last and not self.first:
                piece = Piece(piece.shape, piece.dim, piece.ranges, counted=False)  # the first stage counts it
            yield Named(self.whole_name(name), parameter, piece)

    @torch.no_grad()
    def load(self, source: Source) -> None:
        """Sets every parameter to its piece of what `source` gives. UserError if that has another shape."""
        for name, parameter, piece in self.named():
            whole = source(name)
            if whole.shape != piece.shape:
                raise UserError(f"{name} has the shape {list(whole.shape)}, the model needs {list(piece.shape)}")
            parameter.copy_(piece.cut(whole))

    def forward(self, tokens: Tensor, positions: Tensor, x: Tensor | None = None) -> Tensor:
        """tokens, positions (B, T): this rank's part of the text. x: what the stage before gave; None on
        the first. (B, T, C), or with sequence parallelism (B, T/tp, C)."""
        cache: Any = RingCache(self.mesh.cp) if self.mesh.cp.size > 1 else None
        with self.selective:
            return self.model(tokens, positions=positions, cache=cache, embedded=x, hidden=True)

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy (nats, scalar fp32) summed over targets (B, T), −100 ignored; the same on every rank of tp."""
        tp, targets = self.mesh.tp, targets.flatten()
        if tp.size == 1:
            return head.cross_entropy(self.model, hidden.flatten(0, 1), targets, "sum")
        check_tokens(targets.clamp(min=0), self.config.vocab_size)
        hidden = tensor_parallel.enter(hidden, tp, self.sequence).flatten(0, 1)
        cap = head.softcap(self.model)
        weight = self.model.head_weight
        return tensor_parallel.head_loss(hidden, weight, targets, self.first_token, tp, cap).sum()

    def output_shape(self, tokens: Tensor) -> tuple[int, int, int]:
        """The shape of what goes to the next stage."""
        rows, steps = tokens.shape
        return rows, steps // self.mesh.tp.size if self.sequence else steps, self.config.dim
