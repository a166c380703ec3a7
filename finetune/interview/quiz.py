"""A quiz in the terminal: question, pause, key points, self-grading point by point, a follow-up on what was missed.

Grades go to FSRS (Ye et al. 2022, "A Stochastic Shortest Path Algorithm for Optimizing Spaced Repetition Scheduling";
the `fsrs` package), which says when a question is due again. The state is a JSON file in the user's data folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from finetune.checkpoint import write_json
from finetune.errors import UserError
from finetune.interview.content import Question

WORDS = {
    "en": {
        "level": "level",
        "think": "Answer aloud, then press Enter. ",
        "points": "A good answer names:",
        "said": "  did you say it? [y/n] ",
        "wrong": "The usual wrong answer:",
        "follow": "Follow-up:",
        "reference": "Read:",
        "due": "again",
        "score": "of the points named",
    },
    "zh": {
        "level": "难度",
        "think": "说出你的回答，然后按回车。",
        "points": "好的回答会提到：",
        "said": "  你说到了吗？[y/n] ",
        "wrong": "常见的错误回答：",
        "follow": "追问：",
        "reference": "阅读：",
        "due": "下次",
        "score": "个要点已答出",
    },
}


def data_folder() -> Path:
    """$FINETUNE_DATA, or the user's data folder."""
    import platformdirs

    return Path(os.environ.get("FINETUNE_DATA") or platformdirs.user_data_dir("finetune"))


class Schedule:
    """What was asked, how it went and when it is due again, by question."""

    def __init__(self, path: Path) -> None:
        from fsrs import Scheduler

        self.path = path
        self.scheduler = Scheduler(enable_fuzzing=False)  # the same answers give the same dates
        try:
            self.entries: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            self.entries = {}
        except (OSError, ValueError) as e:
            raise UserError(f"the quiz's schedule {path} cannot be read: {e}; mend it or move it away") from None

    def due(self, question: Question, now: datetime) -> bool:
        entry = self.entries.get(question.id)
        return entry is None or datetime.fromisoformat(entry["card"]["due"]) <= now

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


def ask(
    questions: Iterable[Question],
    schedule: Schedule,
    lang: str = "en",
    read: Callable[[str], str] = input,
    write: Callable[[str], None] = print,
    now: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
) -> list[float]:
    """Asks one after another until all are asked or the input ends; the share of points named in each. A question
    counts when its last point is graded."""
    words, shares = WORDS[lang], []
    try:
        for question in questions:
            text = question.text[lang]
            write(f"\n[{question.module} · {words['level']} {question.level}] {text.question}")
            read(words["think"])
            write(words["points"])
            missed = []
            for point in text.points:
                write(f"  - {point}")
                if not _yes(read, words["said"]):
                    missed.append(point)
            share = 1 - len(missed) / len(text.points)
            due = schedule.grade(question, share, now())
            shares.append(share)
            write(f"{words['wrong']} {text.wrong}")
            if missed:
                write(f"{words['follow']} {text.follow_up}")
                read(words["think"])
            write(f"{words['reference']} {question.reference}")
            named = len(text.points) - len(missed)
            write(f"{named}/{len(text.points)} {words['score']} · {words['due']} {due:%Y-%m-%d}")
    except EOFError:
        write("")
    return shares


def _yes(read: Callable[[str], str], prompt: str) -> bool:
    while (answer := read(prompt).strip().lower()) not in ("y", "yes", "n", "no", "是", "否"):
        pass
    return answer in ("y", "yes", "是")
