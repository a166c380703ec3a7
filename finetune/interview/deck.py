"""The questions as an Anki deck (.apkg), made with `genanki`. Importing a newer deck updates the notes and keeps the
learner's progress: deck, model and notes have fixed ids."""

from __future__ import annotations

import html
from collections.abc import Iterable
from pathlib import Path

from finetune.interview.content import Question
from finetune.runs.checkpoint import atomic_write

DECK, MODEL = 1_730_000_001, 1_730_000_002
TITLE = {"en": "finetune", "zh": "finetune（中文）"}
FIELDS = ("Question", "Points", "Wrong", "Follow-up", "Reference", "Module")


def write(questions: Iterable[Question], path: Path, lang: str = "en") -> int:
    """Writes the deck; the number of notes."""
    import genanki

    shift = 0 if lang == "en" else 10
    model = genanki.Model(
        MODEL + shift,
        "finetune question",
        fields=[{"name": name} for name in FIELDS],
        templates=[
            {
                "name": "question",
                "qfmt": "<small>{{Module}}</small><br>{{Question}}",
                "afmt": "{{FrontSide}}<hr id=answer>{{Points}}<p>✗ {{Wrong}}<p>→ {{Follow-up}}<p>{{Reference}}",
            }
        ],
    )
    deck = genanki.Deck(DECK + shift, TITLE[lang])
    for question in questions:
        text = question.text[lang]
        points = "<ul>" + "".join(f"<li>{html.escape(point)}</li>" for point in text.points) + "</ul>"
        address = question.reference.split()[0]  # what follows it says which part
        link = f'<a href="{html.escape(address)}">{html.escape(question.reference)}</a>'
        plain = (html.escape(text.question), points, html.escape(text.wrong), html.escape(text.follow_up), link)
        module = f"{question.module} · {question.level}"
        deck.add_note(
            genanki.Note(model=model, fields=[*plain, module], guid=f"{question.id}{lang}", tags=[question.module])
        )
    with atomic_write(path) as temporary:
        genanki.Package(deck).write_to_file(str(temporary))
    return len(deck.notes)
