"""Checks of a model's configuration that comes from a file: config.json, generation_config.json, GGUF metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from finetune.errors import UserError
from finetune.runs import reading

C = TypeVar("C")

# Far above every published model: a larger number is a mistake, and building the model would take hours or all memory.
Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 26)]
Depth = Annotated[int, msgspec.Meta(ge=1, le=1 << 12)]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. UserError if the file is missing, is not JSON or is not an object."""
    if not path.exists():
        raise UserError(f"{path.parent} holds no {path.name}: is it a model folder?")
    return reading.json_file(path, dict[str, Any], "fetch or save the model again")


def require(config: dict[str, Any], source: object, allowed: dict[str, tuple[Any, ...]]) -> None:
    """UserError for the first key of `config` whose value is not one of those `allowed` (a missing key is fine)."""
    for key, values in allowed.items():
        if key in config and config[key] not in values:
            raise UserError(f"{source}: {key} = {config[key]!r} is not supported (only {values[0]!r})")


def checked(kind: type[C], source: object, /, **sizes: Any) -> C:
    """A LlamaConfig, GPTConfig or RopeScaling; UserError names the file whose sizes contradict each other."""
    try:
        return kind(**sizes)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


class TokenIds(msgspec.Struct):
    """The special tokens of config.json and generation_config.json. Old folders write -1 for none."""

    bos_token_id: int | list[int] | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | list[int] | None = None


def read_token_ids(folder: Path, raw: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The special ids of config.json (`raw`), and those of generation_config.json, empty if there is none."""
    found = []
    file = folder / "generation_config.json"
    for where, value in ((folder / "config.json", raw), (file, read_json(file) if file.exists() else {})):
        ids = msgspec.structs.asdict(reading.convert(value, TokenIds, where))
        found.append({key: one for key, one in ids.items() if one not in (None, -1)})
    return found[0], found[1]
