"""A reader of untrusted npz files: arrays of plain numbers, with bounds on file size and memory, without pickle.

An npz is a zip of .npy members, each a short header (type, order, shape) and the numbers. The header is checked first,
and no more is decompressed than it announces.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.errors import UserError
from finetune.rl.envs.spaces import Image
from finetune.runs import reading

FILE = 1 << 30  # most bytes of a file
NUMBERS = 1 << 28  # most numbers in all arrays together: 1 GiB as float32; pixels count as a quarter
HEADER = 4096  # most bytes; numpy writes 128
MEMBERS = 100  # most arrays of a file
METHODS = {zipfile.ZIP_STORED: "none", zipfile.ZIP_DEFLATED: "deflate"}


def count(shape: Sequence[int], dtype: np.dtype[Any]) -> int:
    """How many numbers of float32 an array takes: images (N, …) stay bytes."""
    size = math.prod(shape)
    return -(-size // 4) if dtype == np.uint8 and Image.of_shape(shape[1:]) else size


def read(path: Path, fields: Collection[str], numbers: int = NUMBERS) -> tuple[dict[str, NDArray[Any]], list[str]]:
    """({name: array} of the `fields` that the file has, names of its other arrays). UserError if it is not an npz file
    or holds more than `numbers` numbers."""
    data = reading.file_bytes(path, FILE)
    if data.startswith(b"\x93NUMPY"):
        raise UserError(f"{path} is one array: an npz of {', '.join(list(fields)[:6])} is needed (numpy.savez)")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            members = _members(file)
            found: dict[str, NDArray[Any]] = {}
            for name in fields:
                if name in members:
                    found[name] = _array(
                        file, members[name], name, numbers - sum(count(a.shape, a.dtype) for a in found.values())
                    )
            return found, [name for name in members if name not in fields]
    except UserError as e:
        raise UserError(f"{path} is not an npz of plain arrays: {e}") from None
    except Exception as e:  # of zipfile, zlib, struct and numpy's header, on bytes that may be anything
        text = " ".join(str(e).split())[:100]
        raise UserError(f"{path} is not an npz of plain arrays: {text or type(e).__name__}") from None


def _members(file: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    infos = file.infolist()
    if len(infos) > MEMBERS:
        raise UserError(f"it has {len(infos):,} members, more than {MEMBERS}")
    names = [info.filename.removesuffix(".npy") for info in infos]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"it has {name[:60]!r} twice")
    return dict(zip(names, infos, strict=True))


def _array(file: zipfile.ZipFile, info: zipfile.ZipInfo, name: str, left: int) -> NDArray[Any]:
    if info.flag_bits & 1:
        raise UserError(f"{name} is encrypted")
    if info.compress_type not in METHODS:
        raise UserError(f"{name} is compressed by method {info.compress_type}, not by numpy.savez_compressed's deflate")
    with file.open(info) as stream:
        shape, fortran, dtype, begin = _header(stream, name)
        size = math.prod(shape)
        if dtype.hasobject:
            raise UserError(f"{name} holds Python objects: only numbers are read")
        if count(shape, dtype) > left:
            raise UserError(f"{name} is {'×'.join(map(str, shape))[:60]}, too many numbers: {left:,} are left to read")
        length = size * dtype.itemsize
        if info.file_size != begin + length:
            raise UserError(f"{name} has {info.file_size - begin:,} bytes, its header says {length:,}")
        content = stream.read(length)
        stream.read(1)  # at the end of a member its checksum is compared
    if len(content) != length:
        raise UserError(f"{name} is truncated")
    if dtype.kind == "b" and size and np.frombuffer(content, np.uint8).max() > 1:
        raise UserError(f"{name} has bytes that are neither false nor true")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")


def _header(stream: Any, name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """(shape, whether columns come first, type, bytes before the numbers)"""
    start = stream.read(12)
    version = start[6:8]
    if start[:6] != b"\x93NUMPY" or version not in (b"\x01\x00", b"\x02\x00"):
        raise UserError(f"{name} is not a numpy array")
    old = version[0] == 1
    length, before = int.from_bytes(start[8:10] if old else start[8:12], "little"), 10 if old else 12
    if length > HEADER:
        raise UserError(f"{name} has a header of {length:,} bytes")
    whole = io.BytesIO((start + stream.read(length - len(start) + before))[8:])
    read_header = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read_header(whole, max_header_size=HEADER)
    if len(shape) > 8 or any(type(n) is not int or n < 0 for n in shape):
        raise UserError(f"{name} has the shape {str(shape)[:60]}")
    return shape, fortran, dtype, before + length
