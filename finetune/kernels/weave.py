"""Deliberate faults of the CUDA sources: the `.faults` files, and the copies of the sources that they are woven into.

Readers and nvcc see a kernel as it is. Its faults are in a TOML file of the same name next to it (`rms_norm.faults`):

    shared = ["block_sum.no_barrier"]           # faults of included files that are tried on this kernel, too

    [[fault]]
    name = "rms_norm.past_the_end"
    line = "dim = a.dim;"                       # a text that one line of the source has
    old = "a.dim"                               # the part of it that is replaced; omitted: all of it
    new = "a.dim + 1"                           # by what; "" deletes a statement
    wrong = "reads one element behind the row"  # what it breaks; `slow` instead: what it costs

An entry with the name of an earlier one is a further edit of that fault and does not say again what it breaks.
`after = "…"`: of several such lines, the first one below the line that has this text. `times = 2`: two lines have the
text, and both are edited. `file = "x.cuh"`: the source, if its name is another one.

The emulator compiles a copy in which each edit is made if the fault is switched on (`emulator::bug`), in the same line:
    (emulator::bug("…") ? new : old)                    of an expression
    { if (emulator::bug("…")) { new } else { old } }    of a statement, which ends in a semicolon
Only one fault is on at a time, so edits may be nested. A text that fits no line, or too many, fails the build.

CMake runs this file as a script, so it imports nothing of the project:  python weave.py csrc/cuda build/emulator/woven
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KEYS = {"name", "line", "old", "new", "after", "times", "file", "wrong", "slow"}


class BadFault(ValueError):
    """A fault that cannot be woven in; the message names it and the line of its file."""


@dataclass(frozen=True)
class Edit:
    """One replacement within a line of `source`."""

    fault: str
    source: Path
    line: str
    old: str
    new: str
    after: str
    times: int
    where: str  # file and line of the entry

    @property
    def is_statement(self) -> bool:
        return self.old.endswith(";")


@dataclass(frozen=True)
class Fault:
    name: str
    breaks: str
    is_slow: bool
    edits: tuple[Edit, ...]


@dataclass(frozen=True)
class Sidecar:
    """A `.faults` file: its own faults in order, and the names of those that it borrows from included files."""

    path: Path
    faults: tuple[Fault, ...] = ()
    shared: tuple[str, ...] = ()


def read(path: Path) -> Sidecar:
    """The faults next to a source (`rms_norm.cu` or `rms_norm.faults`); none where there is no such file."""
    path = path.with_suffix(".faults")
    if not path.exists():
        return Sidecar(path)
    text = path.read_text(encoding="utf-8")
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadFault(f"{path.name}: {error}") from None
    heads = [i for i, line in enumerate(text.splitlines(), 1) if line.strip() == "[[fault]]"]
    found: dict[str, Fault] = {}
    for entry, number in zip(content.get("fault", []), heads, strict=True):
        edit = _edit(path, entry, f"{path.name}:{number}")
        if edit.fault in found:
            before = found[edit.fault]
            found[edit.fault] = Fault(before.name, before.breaks, before.is_slow, (*before.edits, edit))
        elif ("wrong" in entry) == ("slow" in entry):
            raise BadFault(f"{edit.where}: {edit.fault} must say what it breaks, as `wrong` or `slow`")
        else:
            found[edit.fault] = Fault(edit.fault, entry.get("wrong") or entry["slow"], "slow" in entry, (edit,))
    return Sidecar(path, tuple(found.values()), tuple(content.get("shared", ())))


def _edit(path: Path, entry: dict, where: str) -> Edit:
    name = entry.get("name", "a fault without a name")
    if odd := entry.keys() - KEYS:
        raise BadFault(f"{where}: {name} has unknown keys: {', '.join(sorted(odd))}")
    if lacking := {"name", "line", "new"} - entry.keys():
        raise BadFault(f"{where}: {name} lacks {', '.join(sorted(lacking))}")
    line, old = entry["line"], entry.get("old", entry["line"])
    if line.count(old) != 1:
        raise BadFault(f"{where}: {name}: '{old}' is {line.count(old)} times in its line '{line}'")
    if "file" in entry:
        source = path.parent / entry["file"]
    else:
        source = next((p for ending in (".cu", ".cuh") if (p := path.with_suffix(ending)).exists()), path)
    edit = Edit(name, source.resolve(), line, old, entry["new"], entry.get("after", ""), entry.get("times", 1), where)
    if not edit.new and not edit.is_statement:
        raise BadFault(f"{where}: {name} deletes '{old}', which is no statement")
    return edit


# --- weaving


@dataclass(frozen=True)
class Span:
    """The place of an edit in its line."""

    begin: int
    end: int
    edit: Edit


Choose = Callable[[Edit, str], str]  # (an edit, the text that it would replace) → the woven text


def at_run_time(edit: Edit, kept: str) -> str:
    """Both texts, and the switch between them."""
    on = f'emulator::bug("{edit.fault}")'
    if edit.is_statement:
        return f"{{ if ({on}) {{ {edit.new} }} else {{ {kept} }} }}"
    return f"({on} ? {edit.new} : {kept})"


def planted(edit: Edit, kept: str) -> str:
    """The fault alone, for a compiler that knows no switch (nvcc)."""
    return edit.new or ";" if edit.is_statement else f"({edit.new})"


def weave(text: str, edits: Iterable[Edit], choose: Choose = at_run_time) -> str:
    """A source with the edits in it; no line moves."""
    lines = text.split("\n")
    spans: dict[int, list[Span]] = {}
    for edit in edits:
        for i in _lines_of(edit, lines):
            begin = lines[i].index(edit.line) + edit.line.index(edit.old)
            spans.setdefault(i, []).append(Span(begin, begin + len(edit.old), edit))
    for i, found in spans.items():
        lines[i] = _woven(lines[i], 0, len(lines[i]), found, choose)
    return "\n".join(lines)


def _lines_of(edit: Edit, lines: list[str]) -> list[int]:
    """The numbers of the lines that an edit changes."""

    def having(text: str) -> list[int]:
        return [i for i, line in enumerate(lines) for _ in range(line.count(text))]

    def complaint(text: str, count: int) -> BadFault:
        return BadFault(
            f"{edit.where}: {edit.fault}: '{text}' is {count} times in {edit.source.name}, not {edit.times}"
        )

    hits = having(edit.line)
    if edit.after:
        start = having(edit.after)
        if len(start) != 1:
            raise complaint(edit.after, len(start))
        hits = [i for i in hits if i > start[0]][:1]
    if len(hits) != edit.times or len(set(hits)) != edit.times:
        raise complaint(edit.line, len(hits))
    return hits


def _woven(line: str, begin: int, end: int, spans: list[Span], choose: Choose) -> str:
    """line[begin:end] with its spans replaced, the inner ones within the outer ones' kept text."""
    out, at, rest = "", begin, sorted(spans, key=lambda s: (s.begin, -s.end))
    while rest:
        outer, *rest = rest
        inner = [s for s in rest if s.begin < outer.end]
        rest = rest[len(inner) :]
        if crossing := next((s for s in inner if s.end > outer.end), None):
            raise BadFault(
                f"{crossing.edit.where}: {crossing.edit.fault} crosses {outer.edit.fault} in '{line.strip()}'"
            )
        out += line[at : outer.begin] + choose(outer.edit, _woven(line, outer.begin, outer.end, inner, choose))
        at = outer.end
    return out + line[at:end]


def edits_of(folder: Path) -> dict[Path, list[Edit]]:
    """All edits of the faults in a folder and below it, by source."""
    found: dict[Path, list[Edit]] = {}
    for path in sorted(folder.rglob("*.faults")):
        for fault in read(path).faults:
            for edit in fault.edits:
                found.setdefault(edit.source, []).append(edit)
    if absent := next(
        (edits[0] for source, edits in found.items() if source.suffix == ".faults" or not source.exists()), None
    ):
        raise BadFault(f"{absent.where}: {absent.fault} is in no source: {absent.source.name} is not there")
    return found


def copy(source: Path, target: Path, edits: Iterable[Edit]) -> None:
    """The woven copy of one source, written only if it changes. Messages and debuggers name the source itself."""
    text = f'#line 1 "{source.resolve()}"\n' + weave(source.read_text(encoding="utf-8"), edits)
    if not target.exists() or target.read_text(encoding="utf-8") != text:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")


def copy_folder(source: Path, target: Path) -> None:
    """Woven copies of all .cu and .cuh files of a folder; copies of what is gone go."""
    edits = edits_of(source)
    sources = sorted(path for path in source.rglob("*.cu*") if path.suffix in (".cu", ".cuh"))
    for path in sources:
        copy(path, target / path.relative_to(source), edits.get(path.resolve(), ()))
    for old in target.rglob("*.cu*"):
        if not (source / old.relative_to(target)).exists():
            old.unlink()


if __name__ == "__main__":
    try:
        copy_folder(Path(sys.argv[1]), Path(sys.argv[2]))
    except BadFault as error:
        sys.exit(str(error))
