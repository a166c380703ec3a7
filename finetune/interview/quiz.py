"""A quiz in the terminal: question, pause, key points, self-grading point by point, a follow-up on what was missed.

Grades go to FSRS (Ye et al. 2022, "A Stochastic Shortest Path Algorithm for Optimizing Spaced Repetition Scheduling";
the `fsrs` package), which says when a question is due again. The state is a JSON file in the user's data folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import msgspec

from finetune.interview.content import Question
from finetune.runs import reading
from finetune.runs.checkpoint import write_json

WORDS = {
    "en": {
        "level": "level",
        "of": "question {number} of {count}",
        "think": "Answer aloud, then press Enter (q quits). ",
        "points": "A good answer names:",
        "said": "  did you say it? [y/n/q] ",
        "wrong": "The usual wrong answer: ",
        "follow": "Follow-up: ",
        "reference": "Read: ",
        "score": "{named}/{count} of the points named · again {when}",
        "minutes": "in {minutes} minutes",
        "date": "on {date:%Y-%m-%d at %H:%M}",
    },
    "zh": {
        "level": "难度",
        "of": "第 {number} 题，共 {count} 题",
        "think": "说出你的回答，然后按回车（q 退出）。",
        "points": "好的回答会提到：",
        "said": "  你说到了吗？[y/n/q] ",
        "wrong": "常见的错误回答：",
        "follow": "追问：",
        "reference": "阅读：",
        "score": "答出 {named}/{count} 个要点 · 下次复习：{when}",
        "minutes": "{minutes} 分钟后",
        "date": "{date:%Y-%m-%d %H:%M}",
    },
}


def data_folder() -> Path:
    """$FINETUNE_DATA, or the user's data folder."""
    import platformdirs

    return reading.home_path(os.environ.get("FINETUNE_DATA") or platformdirs.user_data_dir("finetune"))


class Answer(msgspec.Struct):
    at: datetime
    share: Annotated[float, msgspec.Meta(ge=0, le=1)]  # of the points that were named


class Review(msgspec.Struct):
    """A card of the scheduler, as far as we read it."""

    card_id: int
    state: int
    due: datetime


class Entry(msgspec.Struct):
    """A question in the schedule."""

    module: str
    level: int
    card: Review
    history: Annotated[list[Answer], msgspec.Meta(min_length=1)]


class Schedule:
    """The review schedule: for each question what was answered and when it is due again."""

    def __init__(self, path: Path) -> None:
        from fsrs import Scheduler

        self.path = path
        self.scheduler = Scheduler(enable_fuzzing=False)  # the same answers give the same dates
        self.entries: dict[str, dict[str, Any]] = {}
        if path.exists():
            fix = "it is the quiz's schedule; fix it or move it away"
            self.entries = reading.json_file(path, dict[str, dict[str, Any]], fix)
            reading.convert(self.entries, dict[str, Entry], path, fix)

    def new(self, question: Question) -> bool:
        return question.id not in self.entries

    def due(self, question: Question, now: datetime) -> bool:
        """Whether the question was asked before and its review date has passed."""
        entry = self.entries.get(question.id)
        return entry is not None and datetime.fromisoformat(entry["card"]["due"]) <= now

    def begun(self, now: datetime) -> int:
        """How many questions were answered for the first time on this day, in local time."""
        firsts = (datetime.fromisoformat(entry["history"][0]["at"]) for entry in self.entries.values())
        return sum(first.astimezone().date() == now.astimezone().date() for first in firsts)

    def grade(self, question: Question, share: float, now: datetime) -> datetime:
        """Records an answer that named this share of the points; when to ask again. All of them is "good", two thirds
        "hard", fewer "again"."""
        from fsrs import Card, Rating

        rating = Rating.Good if share == 1 else Rating.Hard if share >= 2 / 3 else Rating.Again
        entry = self.entries.setdefault(
            question.id, {"module": question.module, "level": question.level, "history": []}
        )
        card = Card.from_dict(entry["card"]) if "card" in entry else Card(card_id=int(question.id, 16))
        card, _ = self.scheduler.review_card(card, rating, now)
        entry["card"] = card.to_dict()
        entry["history"].append({"at": now.isoformat(timespec="seconds"), "share": round(share, 3)})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.entries)
        return card.due


def chosen(
    questions: Iterable[Question], schedule: Schedule, now: datetime, due: bool = False, new: int | None = None
) -> list[Question]:
    """All of them; with `due` those whose time has come; with `new` those never asked, at most that number a day."""
    questions = list(questions)
    if not due and new is None:
        return questions
    review = [q for q in questions if due and schedule.due(q, now)]
    left = max(0, (new or 0) - schedule.begun(now))
    return review + [q for q in questions if schedule.new(q)][:left]


def when(due: datetime, now: datetime, lang: str) -> str:
    """When a question is due again: in minutes within the hour, else by date and local time."""
    minutes = round((due - now).total_seconds() / 60)
    if minutes < 60:
        return WORDS[lang]["minutes"].format(minutes=minutes)
    return WORDS[lang]["date"].format(date=due.astimezone())


def ask(
    questions: Sequence[Question],
    schedule: Schedule,
    lang: str = "en",
    read: Callable[[str], str] = lambda prompt: input(prompt),
    write: Callable[[str, str], None] = lambda text, style: print(text),
    now: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
) -> list[float]:
    """Asks the questions in order until the input ends or is q; returns the share of points named in each. A question
    counts when its last point is graded. write: text, and its style for rich."""
    words, shares = WORDS[lang], []
    try:
        for number, question in enumerate(questions, start=1):
            text = question.text[lang]
            place = words["of"].format(number=number, count=len(questions))
            write(f"\n{place} · {question.module} · {words['level']} {question.level}", "dim")
            write(text.question, "bold")
            _pause(read, words["think"])
            write(words["points"], "")
            missed = []
            for point in text.points:
                write(f"  - {point}", "green")
                if not _yes(read, words["said"]):
                    missed.append(point)
            share = 1 - len(missed) / len(text.points)
            at = now()
            due = schedule.grade(question, share, at)
            shares.append(share)
            write(f"{words['wrong']}{text.wrong}", "red")
            if missed:
                write(f"{words['follow']}{text.follow_up}", "bold")
                _pause(read, words["think"])
            write(f"{words['reference']}{question.reference}", "dim")
            named, count = len(text.points) - len(missed), len(text.points)
            write(words["score"].format(named=named, count=count, when=when(due, at, lang)), "cyan")
    except (EOFError, Quit):
        write("", "")
    return shares


class Quit(Exception):
    """The learner has had enough."""


def _pause(read: Callable[[str], str], prompt: str) -> None:
    if read(prompt).strip().lower() in QUITS:
        raise Quit


def _yes(read: Callable[[str], str], prompt: str) -> bool:
    while (answer := read(prompt).strip().lower()) not in ("y", "yes", "n", "no", "是", "否", *QUITS):
        pass
    if answer in QUITS:
        raise Quit
    return answer in ("y", "yes", "是")


QUITS = ("q", "quit", "退出")
