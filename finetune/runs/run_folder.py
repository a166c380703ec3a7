"""The folder of a run: its place, its settings, what it depends on, its lock."""

import fcntl
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec

from finetune.errors import UserError
from finetune.runs import checkpoint, config, machine, reading
from finetune.runs.registry import ModuleInfo

SETTINGS, SUMMARY = "config.json", "summary.json"
STALE = "omit --resume to start a new run"  # what to do about a run that cannot continue


class Input(msgspec.Struct):
    """A file or folder that the result depends on, as it was when the run began."""

    path: str
    sha256: str
    changed: int  # time of the last change, ns; the hash is computed again only if it differs


class Saved(msgspec.Struct):
    """What config.json holds."""

    id: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{16}$")]
    module: str
    toy: bool
    config: dict[str, Any]
    command: list[str]
    started: str
    versions: dict[str, str]  # of the packages and kernels whose bits the results are
    inputs: dict[str, Input]
    changes: list[str]  # what differed when the run was resumed with --accept-changes
    machine: dict[str, Any]
    git: dict[str, Any] | None

    def write(self, folder: Path) -> None:
        checkpoint.write_json(folder / SETTINGS, msgspec.to_builtins(self))


class Summary(msgspec.Struct):
    """The fields of summary.json that other code reads; the file holds more."""

    metrics: dict[str, Any] = {}
    passed: bool | None = None
    toy: bool = False
    seconds: reading.NonNegative = 0.0
    peak_rss_bytes: reading.Index = 0
    baseline: dict[str, float] = {}


def summary(folder: Path) -> dict[str, Any]:
    """summary.json of a finished run. UserError if it is damaged."""
    fix = f"`python -m finetune finish {folder}` writes it again"
    found = reading.json_file(folder / SUMMARY, dict[str, Any], fix)
    return msgspec.to_builtins(reading.convert(found, Summary, folder / SUMMARY, fix)) | found


def begin(info: ModuleInfo, cfg: config.Config, toy: bool) -> Saved:
    """The settings of a new run."""
    return Saved(
        id=secrets.token_hex(8),
        module=info.name,
        toy=toy,
        config=config.to_json(cfg),
        command=[word.encode(errors="backslashreplace").decode() for word in sys.argv],
        started=datetime.now().astimezone().isoformat(timespec="seconds"),
        versions=versions(),
        inputs={},
        changes=[],
        machine=machine.describe(),
        git=machine.git_revision(),
    )


def versions() -> dict[str, str]:
    """Versions of packages and kernels: what determines the bits of a result besides settings and inputs."""
    import torch

    from finetune import ops  # noqa: F401  (loads the kernels)

    backend = os.environ.get("FINETUNE_BACKEND")
    return {**machine.versions(), "kernels": torch.ops.finetune.cpu_level()} | ({"backend": backend} if backend else {})


def described(path: Path) -> Input:
    """UserError if it is neither a file nor a folder, or cannot be read."""
    try:
        if not path.is_file() and not path.is_dir():
            raise UserError(
                f"{path}{' is a pipe or device, not a file' if path.exists() else ': there is no such file'}"
            )
        return Input(str(path), checkpoint.sha256(path), changed_at(path))
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read: {e}") from None


def changed_at(path: Path) -> int:
    files = [p for p in path.iterdir() if p.is_file()] if path.is_dir() else [path]
    return max((p.stat().st_mtime_ns for p in files), default=0)


def check_name(out: Path) -> None:
    """UserError if no folder can be made under this name."""
    try:
        text = os.fspath(out).encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"--out {os.fspath(out)!r} is not UTF-8: choose another name") from None
    if b"\0" in text:
        raise UserError(f"--out {os.fspath(out)!r} holds a NUL: choose another name")
    if max(map(len, text.split(b"/"))) > 255 or len(text) > 4000:
        raise UserError(f"--out {os.fspath(out)[:60]}… is too long a name: choose a shorter one")


def default(info: ModuleInfo, cfg: config.Config, toy: bool) -> Path:
    stamp = f"{datetime.now():%Y%m%d-%H%M%S}-{'toy' if toy else 'default'}-s{cfg.seed}"
    names: Iterator[str] = (stamp if i == 1 else f"{stamp}-{i}" for i in range(1, 1000))
    return next(p for name in names if not (p := info.folder / "output" / name).exists())


def refuse_foreign(folder: Path) -> None:
    """UserError if the folder of a new run holds anything already: the run would overwrite what is not its own."""
    with checkpoint.writing(folder):
        there = [p for p in folder.iterdir() if not p.name.startswith(".")] if folder.is_dir() else []
    if (folder / SETTINGS) in there and is_run(folder):
        raise UserError(f"{folder} already holds a run: continue it with --resume, or choose another --out")
    if there:
        raise UserError(
            f"{folder} is not empty ({there[0].name}): a run needs a new or an empty folder; choose another --out"
        )


def is_run(folder: Path) -> bool:
    try:
        read(folder)
    except UserError:
        return False
    return True


def read(folder: Path) -> Saved:
    """The settings of the run in a folder. UserError if it holds none."""
    if not (folder / SETTINGS).exists():
        raise UserError(f"{folder} holds no run to resume: omit --resume to start one there")
    return reading.json_file(folder / SETTINGS, Saved, "is it the folder of a run of this version?", limit=16 << 20)


def saved(info: ModuleInfo, out: Path | None, toy: bool) -> tuple[Path, Saved]:
    """Folder and settings of the run to resume: `out`, or the newest unfinished one (a toy one if `toy`)."""
    if out:
        return Path(out), read(Path(out))
    found = [p for p in (info.folder / "output").glob(f"*/{SETTINGS}") if not (p.parent / SUMMARY).exists()]
    for path in sorted(found, key=lambda p: p.stat().st_mtime, reverse=True):
        settings = read(path.parent)
        if settings.toy or not toy:
            return path.parent, settings
    raise UserError(f"'{info.name}' has no unfinished {'toy ' if toy else ''}run to resume in {info.folder / 'output'}")


def differences(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """`torch was 2.12.0 and is 2.13.0`, for each that differs."""
    return [
        f"{name} was {before.get(name, 'not set')} and is {now.get(name, 'not set')}"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]


def withdraw(folder: Path) -> None:
    """Deletes the folder of a run rejected before its first step, so the corrected command can reuse --out. A folder
    that holds anything else stays."""
    (folder / SETTINGS).unlink(missing_ok=True)
    with suppress(OSError):  # it holds other files
        folder.rmdir()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Refuses a second process in the same run folder. The lock ends with its process."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is running in {folder}: wait for it, or choose another --out") from None
        yield
    finally:
        os.close(handle)
