"""Atomic files, and checkpoints made of them: safetensors for tensors, JSON for the rest.

A checkpoint is a folder { tensors.safetensors, meta.json }, written under a temporary name, flushed to the disk and
then renamed. A kill at any moment leaves the previous one. No pickle: opening a checkpoint runs nobody's code.
meta.json holds the SHA-256 of both files, so that truncation and changes are detected.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from finetune.errors import UserError
from finetune.runs import reading

if TYPE_CHECKING:
    import torch

TENSORS, META = "tensors.safetensors", "meta.json"
_owner = "0"  # of this process's temporary files: the id of the run that it is


@contextmanager
def owned_by(run: str) -> Iterator[None]:
    """Context in which temporary file names carry this run's id, so that `clean` recognizes them as the run's own."""
    global _owner
    before, _owner = _owner, run
    try:
        yield
    finally:
        _owner = before


def temporary_name(path: Path, tag: str = "") -> Path:
    """Temporary name for writing `path`, in the same folder: `.finetune-<run>-<process>-<name>`."""
    return path.with_name(f".finetune-{_owner}-{os.getpid()}-{tag}{path.name}")


def clean(folder: Path, run: str) -> None:
    """Removes half-written files that killed processes of this run left in its folder. No other file has such a name;
    links are not followed."""
    for place, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            if name.startswith(f".finetune-{run}-"):
                path = Path(place, name)
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a full disk or a read-only folder into one line that names the file and the fix."""
    try:
        yield
    except OSError as e:
        full = e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        fix = "free some space, or choose another folder with --out" if full else "choose another folder with --out"
        raise UserError(f"cannot write {path}: {e.strerror or e}; {fix}") from e


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Context that yields a temporary path next to `path`; flushes and renames it if the block succeeds.

    On an exception the temporary file is removed and an earlier `path` stays as it was. UserError if the disk is full.
    """
    path = Path(path)
    temporary = temporary_name(path)
    try:
        with writing(path):
            yield temporary
            flush(temporary)
            os.replace(temporary, path)
            flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """UserError names a number that is not finite, which JSON does not have."""
    if place := reading.not_finite(value):
        raise UserError(f"{Path(path).name} is not written: {place} is not a finite number")
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_tensors(path: str | Path, tensors: "dict[str, torch.Tensor]", metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, whole or not at all, with the permissions of any new file."""
    with atomic_write(path) as temporary:
        _save_file(tensors, temporary, metadata)


def _save_file(tensors: "dict[str, torch.Tensor]", path: Path, metadata: dict[str, str] | None = None) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.touch()
    usual = path.stat().st_mode  # safetensors makes files that only their owner can read
    try:
        save_file(tensors, path, metadata)
        path.chmod(usual)
    except SafetensorError as e:  # it wraps the operating system's error in its text
        found = re.search(r"os error (\d+)", str(e))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number)) from e


def flush(path: Path) -> None:
    """fsync: returns when a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save(folder: str | Path, tensors: "dict[str, torch.Tensor]", meta: dict[str, Any]) -> None:
    """Writes a checkpoint folder, replacing an earlier one of this name. UserError if the disk is full."""
    folder = Path(folder)
    temporary, old = temporary_name(folder), temporary_name(folder, "old-")
    try:
        with writing(folder):
            temporary.mkdir(parents=True)
            _save_file(tensors, temporary / TENSORS)
            hashes = {"tensors": sha256(temporary / TENSORS), "meta": _digest(meta)}
            (temporary / META).write_text(json.dumps({"sha256": hashes, **meta}, ensure_ascii=False), encoding="utf-8")
            for path in (temporary / TENSORS, temporary / META, temporary):
                flush(path)
            if folder.exists():
                os.rename(folder, old)
            os.rename(temporary, folder)
            flush(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


class _Hashes(msgspec.Struct):
    tensors: str
    meta: str


class _Meta(msgspec.Struct):
    sha256: _Hashes


def load(folder: str | Path) -> "tuple[dict[str, torch.Tensor], dict[str, Any]]":
    """Tensors and meta of a checkpoint. UserError if a file is missing, empty, truncated or altered."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    for name in (META, TENSORS):
        if not (folder / name).is_file():
            raise UserError(f"checkpoint {folder} is incomplete: {name} is missing")
    meta = reading.json_file(folder / META, dict[str, Any])
    hashes = reading.convert(meta, _Meta, folder / META).sha256
    del meta["sha256"]
    if hashes.meta != _digest(meta):
        raise UserError(f"checkpoint {folder}: {META} is altered")
    try:
        if hashes.tensors != sha256(folder / TENSORS):
            raise UserError(f"checkpoint {folder}: {TENSORS} is truncated or altered")
        return load_file(folder / TENSORS), meta
    except (OSError, SafetensorError) as e:
        raise UserError(f"checkpoint {folder} cannot be read: {e}") from None


def remove(folder: Path) -> None:
    """Removes a folder so that a kill half-way leaves nothing that looks like a checkpoint."""
    gone = temporary_name(folder, "old-")
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
        if isinstance(value, float) and not math.isfinite(value):
            return {"$float": repr(value)}
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
    if "$float" in tree:
        return float(tree["$float"])
    if "$tuple" in tree:
        return tuple(unflatten(v, tensors) for v in tree["$tuple"])
    if "$dict" in tree:
        return {unflatten(k, tensors): unflatten(v, tensors) for k, v in tree["$dict"]}
    return {k: unflatten(v, tensors) for k, v in tree.items()}


def sha256(path: Path) -> str:
    """SHA-256 of a file, or of all files of a folder with their names; hidden files are omitted."""
    total = hashlib.sha256()
    if path.is_dir():
        for file in sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith(".")):
            total.update(f"{file.name}\0{sha256(file)}\0".encode(errors="surrogateescape"))
        return total.hexdigest()
    with path.open("rb") as opened:
        while block := opened.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def fingerprint(tensors: "Iterable[tuple[str, torch.Tensor]]") -> str:
    """SHA-256 of named tensors, names and bits, in any order."""
    import torch

    total = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        total.update(name.encode())
        total.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _digest(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
