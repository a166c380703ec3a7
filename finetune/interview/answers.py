"""The same prompts answered by the models of several runs: what `finetune compare` shows below its table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from rich.console import Console

from finetune import chat
from finetune.errors import UserError
from finetune.lm.io import load
from finetune.peft import bases
from finetune.runs import reading, run_folder

FILE, TABLES = "answers.json", "samples.json"  # of a run: all kept answers, or tables with some
QUESTIONS, LATEST = ("prompt", "question"), ("after", "policy")  # the columns with prompts, and with last answers


@dataclass(frozen=True)
class Run:
    """What a run offers: its name here, the prompts that it kept with the last answers, whether they are questions to a
    chat model (else texts to continue), and the folder of its model, if there is one."""

    name: str
    folder: Path
    answers: dict[str, str]
    chat: bool
    model: Path | None


def read(name: str, folder: Path) -> Run | None:
    """The run of a folder; None if it kept no answers. UserError for a damaged file."""
    if not (rows := kept(folder)):
        return None
    question, answer = (next(key for key in keys if key in rows[0]) for keys in (QUESTIONS, LATEST))
    settings = run_folder.read(folder).config
    # A module without the setting knows conversations only; what a module writes itself is continued as it stands.
    asks = "raw" not in settings or not (settings["raw"] or settings.get("data") is None)
    model = folder / "model"
    there = any((model / file).exists() for file in (load.ADAPTER_CONFIG, "config.json"))
    said = {row[question]: row[answer] for row in rows if question in row and answer in row}
    return Run(name, folder, said, asks, model if there else None)


def kept(folder: Path) -> list[dict[str, str]]:
    """The rows of prompts and answers of a run, all with the same keys."""
    fix = "delete it, and compare shows what the run's model answers"
    if (folder / FILE).exists():
        tables = [reading.json_file(folder / FILE, list[dict[str, str]], fix)]
    elif (folder / TABLES).exists():
        found = reading.json_file(folder / TABLES, list[dict[str, Any]], fix)
        tables = [reading.convert(one.get("rows"), list[dict[str, Any]], folder / TABLES, fix) for one in found]
    else:
        return []
    for rows in tables:
        if rows and all(any(key in rows[0] for key in keys) for keys in (QUESTIONS, LATEST)):
            return [{key: str(value) for key, value in row.items()} for row in rows]
    return []


def chosen(runs: Sequence[Run], count: int) -> list[tuple[str, bool]]:
    """`count` prompts, and whether each is a question to a chat model: of each run in turn, those first that most runs
    kept."""
    times = Counter(prompt for run in runs for prompt in run.answers)
    queues = [[(p, run.chat) for p in sorted(run.answers, key=lambda p: -times[p])] for run in runs]
    found = {one[0]: one[1] for row in zip_longest(*queues) for one in row if one}
    return list(found.items())[:count]


@dataclass
class Answers:
    """To each prompt the answers by name, and why runs did not answer with their models."""

    rows: list[dict[str, str]]
    notes: list[str]


def answered(
    runs: Sequence[Run], prompts: Sequence[tuple[str, bool | None]], new_tokens: int, console: Console | None = None
) -> Answers:
    """Greedy answers of at most `new_tokens` tokens by name of the run; "base": of the model that adapters were trained
    on. A run without a model, or whose model cannot read a prompt, gives the answer that it kept, under "name (kept)",
    or none. A prompt of several lines is answered by a line.

    prompts: with whether they are asked by the chat template; None: if the model has one."""
    found = Answers([{} for _ in prompts], [])
    for group in grouped(runs, found.notes):
        for kind in dict.fromkeys(kind for _, kind in prompts):
            some = [i for i, (_, own) in enumerate(prompts) if own is kind]
            texts = [prompts[i][0] for i in some]
            for i, said in zip(some, ask(group, texts, kind, new_tokens, console, found.notes), strict=True):
                line = not kind and "\n" in prompts[i][0]
                found.rows[i] |= {name: text.split("\n")[0] if line else text for name, text in said.items()}
    for i, (prompt, _) in enumerate(prompts):
        row, ordered = found.rows[i], {}
        if chat.BASE in row:
            ordered[chat.BASE] = row[chat.BASE]
        for run in runs:
            if run.name in row:
                ordered[run.name] = row[run.name]
            elif prompt in run.answers:
                ordered[f"{run.name} (kept)"] = run.answers[prompt]
        found.rows[i] = ordered
    return found


def grouped(runs: Sequence[Run], notes: list[str]) -> list[list[Run]]:
    """Runs with a model: those with adapters of one base together, others alone."""
    found: dict[Path, list[Run]] = {}
    for run in runs:
        if not run.model:
            notes.append(f"{run.name}: {run.folder} has no model")
            continue
        try:
            where = bases.base_folder(run.model) if bases.is_adapter(run.model) else run.model
        except UserError as error:
            notes.append(f"{run.name}: {error}")
            continue
        found.setdefault(where, []).append(run)
    return list(found.values())


def ask(
    group: Sequence[Run], prompts: Sequence[str], kind: bool | None, new_tokens: int, console: Console | None,
    notes: list[str],
) -> list[dict[str, str]]:  # fmt: skip
    """For each prompt the answers by name; none where the models cannot read it."""
    names = {str(run.model): run.name for run in group}
    first = next(iter(names))
    adapted = bases.is_adapter(Path(first))
    source, given = (None, list(names)) if adapted else (first, [])
    try:
        # A question is asked by the template of a model that has one; a text is continued by all.
        found = chat.answers(source, list(prompts), False if kind is False else None, adapters=given, compare=adapted,
                             console=console, max_new_tokens=new_tokens)  # fmt: skip
    except UserError as error:
        if len(prompts) == 1:
            notes.append(f"{', '.join(names.values())}: {error}")
            return [{}]
        return [ask(group, [prompt], kind, new_tokens, console, notes)[0] for prompt in prompts]
    if not adapted:
        names = {chat.BASE: group[0].name}
    return [{names.get(key, key): texts[i] for key, texts in found.items()} for i in range(len(prompts))]


def markdown(prompts: Sequence[str], rows: Sequence[dict[str, str]], notes: Sequence[str]) -> str:
    """A page: a section a prompt, with the answers as literal text."""
    parts = []
    for prompt, row in zip(prompts, rows, strict=True):
        parts.append("## Prompt\n\n" + literal(prompt))
        parts += [f"**{name}**\n\n{literal(text)}" for name, text in row.items()]
    return "\n\n".join([*parts, *(f"- {note}" for note in notes)]) + "\n"


def literal(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.split("\n")) if text.strip() else "    (nothing)"
