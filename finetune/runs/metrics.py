"""metrics.csv: a row a step, in memory and on the disk."""

import csv
import errno
import hashlib
import io
import math
import os
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.runs import reading
from finetune.runs.checkpoint import atomic_write, writing

Key = tuple[str, int]  # (phase, step)
FIX = "remove the file and add --accept-changes to go on without its rows"
MAIN = "train"  # the phase of a run that has only one; it needs no column


class Metrics:
    """Rows keyed by (phase, step). Values stay text, so that a resumed file equals an uninterrupted one byte for byte.

    A finished row is appended with one write; a new column or a change to a written row rewrites the file under a
    temporary name. A resumed run begins with the rows on the disk; each of its loops drops the rows of the steps it
    repeats (`keep`), so that rows of later loops survive if the run is killed before it reaches them.
    """

    def __init__(self, path: Path, resume: bool = False) -> None:
        self.path = path
        self.old = self._read() if resume and path.exists() else {}
        self.rows = {key: dict(row) for key, row in self.old.items()}
        self.places = {key: i for i, key in enumerate(self.old)}  # where an earlier process wrote a row
        self.logged: set[Key] = set()  # by this process
        self.pending: dict[Key, dict[str, str]] = {}  # the rows not on the disk yet
        self.columns: list[str] = []  # the header on the disk
        self.stale = True  # the file does not exist, or a row in it has changed

    def log(self, phase: str, step: int, values: dict[str, str]) -> None:
        """Adds to the row of a step. A row is written when the next one begins, or by `flush`."""
        key = (phase, step)
        self.logged.add(key)
        if key not in self.rows:
            self.flush()
            self.rows[key] = self.pending[key] = {"step": str(step)} | ({} if phase == MAIN else {"phase": phase})
        row = self.rows[key]
        if key not in self.pending and not values.items() <= row.items():
            self.stale = True
        row.update(values)

    def keep(self, phase: str, start: int) -> None:
        """Drops the rows of steps from `start` on of this phase, unless this process has logged them."""
        repeated = [key for key in self.rows if key[0] == phase and key[1] >= start and key not in self.logged]
        for key in repeated:
            del self.rows[key]
            self.stale = True
        self.flush()

    def flush(self) -> None:
        if not self.rows:
            return
        added = {column: None for row in self.pending.values() for column in row if column not in self.columns}
        first = min((self.places.get(key, len(self.old)) for key in self.pending), default=len(self.old))
        if any(self.places.get(key, -1) > first for key in self.rows):  # an earlier process wrote them in another order
            order = sorted(self.rows, key=lambda key: self.places.get(key, len(self.old)))
            self.rows, self.stale = {key: self.rows[key] for key in order}, True
        if self.stale or added:
            columns = dict.fromkeys(column for row in self.rows.values() for column in row)
            self.columns = ["step", *(c for c in columns if c != "step")]
            with atomic_write(self.path) as temporary:
                temporary.write_text(",".join(self.columns) + "\n" + self._text(self.rows), encoding="utf-8")
            self.stale = False
        elif self.pending:
            with writing(self.path):
                self._append(self._text(self.pending).encode())
        self.pending = {}

    def digest(self, phase: str, step: int) -> dict[str, Any]:
        """Digest of this loop's rows on the disk but the last of `step` steps, which may still change; see `holds`."""
        self.flush()
        return {"columns": self.columns, "sha256": _hash(self.rows, phase, step, self.columns)}

    def holds(self, digest: dict[str, Any], phase: str, step: int) -> bool:
        """Whether this digest is that of the rows that an earlier process left."""
        return _hash(self.old, phase, step, digest["columns"]) == digest["sha256"]

    def series(self) -> dict[str, tuple[list[int], list[float]]]:
        """(steps, values) of each column, by name; in a run of several phases the name is `phase: column`."""
        found: dict[str, tuple[list[int], list[float]]] = {}
        for (phase, step), row in self.rows.items():
            for name, text in row.items():
                if name not in ("step", "phase"):
                    xs, ys = found.setdefault(name if phase == MAIN else f"{phase}: {name}", ([], []))
                    xs.append(step)
                    ys.append(float(text))
        return found

    def _text(self, rows: dict[Key, dict[str, str]]) -> str:
        return "".join(",".join(row.get(column, "") for column in self.columns) + "\n" for row in rows.values())

    def _append(self, data: bytes) -> None:
        with self.path.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                if file.write(data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(size)  # no half row stays
                raise

    def _read(self) -> dict[Key, dict[str, str]]:
        """The whole lines of the file; a last one that was cut short is dropped. UserError if the rest is damaged."""
        text = reading.text_file(self.path, fix=FIX)
        whole = text[: text.rfind("\n") + 1]
        rows: dict[Key, dict[str, str]] = {}
        lines = csv.reader(io.StringIO(whole))
        columns = next(lines, [])
        for number, cells in enumerate(lines, start=2):
            row = {name: cell for name, cell in zip(columns, cells, strict=False) if cell}
            try:
                values = [float(text) for name, text in row.items() if name != "phase"]
                if len(cells) != len(columns) or not all(map(math.isfinite, values)):
                    raise ValueError
                rows[(row.get("phase", MAIN), int(row["step"]))] = row
            except (ValueError, KeyError):
                raise UserError(f"{self.path}, line {number} is damaged: {FIX}") from None
        return rows


def _hash(rows: dict[Key, dict[str, str]], phase: str, step: int, columns: list[str]) -> str:
    """Digest of the rows of the first step - 1 steps of a phase, in these columns."""
    table = [
        [row.get(column, "") for column in columns]
        for key, row in rows.items()
        if key[0] == phase and key[1] < step - 1
    ]
    return hashlib.sha256(repr(table).encode()).hexdigest()
