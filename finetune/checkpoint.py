"""Files that exist whole or not at all, and checkpoints made of them: safetensors for tensors, JSON for the rest.

A checkpoint is a folder { tensors.safetensors, meta.json }, written under a temporary name, flushed to the disk and
then renamed. A kill at any moment leaves the previous one. No pickle: opening a checkpoint runs nobody's code.
"""

import errno
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError

if TYPE_CHECKING:
    import torch

TENSORS, META = "tensors.safetensors", "meta.json"
TEMPORARY = ".tmp-"  # whatever bears this prefix is a leftover of a killed process


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a full disk or a forbidden folder into one line that names the file and the mend."""
    try:
        yield
    except OSError as e:
        full = e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        mend = "free some space, or choose another folder with --out" if full else "choose another folder with --out"
        raise UserError(f"cannot write {path}: {e.strerror or e}; {mend}") from e


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path beside `path` to write to; flushes and renames it when the block ends well.

    On an exception the temporary file is removed and an earlier `path` stays as it was. UserError if the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        with writing(path):
            yield temporary
            flush(temporary)
            os.replace(temporary, path)
            flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save(folder: str | Path, tensors: "dict[str, torch.Tensor]", meta: dict[str, Any]) -> None:
    """Writes a checkpoint folder, replacing an earlier one of this name. UserError if the disk is full."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder = Path(folder)
    temporary = folder.with_name(f"{TEMPORARY}{os.getpid()}-{folder.name}")
    old = folder.with_name(f"{TEMPORARY}{os.getpid()}-old-{folder.name}")
    try:
        with writing(folder):
            temporary.mkdir(parents=True)
            try:
                save_file(tensors, temporary / TENSORS)
            except SafetensorError as e:  # it wraps the operating system's error in its text
                found = re.search(r"os error (\d+)", str(e))
                number = int(found[1]) if found else errno.EIO
                raise OSError(number, os.strerror(number)) from e
            text = json.dumps({"crc32": _crc32(temporary / TENSORS), **meta}, ensure_ascii=False)
            (temporary / META).write_text(text, encoding="utf-8")
            for path in (temporary / TENSORS, temporary / META, temporary):
                flush(path)
            if folder.exists():
                os.rename(folder, old)
            os.rename(temporary, folder)
            flush(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def load(folder: str | Path) -> "tuple[dict[str, torch.Tensor], dict[str, Any]]":
    """Tensors and meta of a checkpoint. UserError if a file is missing, empty, truncated or altered."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        if meta.pop("crc32") != _crc32(folder / TENSORS):
            raise ValueError(f"{TENSORS} is truncated or altered")
        return load_file(folder / TENSORS), meta
    except FileNotFoundError as e:
        raise UserError(f"checkpoint {folder} is incomplete: {Path(e.filename).name} is missing") from None
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as e:
        raise UserError(f"checkpoint {folder} cannot be read: {e}") from None


def remove(folder: Path) -> None:
    """Removes a folder so that a kill half-way leaves nothing that looks like a checkpoint."""
    gone = folder.with_name(f"{TEMPORARY}{os.getpid()}-old-{folder.name}")
    os.rename(folder, gone)
    shutil.rmtree(gone)


def flatten(value: Any) -> "tuple[Any, dict[str, torch.Tensor]]":
    """A nested state dict as (a tree of JSON values, its tensors by name); `unflatten` is the exact inverse.

    Tensors that are one and the same memory (tied weights) are stored once. Keys may be of any JSON type, tuples stay
    tuples. TypeError names what cannot be stored.
    """
    import torch

    tensors: dict[str, torch.Tensor] = {}
    names: dict[Any, str] = {}  # identity of a tensor's memory -> its name
    storages: set[int] = set()

    def walk(value: Any, name: str) -> Any:
        if isinstance(value, torch.Tensor):
            key = (value.data_ptr(), value.shape, value.stride(), value.dtype, str(value.device))
            if value.numel() == 0 or key not in names:
                while name in tensors:
                    name += "'"
                names[key] = name
                plain = value.detach().cpu().contiguous()
                # Storage shared with another tensor, or larger than the tensor, is refused by safetensors: copy.
                storage = plain.untyped_storage()
                if storage.data_ptr() in storages or storage.nbytes() != plain.numel() * plain.element_size():
                    plain = plain.clone()
                storages.add(storage.data_ptr())
                tensors[name] = plain
            return {"$tensor": names[key]}
        if isinstance(value, dict):
            if all(isinstance(k, str) and not k.startswith("$") for k in value):
                return {k: walk(v, f"{name}.{k}" if name else k) for k, v in value.items()}
            return {"$dict": [[walk(k, name), walk(v, f"{name}.{k}")] for k, v in value.items()]}
        if isinstance(value, tuple):
            return {"$tuple": [walk(v, f"{name}.{i}") for i, v in enumerate(value)]}
        if isinstance(value, list):
            return [walk(v, f"{name}.{i}") for i, v in enumerate(value)]
        if value is None or type(value) in (bool, int, float, str):
            return value
        raise TypeError(f"the state '{name}' holds a {type(value).__name__}, which a checkpoint cannot store")

    return walk(value, ""), tensors


def unflatten(tree: Any, tensors: "dict[str, torch.Tensor]") -> Any:
    """The nested state dict that `flatten` took apart."""
    if isinstance(tree, list):
        return [unflatten(v, tensors) for v in tree]
    if not isinstance(tree, dict):
        return tree
    if "$tensor" in tree:
        return tensors[tree["$tensor"]]
    if "$tuple" in tree:
        return tuple(unflatten(v, tensors) for v in tree["$tuple"])
    if "$dict" in tree:
        return {unflatten(k, tensors): unflatten(v, tensors) for k, v in tree["$dict"]}
    return {k: unflatten(v, tensors) for k, v in tree.items()}


def _crc32(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc
