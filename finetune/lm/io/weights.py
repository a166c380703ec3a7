"""Model folders in the wider world's form: safetensors (single or sharded) and JSON, in and out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from finetune.errors import UserError
from finetune.runs import checkpoint, reading

REOPEN_BYTES = 64 << 20
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def read_json(path: Path) -> dict[str, Any]:
    """UserError if the file is missing, is not JSON or is not an object."""
    if not path.exists():
        raise UserError(f"{path.parent} holds no {path.name}: is it a model folder?")
    return reading.json_file(path, dict[str, Any], "fetch or save the model again")


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


def fill(model: nn.Module, pairs: Iterable[tuple[str, Tensor]], dtype: torch.dtype, source: object) -> None:
    """Gives every parameter of `model` (built on the meta device) its tensor, as a contiguous copy in `dtype`.

    One tensor at a time, so the peak is the model plus its largest tensor. UserError on a missing, unexpected or
    wrongly shaped tensor, one that does not hold floating-point numbers, and one with NaN or infinities; `source` names
    the place in the message.
    """
    missing = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name, tensor in pairs:
        if name not in missing:
            raise UserError(f"{source}: tensor {name} does not belong to this architecture")
        if tensor.shape != missing.pop(name):
            wanted = tuple(model.get_parameter(name).shape)
            raise UserError(
                f"{source}: tensor {name} has shape {tuple(tensor.shape)}, its configuration asks for {wanted}"
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


def write_model(
    folder: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    config: dict[str, Any],
    generation: dict[str, Any],
    extra: Callable[[Path], None] | None = None,
) -> None:
    """Writes model.safetensors, config.json and generation_config.json, each whole or not at all; `extra(folder)` adds
    files of its own. UserError if the disk says no."""
    folder = Path(folder)
    with checkpoint.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors}
    checkpoint.write_json(folder / "config.json", config)
    checkpoint.write_json(folder / "generation_config.json", generation)
    if extra is not None:
        extra(folder)
    checkpoint.write_tensors(folder / "model.safetensors", kept, {"format": "pt"})


def require(config: dict[str, Any], source: object, allowed: dict[str, tuple[Any, ...]]) -> None:
    """UserError for the first key of `config` whose value is not one of those `allowed` (a missing key is fine)."""
    for key, values in allowed.items():
        if key in config and config[key] not in values:
            raise UserError(f"{source}: {key} = {config[key]!r} is not supported (only {values[0]!r})")
