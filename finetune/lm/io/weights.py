"""Weights from safetensors files, single or sharded, into a model without a second copy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from finetune.errors import UserError
from finetune.runs import reading

REOPEN_BYTES = 64 << 20
M = TypeVar("M", bound=nn.Module)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Index(msgspec.Struct):
    """model.safetensors.index.json: the file that holds each tensor."""

    weight_map: dict[str, str]


def read_safetensors(folder: Path, name: str = "model.safetensors") -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every weight of the folder. The tensors live in the mapped file: copy what you keep.

    UserError for a missing or damaged file, and for an index that names files elsewhere or tensors that are not there.
    """
    index = folder / f"{name}.index.json"
    if (folder / name).exists():
        yield from read_file(folder / name)
        return
    if not index.exists():
        pickled = next(folder.glob("*.bin"), None)
        hint = f" ({pickled.name} is pickle, which is not read: convert it to safetensors)" if pickled else ""
        raise UserError(f"{folder} holds no {name}{hint}")
    named = reading.json_file(index, Index, "fetch the model again").weight_map
    for file in sorted(set(named.values())):
        if file in ("", ".", "..") or Path(file).name != file:
            raise UserError(f"{index}: {file!r} is not the name of a file in this folder")
        if not (folder / file).exists():
            raise UserError(f"{folder / file} is missing, though {index.name} names it: fetch the model again")
    for file in sorted(set(named.values())):
        for tensor, value in read_file(folder / file):
            if named.pop(tensor, None) != file:
                raise UserError(f"{folder / file} holds {tensor}, which {index.name} does not name there")
            yield tensor, value
    if named:
        tensor, file = next(iter(named.items()))
        raise UserError(f"{folder / file} lacks {tensor}, though {index.name} names it there: fetch the model again")


def read_file(file: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of one safetensors file."""
    if not file.is_file():  # a pipe would be waited for
        raise UserError(f"{file} is not a file: fetch or save the model again")
    try:
        yield from read_shard(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged or cut short ({error}): fetch or save it again") from None


def read_shard(file: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) in the order of the file."""
    with safe_open(file, "pt") as opened:
        names = list(opened.offset_keys())
    while names:
        # Pages of the mapping count as resident memory until it is closed, so it is opened again now and then.
        with safe_open(file, "pt") as opened:
            read = 0
            while names and read < REOPEN_BYTES:
                tensor = opened.get_tensor(names[0])
                read += tensor.nbytes
                yield names.pop(0), tensor
                del tensor


def assemble(kind: type[M], config: Any, pairs: Iterable[tuple[str, Tensor]], dtype: torch.dtype, source: object) -> M:
    """A model of class `kind` made of the tensors `pairs`, which have this project's names."""
    with torch.device("meta"):
        model = kind(config)
    fill(model, pairs, dtype, source)
    return model


def fill(model: nn.Module, pairs: Iterable[tuple[str, Tensor]], dtype: torch.dtype, source: object) -> None:
    """Gives every parameter of `model` (built on the meta device) its tensor, as a contiguous copy in `dtype`.

    One tensor at a time, so the peak is the model plus its largest tensor. UserError on a missing, unexpected or
    wrongly shaped tensor, one that does not hold floating-point numbers, and one with NaN or infinities; `source` is
    named in the message.
    """
    missing = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name, tensor in pairs:
        if name not in missing:
            raise UserError(f"{source}: tensor {name} does not belong to this architecture")
        if tensor.shape != missing.pop(name):
            wanted = tuple(model.get_parameter(name).shape)
            raise UserError(
                f"{source}: tensor {name} has shape {tuple(tensor.shape)}, its configuration requires {wanted}"
            )
        if tensor.dtype not in FLOATS:
            raise UserError(
                f"{source}: tensor {name} has dtype {str(tensor.dtype).removeprefix('torch.')}, weights are float32, "
                "bfloat16, float16 or float64"
            )
        owner, _, leaf = name.rpartition(".")
        copy = torch.empty(tensor.shape, dtype=dtype).copy_(tensor)
        if not copy.isfinite().all():
            reason = f"numbers too large for {dtype}" if tensor.isfinite().all() else "NaN or infinite numbers"
            raise UserError(f"{source}: tensor {name} holds {reason.replace('torch.', '')}")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(copy))
    if missing:
        raise UserError(f"{source}: tensor {next(iter(missing))} is missing ({len(missing)} in all)")
