"""A module's interview.toml, in English and Chinese.

[[brief]]                    # passages, together spoken in 60 to 180 seconds; {name} is a number of the run
when = "method == lora"      # optional: said only of runs for which this holds (finetune.interview.brief)
en = "…"   zh = "…"
[place]                      # among its neighbours
en = "…"   zh = "…"
[[questions]]                # at least 8, of rising level 1 … 5
level = 1
reference = "https://…"
en.question = "…"   en.points = ["…"]   en.wrong = "…"   en.follow_up = "…"      # and the same in zh
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from typing import Any

from finetune.errors import UserError
from finetune.registry import ModuleInfo

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LANGUAGES = ("en", "zh")


@dataclass(frozen=True)
class Text:
    """A question in one language."""

    question: str
    points: tuple[str, ...]  # what a good answer names
    wrong: str  # the usual wrong answer
    follow_up: str


@dataclass(frozen=True)
class Question:
    id: str  # the same as long as the English question is the same
    module: str
    level: int  # 1 … 5
    reference: str
    text: dict[str, Text]


@dataclass(frozen=True)
class Passage:
    """A part of the brief: what it says, and of which runs it is true."""

    when: str  # empty: of all
    text: dict[str, str]


@dataclass(frozen=True)
class Interview:
    brief: tuple[Passage, ...]
    place: dict[str, str]
    questions: tuple[Question, ...]


def read(info: ModuleInfo) -> Interview:
    """The module's interview.toml. UserError names the file and what is wrong with it."""
    path = info.folder / "interview.toml"
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        return Interview(
            brief=tuple(
                Passage(str(part.get("when", "")), {lang: str(part[lang]).strip() for lang in LANGUAGES})
                for part in data["brief"]
            ),
            place={lang: str(data["place"][lang]) for lang in LANGUAGES},
            questions=tuple(_question(info.name, entry) for entry in data["questions"]),
        )
    except FileNotFoundError:
        raise UserError(f"module '{info.name}' has no {path}") from None
    except KeyError as e:
        raise UserError(f"{path}: the entry {e} is missing") from None
    except (OSError, tomllib.TOMLDecodeError, AttributeError, TypeError, ValueError) as e:
        raise UserError(f"{path}: {e}") from None


def _question(module: str, entry: dict[str, Any]) -> Question:
    text = {
        lang: Text(
            str(entry[lang]["question"]),
            tuple(str(point) for point in entry[lang]["points"]),
            str(entry[lang]["wrong"]),
            str(entry[lang]["follow_up"]),
        )
        for lang in LANGUAGES
    }
    name = hashlib.sha256(f"{module}\n{text['en'].question}".encode()).hexdigest()[:12]
    return Question(name, module, int(entry["level"]), str(entry["reference"]), text)
