"""A reader of untrusted HDF5 files: datasets of plain numbers, with a bound on memory, without links out of the file.

An HDF5 file is a tree of groups and datasets. A link may point into another file, a dataset may keep its numbers in
another file or assemble them from others: such parts are refused by name. A dataset's shape is checked before it is
read.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.errors import UserError
from finetune.rl.envs.npz import NUMBERS, count

SIGNATURE = b"\x89HDF\r\n\x1a\n"


def head(path: Path, length: int = 8) -> bytes:
    """The first bytes of a regular file; empty if there is none, it cannot be read, or it is not a regular file."""
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            return file.read(length) if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else b""
    except (OSError, ValueError):
        return b""


class Tree:
    """An open file. `left`: numbers that may still be read."""

    def __init__(self, path: Path, file: Any, numbers: int) -> None:
        self.path, self.file, self.left = path, file, numbers

    def names(self, group: str = "") -> list[str]:
        """Names in a group (of the file's top level by default)."""
        return list(self._group(group))

    def is_group(self, place: str) -> bool:
        import h5py

        return isinstance(self._node(place), h5py.Group)

    def attribute(self, name: str) -> Any:
        """An attribute of the file; None if there is none."""
        return self.file.attrs.get(name)

    def array(self, place: str) -> NDArray[Any]:
        """The numbers of a dataset. UserError if they are not plain, not in this file, or too many."""
        import h5py

        node = self._node(place)
        if not isinstance(node, h5py.Dataset):
            raise UserError(f"{place} is a group, not an array of numbers")
        if node.external or node.is_virtual:
            raise UserError(f"{place} keeps its numbers in other files: only this file is read")
        if node.shape is None or node.dtype.kind not in "biuf":
            what = "nothing" if node.shape is None else f"{node.dtype} values"
            raise UserError(f"{place} holds {what}: only numbers are read")
        if (size := count(node.shape, node.dtype)) > self.left:
            shape = "×".join(map(str, node.shape))[:60]
            raise UserError(f"{place} is {shape}, too many numbers: {self.left:,} are left to read")
        self.left -= size
        found = np.asarray(node[()])
        if found.dtype.kind == "b":  # whatever byte was stored
            found = found.view(np.uint8) != 0
        return found

    def _group(self, place: str) -> Any:
        import h5py

        node = self._node(place) if place else self.file
        if not isinstance(node, h5py.Group):
            raise UserError(f"{place} is an array, not a group")
        return node

    def _node(self, place: str) -> Any:
        """The group or dataset at a path of names, each a hard link."""
        import h5py

        node = self.file
        for name in place.split("/"):
            if not isinstance(node, h5py.Group) or name not in node:
                raise UserError(f"it has no {place}")
            if not isinstance(node.get(name, getlink=True), h5py.HardLink):
                raise UserError(f"{place} is a link to another place: only arrays stored under their own name are read")
            node = node[name]
        return node


@contextmanager
def opened(path: Path, numbers: int = NUMBERS) -> Iterator[Tree]:
    """The tree of a file. UserError names the file if it is not HDF5, is damaged, or holds what is not read."""
    try:
        import h5py
    except ImportError:
        raise UserError(f"{path} is an HDF5 file, which h5py reads: pip install 'finetune-lab[data]'") from None
    try:
        with h5py.File(path, "r", locking=False) as file:
            yield Tree(path, file, numbers)
    except UserError as e:
        raise UserError(f"{path}: {e}") from None
    except Exception as e:  # of h5py and the HDF5 library, on bytes that may be anything
        text = " ".join(str(e).split())[:100]
        raise UserError(f"{path} is not a readable HDF5 file: {text or type(e).__name__}") from None
