"""The folder of a run: its place, its settings, its lock."""

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from finetune import checkpoint, config, machine
from finetune.errors import UserError
from finetune.registry import ModuleInfo


def settings(info: ModuleInfo, cfg: config.Config, toy: bool) -> dict[str, Any]:
    """What config.json holds."""
    return {
        "module": info.name,
        "toy": toy,
        "config": config.to_json(cfg),
        "command": sys.argv,
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": machine.versions(),
        "machine": machine.describe(),
        "git": machine.git_revision(),
    }


def default(info: ModuleInfo, cfg: config.Config, toy: bool) -> Path:
    stamp = f"{datetime.now():%Y%m%d-%H%M%S}-{'toy' if toy else 'default'}-s{cfg.seed}"
    names: Iterator[str] = (stamp if i == 1 else f"{stamp}-{i}" for i in range(1, 1000))
    return next(p for name in names if not (p := info.folder / "output" / name).exists())


def saved(info: ModuleInfo, out: Path | None, toy: bool) -> tuple[Path, dict[str, Any]]:
    """Folder and config.json of the run to resume: `out`, or the newest unfinished one (a toy one if `toy`)."""

    def read(path: Path) -> dict[str, Any]:
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise UserError(f"{path.parent} holds no run to resume: leave --resume away to start one there") from None
        except (OSError, ValueError) as e:
            raise UserError(f"{path} cannot be read: {e}; start the run anew") from None

    if out:
        return Path(out), read(Path(out) / "config.json")
    found = [p for p in (info.folder / "output").glob("*/config.json") if not (p.parent / "summary.json").exists()]
    for path in sorted(found, key=lambda p: p.stat().st_mtime, reverse=True):
        saved = read(path)
        if saved["toy"] or not toy:
            return path.parent, saved
    raise UserError(f"'{info.name}' has no unfinished {'toy ' if toy else ''}run to resume in {info.folder / 'output'}")


def clean(folder: Path) -> None:
    """Removes what killed processes left half-written."""
    for path in [*folder.glob(f"**/{checkpoint.TEMPORARY}*")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def withdraw(folder: Path) -> None:
    """A run that was refused before it began leaves no run behind, so that the mended command finds its place free."""
    (folder / "config.json").unlink(missing_ok=True)
    with suppress(OSError):  # there was something else in it
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
