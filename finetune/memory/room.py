"""Refusal of a run that cannot fit into memory or onto the disk, before anything of that size is made."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.memory.formulas import predict
from finetune.memory.setup import Setup, shape_of
from finetune.runs import machine


def size(count: int) -> str:
    """`1.50 GiB`, `24.0 MiB`, `512 B`."""
    if count < 1 << 10:
        return f"{count} B"
    if count < 1 << 20:
        return f"{count / (1 << 10):.1f} KiB"
    return f"{count / (1 << 30):,.2f} GiB" if count >= 1 << 30 else f"{count / (1 << 20):.1f} MiB"


def check_memory(config: Any, setup: Setup, what: str) -> None:
    """UserError if the peak of a step is more than this machine has free. `what`: the settings that make it smaller."""
    check_bytes(predict(shape_of(config), setup)[-1].bytes, what)


def check_bytes(needed: int, what: str) -> None:
    """UserError if `needed` is more than this machine has free."""
    room = machine.available_memory_bytes()
    if room is not None and needed > room:
        raise UserError(f"this needs {size(needed)} of memory by the formulas, {size(room)} are free: smaller {what}")


def check_disk(folder: Path, needed: int, what: str) -> None:
    """UserError if the run's files need more than the disk has free."""
    room = shutil.disk_usage(folder).free
    if needed > room:
        raise UserError(f"{what} need {size(needed)} on the disk, {size(room)} are free: choose another --out")
