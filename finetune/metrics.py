"""metrics.csv: a row a step, in memory and on the disk."""

import csv
import errno
import io
import os
from pathlib import Path

from finetune.checkpoint import atomic_write, writing

Key = tuple[str, int]  # (phase, step)
MAIN = "train"  # the phase of a run that has only one; it needs no column


class Metrics:
    """Rows keyed by (phase, step). Values stay text, so that a resumed file equals an uninterrupted one byte for byte.

    A finished row is appended with one write; a new column or a change to a written row rewrites the file under a
    temporary name. Rows of an earlier process (`resume`) count only after `keep` says up to which step.
    """

    def __init__(self, path: Path, resume: bool = False) -> None:
        self.path = path
        self.rows: dict[Key, dict[str, str]] = {}
        self.old = self._read() if resume and path.exists() else {}
        self.pending: dict[Key, dict[str, str]] = {}  # the rows not on the disk yet
        self.columns: list[str] = []  # the header on the disk
        self.stale = True  # the file does not exist, or a row in it has changed

    def log(self, phase: str, step: int, values: dict[str, str]) -> None:
        """Adds to the row of a step. A row is written when the next one begins, or by `flush`."""
        key = (phase, step)
        if key not in self.rows:
            self.flush()
            self.rows[key] = self.pending[key] = {"step": str(step)} | ({} if phase == MAIN else {"phase": phase})
        row = self.rows[key]
        if key not in self.pending and not values.items() <= row.items():
            self.stale = True
        row.update(values)

    def keep(self, phase: str, start: int) -> None:
        """Takes over the rows an earlier process wrote for steps before `start` of this phase; drops its others."""
        kept = {k: row for k, row in self.old.items() if k[0] == phase and k[1] < start}
        if kept:
            order = [k for k in self.old if k in kept or k in self.rows] + [k for k in self.rows if k not in self.old]
            self.rows = {k: kept.get(k, {}) | self.rows.get(k, {}) for k in order}
            self.stale = True
        self.flush()

    def flush(self) -> None:
        if not self.rows:
            return
        added = {column: None for row in self.pending.values() for column in row if column not in self.columns}
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
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        rows = {}
        for cells in csv.DictReader(io.StringIO("".join(line for line in lines if line.endswith("\n")))):
            row = {name: text for name, text in cells.items() if text}
            rows[(row.get("phase", MAIN), int(row["step"]))] = row
        return rows
