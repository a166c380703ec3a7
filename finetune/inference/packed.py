"""A model for inference only: its matrices packed in few bits, as ops.quantized_linear reads them.

`pack` does it to a loaded model, one matrix at a time; `from_gguf` opens a GGUF file whose blocks are served as they
are. Embedding and output projection are one table in memory if they are tied; with few bits it is kept in int8, because
the logits feel its errors directly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from finetune import ops
from finetune.errors import UserError
from finetune.inference.quantize import quantize
from finetune.lm.gpt import GPT
from finetune.lm.io import weights
from finetune.lm.io.gguf import GGUFModel
from finetune.lm.io.gguf_packed import PLAIN, SERVED, packed
from finetune.lm.io.gguf_types import dequantize
from finetune.lm.io.load import special_tokens
from finetune.lm.llama import Llama
from finetune.ops.quantized_linear import QuantizedWeight, huge

WHOLE = ("fp32", "bf16")  # formats in which the head needs no other one


class PackedLinear(nn.Module):
    """x Wᵀ + bias. The weight is a plain object: `model.to(dtype)` must not convert its scales."""

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) → (…, out), in x's dtype."""
        return ops.quantized_linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features} → {self.out_features}, {self.weight.format}"


class PackedEmbedding(nn.Module):
    """Rows of a packed table (V, C), dequantized to `dtype`."""

    def __init__(self, table: QuantizedWeight, dtype: torch.dtype) -> None:
        super().__init__()
        self.table, self.dtype = table, dtype

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (…) → (…, C)."""
        return self.table.rows(tokens.flatten()).to(self.dtype).view(*tokens.shape, -1)


class Slabs:
    """Memory in huge pages, into which packed weights are moved one behind the other, in the order of use."""

    SIZE = 64 << 20

    def __init__(self) -> None:
        self.free = huge(0)

    def take(self, weight: QuantizedWeight) -> QuantizedWeight:
        """The weight in the layout of its device's kernels; on a CPU its tensors move into the slab."""
        ready = weight.packed(weight.device)
        return ready.mapped(self.moved) if ready.device.type == "cpu" else ready

    def moved(self, tensor: Tensor) -> Tensor:
        size = -(-tensor.nbytes // 64) * 64
        if size > len(self.free):
            self.free = huge(max(self.SIZE, size))
        place, self.free = self.free[: tensor.nbytes], self.free[size:]
        return place.view(tensor.dtype).view(tensor.shape).copy_(tensor) if size else tensor


def pack(model: Llama | GPT, format: str, head: str = "") -> Llama | GPT:
    """Replaces every linear layer of the model, its embedding and its head by packed ones, in place, and returns it.

    format: one of ops.quantized_linear's FORMATS. head: that of the embedding and the output projection; "": int8 with
    few bits, else the same. Norms, biases and learned positions stay, and their dtype is that of the activations.
    UserError for an unknown format, and for adapters that are not merged.
    """
    head = head or (format if format in WHOLE else "int8")
    for name, module in model.named_modules():
        if hasattr(module, "base"):
            raise UserError(f"{name} has an adapter: merge it before the weights are packed")
    slabs = Slabs()
    for name in [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]:
        if name != "head":
            linear: Any = model.get_submodule(name)
            place(model, name, slabs.take(named(name, linear.weight, format)), linear.bias)
    if isinstance(model, Llama) and not model.config.tied:
        last = slabs.take(named("head", model.head.weight, head))
        place_ends(model, slabs.take(named("embed", model.embed.weight, head)), last)
    else:
        table = slabs.take(named("embed", model.embed.weight, head))
        place_ends(model, table, table)
    return model


def named(name: str, weight: Tensor, format: str) -> QuantizedWeight:
    """The quantized weight; a UserError says which."""
    try:
        return quantize(weight, format)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def place(model: nn.Module, name: str, weight: QuantizedWeight, bias: Tensor | None) -> None:
    """Puts a packed layer where the linear layer `name` was."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, PackedLinear(weight, bias))


def place_ends(model: Llama | GPT, table: QuantizedWeight, head: QuantizedWeight) -> None:
    """Puts the embedding and the output projection in place (finetune/lm/head.py asks for `packed_head`)."""
    model.embed = PackedEmbedding(table, model.norm.weight.dtype)  # type: ignore[assignment]
    model.packed_head = PackedLinear(head)
    if hasattr(model, "head"):
        del model.head


def packed_weights(model: nn.Module) -> Iterator[tuple[str, QuantizedWeight]]:
    """(name, weight) of each packed matrix; a table that is shared comes once, as the embedding's."""
    seen = set()
    for name, module in model.named_modules():
        weight = getattr(module, "table", None) or getattr(module, "weight", None)
        if isinstance(weight, QuantizedWeight) and id(weight) not in seen:
            seen.add(id(weight))
            yield name, weight


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights, packed and not."""
    dense = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    return dense + sum(weight.nbytes for _, weight in packed_weights(model))


def read_bytes(model: Llama | GPT) -> int:
    """Bytes of the weights that a step of one token reads: all, but a row of the embedding (and of learned positions),
    unless it is the head too."""
    unread = [p for p in (getattr(model, "positions", None),) if p is not None]
    found = weight_bytes(model) - sum(p.weight.nbytes for p in unread)
    embedding: Any = model.embed
    head: Any = model.packed_head
    return found - (0 if embedding.table is head.weight else embedding.table.nbytes)


def from_gguf(
    file: GGUFModel,
    dtype: torch.dtype = torch.bfloat16,
    instead: str = "int8",
    report: Callable[[str, str], None] | None = None,
) -> Llama:
    """The Llama of an opened GGUF file, each matrix in the file's own blocks; dtype: of activations, norms and biases.

    Matrices of types that are not gguf_packed's are dequantized and quantized to `instead`; `report` is called with the
    name and the type of each. UserError for a file that is damaged, or lacks a tensor.
    """
    config = file.llama_config()
    with torch.device("meta"):
        model = Llama(config)
    linears = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Linear)} | {"embed.weight"}
    slabs, vectors = Slabs(), []
    ends: dict[str, QuantizedWeight] = {}
    for name, kind, values in file.stored():
        if name not in linears:
            vectors.append((name, torch.from_numpy(np.ascontiguousarray(values))))
            continue
        if kind in SERVED:
            weight = packed(values, kind)
        else:
            dense = torch.from_numpy(dequantize(values, kind))
            weight = named(f"{file.path}: tensor {name}", dense, PLAIN.get(kind, instead))
            if report is not None and kind not in PLAIN:
                report(name, kind)
        if weight.shape != (wanted := tuple(model.get_parameter(name).shape)):
            raise UserError(f"{file.path}: tensor {name} has shape {weight.shape}, its configuration requires {wanted}")
        if not all(bool(t.isfinite().all()) for t in weight.tensors if t.is_floating_point()):
            raise UserError(f"{file.path}: tensor {name} holds NaN or infinite numbers")
        layer, weight = name.removesuffix(".weight"), slabs.take(weight)
        if layer in ("embed", "head"):
            ends[layer] = weight
        else:
            linear: Any = model.get_submodule(layer)
            place(model, layer, weight, linear.bias)
    last = "embed" if config.tied else "head"
    if {"embed", last} <= ends.keys():
        place_ends(model, ends["embed"], ends[last])
    weights.fill(model, vectors, dtype, file.path)  # and an error for a tensor that is missing
    if isinstance(model.embed, PackedEmbedding):
        model.embed.dtype = dtype
    special_tokens(model, file)
    return model
