"""The drills that there are: folders drills/<subject>/<name>/ of three or four files.

drill.toml     title, level, minutes, where it is asked, hints, usual mistakes; the task in Chinese
solution.py    a right answer, whose docstring is the task in English with an example; also.py is another
check.py       the inputs it is tried on, and what is compared (finetune/drills/cases.py)

What a learner starts from is made of the solution: the bodies of what they write are replaced (in CUDA and C++ what
stands between the lines `// write this` and `// written`), or, where a bug is to be found, one of the mistakes is in
it. A mistake is an edit of the solution, as a kernel's deliberate faults are.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated

import msgspec

from finetune.errors import UserError, nearest
from finetune.runs import reading, registry

ROOT = Path(__file__).resolve().parents[2] / "drills"
SUBJECTS = ("tensor", "cuda", "triton", "cpp", "debug")
HINTS = 3
NUMBER = r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?"


class Edit(msgspec.Struct):
    """A mistake that people make: what it is in both languages, and the edits of the solution that make it."""

    en: str
    zh: str
    edits: Annotated[list[tuple[str, str]], msgspec.Meta(min_length=1)]  # old text, new text


class DrillToml(msgspec.Struct):
    """drill.toml as parsed."""

    title: registry.Bilingual
    task_zh: str
    level: Annotated[int, msgspec.Meta(ge=1, le=5)]
    minutes: Annotated[int, msgspec.Meta(ge=1, le=120)]
    asked: registry.Bilingual
    write: Annotated[list[str], msgspec.Meta(min_length=1)]  # functions and classes that the learner writes
    hints: Annotated[list[registry.Bilingual], msgspec.Meta(min_length=HINTS, max_length=HINTS)]
    mistakes: dict[str, Edit]
    planted: str = ""  # the mistake that is in what the learner starts from: a bug to find


@dataclass(frozen=True)
class Drill:
    name: str
    subject: str
    folder: Path
    text: DrillToml

    @property
    def solution(self) -> Path:
        return next(self.folder.glob("solution.*"))

    def title(self, lang: str) -> str:
        return str(getattr(self.text.title, lang))

    def mistaken(self, name: str) -> str:
        """The source of the solution with one of its mistakes in it."""
        return edited(self.solution.read_text(encoding="utf-8"), self.text.mistakes[name].edits, f"{self.name}.{name}")

    def stub(self, lang: str) -> str:
        """What the learner starts from: signatures and the task, without the solution's bodies or with a bug in it."""
        source, task = self.solution.read_text(encoding="utf-8"), self.text.task_zh if lang == "zh" else ""
        python, planted = self.solution.suffix == ".py", self.text.planted
        if planted:
            return (retold if python else recommented)(self.mistaken(planted), task)
        return stub(source, self.text.write, task) if python else compiled_stub(source, task)


def edited(source: str, edits: list[tuple[str, str]], name: str) -> str:
    """The source after all edits. ValueError if an old text is not there exactly once."""
    for old, new in edits:
        if source.count(old) != 1:
            raise ValueError(f"mistake {name}: {old!r} is {source.count(old)} times in the solution, not once")
        source = source.replace(old, new)
    return source


def drills() -> list[Drill]:
    """All drills, by level, then subject and name. UserError names a drill.toml that cannot be read."""
    found = [
        Drill(path.parent.name, path.parent.parent.name, path.parent, reading.toml_file(path, DrillToml))
        for path in ROOT.glob("*/*/drill.toml")
    ]
    return sorted(found, key=lambda d: (d.text.level, SUBJECTS.index(d.subject), d.name))


def find(name: str) -> Drill:
    """The drill of this name. UserError suggests the nearest."""
    known = {drill.name: drill for drill in drills()}
    if name not in known:
        raise UserError(f"unknown drill '{name}'{nearest(name, known) or '; `python -m finetune drill` lists all'}")
    return known[name]


@cache
def case_names() -> dict[str, str]:
    """What cases are called in Chinese, by their English names, with # for a number."""
    return reading.toml_file(ROOT / "cases.zh.toml", dict[str, str])


def case_key(name: str, book: dict[str, str]) -> str:
    """Under which key a case's name is in the book; the name if it is not."""
    key = re.sub(NUMBER, "#", name)
    return key if key in book and name not in book else name


def case_name(name: str, lang: str) -> str:
    """What a case is called in this language; English where there is no Chinese name."""
    book = case_names() if lang == "zh" else {}
    key = case_key(name, book)
    return book[key].format(*re.findall(NUMBER, name)) if key in book else name


def retold(source: str, task: str) -> str:
    """The source with `task`, if there is one, in the place of the docstring of the file."""
    head = ast.parse(source).body[0]
    rest = "".join(source.splitlines(keepends=True)[head.end_lineno :])
    return f'"""{task.strip()}\n"""\n{rest}' if task else source


def stub(source: str, write: list[str], task: str = "") -> str:
    """The source with the body of everything in `write` replaced by an exception, and of what else it defines only the
    imports and constants. `task` stands in for the docstring of the file."""
    tree, lines = ast.parse(source), source.splitlines()
    parts: list[str] = []
    if (head := ast.get_docstring(tree)) is not None:
        parts.append(f'"""{(task or head).strip()}\n"""')
    for node in tree.body[1 if head is not None else 0 :]:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            if node.name in write:
                parts.append(f"\n\n{hollow(node, lines)}")
            continue
        text = "\n".join(lines[node.lineno - 1 : node.end_lineno])
        plain = isinstance(node, ast.Import | ast.ImportFrom)
        parts.append(text if plain and parts and parts[-1].lstrip().startswith(("import ", "from ")) else f"\n{text}")
    return "\n".join(parts) + "\n"


def hollow(node: ast.FunctionDef | ast.ClassDef, lines: list[str]) -> str:
    """A function, or a class with its public methods, without bodies; docstrings stay."""
    if isinstance(node, ast.FunctionDef):
        start = min([node.lineno, *(each.lineno for each in node.decorator_list)]) - 1
        first = node.body[0]
        kept = lines[start : first.lineno - 1]
        if ast.get_docstring(node) is not None:
            kept = lines[start : first.end_lineno]
        return "\n".join([*kept, " " * (node.col_offset + 4) + "raise NotImplementedError"])
    first = next(each for each in node.body if isinstance(each, ast.FunctionDef))
    start = min([first.lineno, *(each.lineno for each in first.decorator_list)]) - 1
    public = [e for e in node.body if isinstance(e, ast.FunctionDef) and not re.match(r"_(?!_)", e.name)]
    methods = [hollow(each, lines) for each in public]
    return "\n".join([*lines[node.lineno - 1 : start], "\n\n".join(methods)])


def compiled_stub(source: str, task: str = "") -> str:
    """A CUDA or C++ source without what stands between its marks; `task` stands in for the comment at its head."""
    return recommented(re.sub(r"(?m)^( *// write this)\n(?s:.*?)^ *// written\n", r"\1\n", source), task)


def recommented(text: str, task: str) -> str:
    """The source with `task`, if there is one, in the place of the comment at its head."""
    if not task:
        return text
    return "".join(f"// {line}".rstrip() + "\n" for line in task.strip().splitlines()) + re.sub(
        r"\A(//.*\n)+", "", text
    )
