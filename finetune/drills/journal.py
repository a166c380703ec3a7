"""What a learner has done: drafts, checks, hints and solutions looked at, stars, and when a drill comes again.

A star is a green check without the solution: once it was looked at, the next draft that is started from scratch can
earn one. Nothing is ever locked, and no draft is lost: a new start keeps the old file under a number.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from zlib import crc32

import msgspec

from finetune.drills.catalog import HINTS, Drill
from finetune.errors import UserError
from finetune.interview.content import Question
from finetune.interview.quiz import Schedule, data_folder
from finetune.runs import reading
from finetune.runs.checkpoint import write_json


class Entry(msgspec.Struct):
    """A drill in the journal."""

    checks: int = 0
    green: int = 0  # checks that passed
    star: bool = False
    hints: int = 0  # shown for the present draft
    looked: bool = False  # at the solution, since the present draft was started


class Journal:
    """The learner's folder: <data folder>/drills/ with a draft a drill, journal.json and schedule.json."""

    def __init__(
        self, folder: Path | None = None, now: Callable[[], datetime] = lambda: datetime.now(timezone.utc)
    ) -> None:
        self.folder = folder or data_folder() / "drills"
        self.path = self.folder / "journal.json"
        self.now = now
        self.entries: dict[str, Entry] = {}
        if self.path.exists():
            fix = "it is the drills' journal; fix it or move it away"
            self.entries = reading.json_file(self.path, dict[str, Entry], fix)
        self.schedule = Schedule(self.folder / "schedule.json")

    def entry(self, drill: Drill) -> Entry:
        return self.entries.get(drill.name, Entry())

    def draft(self, drill: Drill) -> Path:
        return self.folder / f"{drill.name}{drill.solution.suffix}"

    def started(self, drill: Drill) -> Path:
        """The draft; UserError if there is none."""
        path = self.draft(drill)
        if not path.is_file():
            raise UserError(f"there is no draft of '{drill.name}': `python -m finetune drill start {drill.name}`")
        return path

    def start(self, drill: Drill, lang: str) -> tuple[Path, Path | None]:
        """Writes the draft; (its file, the file that an earlier draft was moved to)."""
        path, kept = self.draft(drill), None
        self.folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            names = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in itertools.count(1))
            kept = path.rename(next(name for name in names if not name.exists()))
        path.write_text(drill.stub(lang), encoding="utf-8")
        entry = self.entry(drill)
        self.write(drill, hints=0, looked=False, checks=entry.checks)
        return path, kept

    def hint(self, drill: Drill) -> int:
        """Counts a hint; its number, from 0."""
        shown = min(self.entry(drill).hints, HINTS - 1)
        self.write(drill, hints=shown + 1)
        return shown

    def look(self, drill: Drill) -> None:
        """Notes that the solution was looked at."""
        self.write(drill, looked=True)

    def record(self, drill: Drill, ok: bool) -> datetime | None:
        """Notes a check; when a drill that is green comes again."""
        entry = self.entry(drill)
        star = entry.star or (ok and not entry.looked)
        self.write(drill, checks=entry.checks + 1, green=entry.green + ok, star=star)
        if not ok:
            return None
        known = 0.0 if entry.looked else 1.0 if entry.hints == 0 else 2 / 3
        return self.schedule.grade(question(drill), known, self.now())

    def due(self, drill: Drill) -> bool:
        return self.schedule.due(question(drill), self.now())

    def write(self, drill: Drill, **changes: Any) -> None:
        self.entries[drill.name] = msgspec.structs.replace(self.entry(drill), **changes)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.path, msgspec.to_builtins(self.entries))


def question(drill: Drill) -> Question:
    """The drill as the quiz's schedule knows its questions."""
    return Question(f"{crc32(drill.name.encode()):08x}", f"drill/{drill.subject}", drill.text.level, "", {})
