"""The one reader of external input: JSON and TOML files, and values from other containers, checked by type.

A type is anything msgspec accepts: a `msgspec.Struct` whose fields are the known keys, `dict[str, str]`, a union, and
`Annotated[int, msgspec.Meta(ge=1)]` for bounds. Numbers are finite, files are regular and of bounded size, and every
failure is one UserError that names the file, the key, the value and what is allowed.
"""

import errno
import math
import os
import re
import stat
import sys
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from finetune.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")

LIMIT = 256 << 20  # bytes of a file read whole; the largest published tokenizer.json has 35 MB
SHOWN = 60  # characters of a wrong value that a message repeats

Count = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]  # a size: of a vocabulary, of a dimension, of layers
Index = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]  # a step, a token's id
Positive = Annotated[float, msgspec.Meta(gt=0)]
NonNegative = Annotated[float, msgspec.Meta(ge=0)]


def file_bytes(path: str | Path, limit: int = LIMIT, fix: str = "") -> bytes:
    """The contents of a regular file of at most `limit` bytes. UserError for anything else: missing, a folder, a FIFO
    (which would block forever), larger, unreadable. `fix` ends the message: what the user can do."""
    end = f": {fix}" if fix else ""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or device"
                raise UserError(f"{path} is {kind}, not a file{end}")
            found = file.read(min(limit, max(status.st_size, 1 << 16)) + 1)  # as much is allocated as is asked for
        if len(found) > limit:
            raise UserError(f"{path} has {status.st_size:,} bytes, more than the {limit:,} that are read{end}")
        return found
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file{end}") from None
    except OSError as e:
        if e.errno == errno.EISDIR:
            raise UserError(f"{path} is a folder, not a file{end}") from None
        raise UserError(f"{path} cannot be read: {e.strerror or e}{end}") from None
    except ValueError as e:  # a NUL in the name
        raise UserError(f"{str(path)!r} is no file name: {e}{end}") from None


def home_path(path: str | Path) -> Path:
    """The path with `~` and `~user` replaced. UserError if there is no such user, or no home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: no home folder is known for it: set HOME, or write the whole path") from None


def text_file(path: str | Path, limit: int = LIMIT, fix: str = "save it as UTF-8") -> str:
    """The text of a UTF-8 file; a byte order mark is dropped. UserError names the first byte that is not UTF-8."""
    return decode(file_bytes(path, limit), path, fix)


def decode(data: bytes, source: object, fix: str = "save it as UTF-8") -> str:
    try:
        return data.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as e:
        raise UserError(f"{source}: byte {e.start + 1} is not UTF-8: {fix}") from None


def json_file(path: str | Path, kind: type[T], fix: str = "", limit: int = LIMIT) -> T:
    """A file that holds one JSON value of type `kind`."""
    return json_value(file_bytes(path, limit, fix), kind, path, fix)


def json_value(data: bytes, kind: type[T], source: object, fix: str = "") -> T:
    """JSON text as a value of type `kind`; `source` names it in messages."""
    end = f": {fix}" if fix else ""
    try:
        return msgspec.json.decode(data.removeprefix(b"\xef\xbb\xbf"), type=kind)
    except msgspec.ValidationError as e:
        try:
            value = msgspec.json.decode(data.removeprefix(b"\xef\xbb\xbf"))
        except (msgspec.DecodeError, RecursionError):
            value = None
        raise UserError(_explained(str(e), value, source) + end) from None
    except msgspec.DecodeError as e:
        raise UserError(f"{source} is not JSON ({e}){end}") from None
    except RecursionError:
        raise UserError(f"{source} is nested too deeply{end}") from None


def toml_file(path: str | Path, kind: type[T], fix: str = "") -> T:
    """A TOML file as a value of type `kind`."""
    try:
        value = tomllib.loads(text_file(path, fix=fix or "save it as UTF-8").replace("\r\n", "\n"))
    except (tomllib.TOMLDecodeError, RecursionError) as e:
        raise UserError(f"{path}: {e or 'it is nested too deeply'}") from None
    return convert(value, kind, path, fix)


def convert(value: Any, kind: type[T], source: object, fix: str = "") -> T:
    """A parsed value (of TOML, of GGUF metadata, …) as `kind`."""
    end = f": {fix}" if fix else ""
    try:
        if place := not_finite(value):
            raise UserError(f"{source}: {place} is not a finite number{end}")
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as e:
        raise UserError(_explained(str(e), value, source) + end) from None
    except RecursionError:
        raise UserError(f"{source} is nested too deeply{end}") from None


def not_finite(value: Any, place: str = "") -> str:
    """Where the first NaN or infinity of a nested value is; an empty string if there is none."""
    if isinstance(value, float):
        return "" if math.isfinite(value) else place.lstrip(".") or "it"
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    inside = (not_finite(v, f"{place}.{k}" if isinstance(k, str) else f"{place}[{k}]") for k, v in parts)
    return next((found for found in inside if found), "")


def _explained(message: str, value: Any, source: object) -> str:
    """msgspec's "Expected `int`, got `str` - at `$.a[0]`", with the file before it and the value behind the key."""
    found = re.fullmatch(r"(.*?) - at `\$(.*)`", message, re.DOTALL)
    if not found:
        return f"{source}: {message[:1].lower()}{message[1:]}"
    reason, place = found[1], found[2].lstrip(".")
    known = True
    if isinstance(value, dict) and place in value:  # GGUF's keys have dots of their own
        return f"{source}: {place} is {_short(value[place])}: {reason[:1].lower()}{reason[1:]}"
    for key, index in re.findall(r"([^.\[\]]+)|\[(\d+|\.\.\.)\]", found[2]):
        try:
            value = value[key] if key else value[int(index)]
        except (KeyError, IndexError, TypeError, ValueError):  # `[...]`: one of a dict's values
            known = False
            break
    shown = f" is {_short(value)}" if known and place else ""
    return f"{source}: {place}{shown}: {reason[:1].lower()}{reason[1:]}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"
