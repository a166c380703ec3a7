"""A module's interview.toml, in English and Chinese.

[[brief]]                    # passages, together spoken in 60 to 180 seconds; {name} is a number of the run
when = "method == lora"      # optional: included only for runs that meet it (finetune/interview/brief.py)
en = "…"   zh = "…"
[place]                      # among its neighbors
en = "…"   zh = "…"
[[questions]]                # at least 8, of rising level 1 … 5
level = 1
reference = "https://…"
en.question = "…"   en.points = ["…"]   en.wrong = "…"   en.follow_up = "…"      # and the same in zh
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Annotated

import msgspec

from finetune.runs import reading, registry
from finetune.runs.registry import ModuleInfo

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
    """A passage of the brief: its text, and the condition under which it is true."""

    when: str  # empty: of all
    text: dict[str, str]


@dataclass(frozen=True)
class Interview:
    brief: tuple[Passage, ...]
    place: dict[str, str]
    questions: tuple[Question, ...]


class PassageToml(msgspec.Struct):
    en: str
    zh: str
    when: str = ""


class TextToml(msgspec.Struct):
    question: str
    points: list[str]
    wrong: str
    follow_up: str


class QuestionToml(msgspec.Struct):
    level: Annotated[int, msgspec.Meta(ge=1, le=5)]
    reference: str
    en: TextToml
    zh: TextToml


class InterviewToml(msgspec.Struct):
    """interview.toml as parsed."""

    brief: list[PassageToml]
    place: registry.Bilingual
    questions: list[QuestionToml]


def read(info: ModuleInfo) -> Interview:
    """The module's interview.toml. UserError names the file and what is wrong with it."""
    path = info.folder / "interview.toml"
    given = reading.toml_file(path, InterviewToml, f"module '{info.name}' needs it")
    return Interview(
        brief=tuple(
            Passage(part.when, {lang: getattr(part, lang).strip() for lang in LANGUAGES}) for part in given.brief
        ),
        place={lang: getattr(given.place, lang) for lang in LANGUAGES},
        questions=tuple(_question(info.name, entry) for entry in given.questions),
    )


def _question(module: str, entry: QuestionToml) -> Question:
    texts: dict[str, TextToml] = {lang: getattr(entry, lang) for lang in LANGUAGES}
    text = {lang: Text(t.question, tuple(t.points), t.wrong, t.follow_up) for lang, t in texts.items()}
    name = hashlib.sha256(f"{module}\n{entry.en.question}".encode()).hexdigest()[:12]
    return Question(name, module, entry.level, entry.reference, text)
