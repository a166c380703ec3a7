"""The container of GGUF (ggml's docs/gguf.md): metadata, the places of the tensors, and the parts of a split file.

It is read here, not by gguf-py, whose reader trusts the counts and offsets in a file.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from finetune.errors import UserError
from finetune.lm.io.gguf_types import TYPES, dequantize
from finetune.runs import reading

T = TypeVar("T")

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MOST_HEADER = 1 << 30  # bytes before the weights
PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")  # the name that llama-gguf-split gives a part


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is, and how it is stored."""

    kind: str  # ggml's name of the type
    shape: tuple[int, ...]  # rows first, as torch has it
    start: int  # byte of the file
    nbytes: int
    file: Path


Contents = tuple[dict[str, Any], dict[str, TensorInfo]]


class GGUFFile:
    """An opened file, or all parts of a split one: `metadata` (of the first part) and `tensor_infos` by name.

    Tensors are read one at a time. UserError if the file or a part is missing, not GGUF, damaged, or contradictory.
    """

    def __init__(self, path: str | Path, contents: Contents | None = None) -> None:
        self.path = Path(path)
        self.metadata, self.tensor_infos = contents or opened(self.path)
        self._maps: dict[Path, np.ndarray] = {}

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a metadata key (numbers, strings and lists as Python's own)."""
        return self.metadata.get(key, default)

    def struct(self, kind: type[T]) -> T:
        """The metadata as a msgspec.Struct; UserError names a key that is missing, of a wrong type or out of range."""
        names = [field.encode_name for field in msgspec.structs.fields(kind)]  # type: ignore[arg-type]
        return reading.convert({name: self.metadata[name] for name in names if name in self.metadata}, kind, self.path)

    def __len__(self) -> int:
        return len(self.tensor_infos)

    def check_types(self) -> None:
        """UserError for the first tensor of a type that cannot be read."""
        for name, info in self.tensor_infos.items():
            if info.kind not in TYPES:
                raise UserError(f"{info.file}: tensor {name} is of GGUF type {info.kind}, which is not supported: "
                                f"convert the file to one of {', '.join(TYPES)}")  # fmt: skip

    def tensor(self, name: str) -> np.ndarray:
        """The weights of a tensor, fp32."""
        return dequantize(self.raw(name), self.tensor_infos[name].kind)

    def raw(self, name: str) -> np.ndarray:
        """The bytes of a tensor (…, bytes of a row) in the mapped file."""
        info = self.tensor_infos[name]
        if info.file not in self._maps:
            self._maps[info.file] = np.memmap(info.file, np.uint8, "r")
        return self._maps[info.file][info.start : info.start + info.nbytes].reshape(*info.shape[:-1], -1)


def opened(path: Path) -> Contents:
    """Metadata and tensors of a file; of a part of a split one the first part's metadata and all parts' tensors."""
    metadata, infos = read_header(path)
    count = metadata.get("split.count", 0)
    if count in (0, 1):
        return metadata, infos
    if not isinstance(count, int) or not 1 < count < 100_000:
        raise UserError(f"{path}: split.count is {count!r}, not a number of parts")
    named = PART.fullmatch(path.name)
    if named is None or int(named[3]) != count:
        raise UserError(
            f"{path} is one of {count} parts of a split model, but not called NAME-00001-of-{count:05}.gguf: give it "
            "its name back, or join the parts with llama-gguf-split --merge"
        )
    files = [path.with_name(f"{named[1]}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]
    if missing := [file.name for file in files if not file.is_file()]:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise UserError(f"{path} is part {named[2]} of {count}; of the others {shown} is not in {path.parent}")
    first: dict[str, Any] = {}
    tensors: dict[str, TensorInfo] = {}
    for i, file in enumerate(files):
        found, infos = read_header(file)
        own = found.get("split.no"), found.get("split.count")
        if own != (i, count):
            raise UserError(
                f"{file}: split.no and split.count are {own[0]} and {own[1]}, not {i} and {count}: it is a part of "
                "another model"
            )
        first = first or found
        if twice := next((name for name in infos if name in tensors), None):
            raise UserError(f"{file}: tensor {twice} is in {tensors[twice].file.name} too")
        tensors |= infos
    total = first.get("split.tensors.count")
    if total is not None and total != len(tensors):
        raise UserError(f"{files[0]}: split.tensors.count is {total}, the {count} parts hold {len(tensors)} tensors")
    return first, tensors


class Damaged(ValueError):
    """The file contradicts itself."""


class Bytes:
    """A file's bytes, read one after the other; Damaged beyond their end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        if not 0 <= count <= len(self.data) - self.at or self.at + count > MOST_HEADER:
            raise Damaged(f"{count} bytes are expected at byte {self.at}, {len(self.data) - self.at} are left")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.text()
        if kind != ARRAY or depth > 4:
            raise Damaged(f"a value of type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner in SCALARS:
            width = struct.calcsize(f"<{SCALARS[inner]}")
            if count > len(self.data):  # a format string of that length would be made first
                raise Damaged(f"a list of {count} values")
            return list(struct.unpack(f"<{count}{SCALARS[inner]}", self.take(count * width)))
        if count > len(self.data) - self.at:  # each needs at least one byte
            raise Damaged(f"a list of {count} values")
        return [self.value(inner, depth + 1) for _ in range(count)]


def read_header(path: Path) -> Contents:
    """Metadata and tensors of a GGUF file. UserError if it is missing, not GGUF, cut short, or inconsistent."""
    if not path.is_file():
        raise UserError(f"{path} does not exist, or is not a file")
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise UserError(f"{path} is not a GGUF file: it does not begin with the letters GGUF")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return parse(Bytes(data), path)
    except Damaged as error:
        raise UserError(f"{path} is a damaged or cut short GGUF file ({error}): fetch it again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def parse(data: Bytes, path: Path) -> Contents:
    """Metadata and tensors. Damaged if the counts, types or offsets cannot be right."""
    data.take(4)
    version, tensors, pairs = data.number("I"), data.number("Q"), data.number("Q")
    if version not in (2, 3):
        raise Damaged(f"version {version}; 2 and 3 are read")
    metadata: dict[str, Any] = {}
    for _ in range(pairs):  # each needs bytes, so that a wrong count ends at the file's end
        key = data.text()
        metadata[key] = data.value(data.number("I"))
    found = []
    for _ in range(tensors):
        name, dimensions = data.text(), data.number("I")
        if not 1 <= dimensions <= 4:
            raise Damaged(f"tensor {name} has {dimensions} dimensions")
        shape = tuple(data.number("Q") for _ in range(dimensions))[::-1]
        found.append((name, shape, data.number("I"), data.number("Q")))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise Damaged(f"general.alignment is {alignment!r}, not a power of two")
    start = -(-data.at // alignment) * alignment
    infos = dict(placed(data, path, start, alignment, *one) for one in found)
    if len(infos) != len(found):
        raise Damaged("two tensors have the same name")
    return metadata, infos


def placed(
    data: Bytes, path: Path, first: int, alignment: int, name: str, shape: tuple[int, ...], code: int, offset: int
) -> tuple[str, TensorInfo]:
    """A tensor's name and place; Damaged if it is not in the file, or not where its type can be read."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(code)
    except ValueError:
        raise Damaged(f"tensor {name} is of an unknown type {code}") from None
    weights, width = GGML_QUANT_SIZES[kind]
    if min(shape) < 1 or shape[-1] % weights:
        raise Damaged(f"tensor {name} of shape {shape} is not made of whole blocks of {weights}")
    if offset % alignment:
        raise Damaged(f"tensor {name} is at offset {offset}, which is not a multiple of {alignment}")
    nbytes, start = math.prod(shape) // weights * width, first + offset
    if start + nbytes > len(data.data):
        raise Damaged(f"tensor {name} ends at byte {start + nbytes}, the file at {len(data.data)}")
    return name, TensorInfo(kind.name, shape, start, nbytes, path)
