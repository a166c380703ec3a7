"""Model folders in the wider world's form: safetensors (single or sharded) and JSON, in and out."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from finetune.errors import UserError

REOPEN_BYTES = 64 << 20


def read_json(path: Path) -> dict[str, Any]:
    """UserError if the file is missing, is not JSON or is not an object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} holds no {path.name}: is it a model folder?") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): fetch or save the model again") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} should hold a JSON object, not a {type(found).__name__}: save the model again")
    return found


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Written under a temporary name and renamed, so that a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_safetensors(folder: Path, name: str = "model.safetensors") -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every weight of the folder. The tensors live in the mapped file: copy what you keep."""
    index = folder / f"{name}.index.json"
    single = folder / name
    if single.exists():
        files = [single]
    elif index.exists():
        files = [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
    else:
        pickled = next(folder.glob("*.bin"), None)
        hint = f" ({pickled.name} is pickle, which is not read: convert it to safetensors)" if pickled else ""
        raise UserError(f"{folder} holds no {name}{hint}")
    for file in files:
        try:
            yield from read_shard(file)
        except FileNotFoundError:
            raise UserError(f"{file} is missing, though {index.name} names it: fetch the model again") from None
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged or cut short ({error}): fetch or save it again") from None


def read_shard(file: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(file, "pt") as opened:
        names = list(opened.offset_keys())
    while names:
        # Pages of the mapping count as resident memory until it is closed, so it is opened anew now and then.
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
    wrongly shaped tensor; `source` names the place in the message.
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
        owner, _, leaf = name.rpartition(".")
        copy = torch.empty(tensor.shape, dtype=dtype).copy_(tensor)
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
    """Writes model.safetensors, config.json and generation_config.json, each under a temporary name and renamed;
    `extra(folder)` adds files of its own. UserError if the disk says no."""
    folder = Path(folder)
    temporary = folder / f".model.safetensors.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors}
        save_file(kept, temporary, metadata={"format": "pt"})
        write_json(folder / "config.json", config)
        shutil.copymode(folder / "config.json", temporary)  # safetensors makes it readable by its owner alone
        temporary.replace(folder / "model.safetensors")
        write_json(folder / "generation_config.json", generation)
        if extra is not None:
            extra(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write the model to {folder}: {error}") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def require(config: dict[str, Any], source: object, allowed: dict[str, tuple[Any, ...]]) -> None:
    """UserError for the first key of `config` whose value is not one of those `allowed` (a missing key is fine)."""
    for key, values in allowed.items():
        if key in config and config[key] not in values:
            raise UserError(f"{source}: {key} = {config[key]!r} is not supported (only {values[0]!r})")


def take(config: dict[str, Any], source: object, key: str, kind: type) -> Any:
    """The value of a key that must be there, as `kind`."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{source}: {key} should be a number, found {value!r}")
    return kind(value)
