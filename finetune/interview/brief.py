"""A spoken brief over a run's own numbers.

A brief is a list of passages. A passage is included if its condition (`when`) holds for the run and the run has every
number that it names, so it claims only what this run did and measured.

In a passage {name} is, in this order: a metric of the run, a value of its summary ({seconds}, {peak_rss_bytes}, …), a
setting ({steps}, {batch}, …); {baseline.name}, {target.name} and {error.name}, its standard error, are those of a
metric; {abs.name} is without its sign, {percent.name} in hundredths; {lowest.phase.name} is the least mean of WINDOW
steps in metrics.csv; {derived.x} are computed below. A metric with a standard error is shown with it.

A condition is one or more of NAME (is there and not false), `not NAME` and `NAME OP VALUE`, joined by `and`; OP is one
of == != < <= > >=, VALUE a word, a number or another name: "method == lora", "loss_fp16 > loss_before and not toy".
"""

from __future__ import annotations

import csv
import operator
import re
from pathlib import Path
from typing import Any

import msgspec

from finetune.errors import UserError, nearest
from finetune.interview import content
from finetune.runs import reading, run_folder
from finetune.runs.display import uncertain
from finetune.runs.metrics import MAIN
from finetune.runs.registry import ModuleInfo

FIELD = re.compile(r"\{([a-z_0-9.]+)\}")
OPERATORS = {"==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt,
             ">=": operator.ge}  # fmt: skip
WINDOW = 10
AUDIBLE = 1e-3  # of a value: a smaller standard error is below the digits that are spoken
Facts = dict[str, Any]


class Settings(msgspec.Struct):
    """What a brief needs of a run's config.json."""

    config: dict[str, Any]


def last_run(info: ModuleInfo) -> Path:
    """The newest finished run; default settings are preferred to toy ones. UserError says which command makes one."""
    found = sorted(
        (info.folder / "output").glob("*/summary.json"),
        key=lambda path: (not run_folder.summary(path.parent)["toy"], path.stat().st_mtime),
    )
    if not found:
        raise UserError(
            f"'{info.name}' has no finished run to speak about: python -m finetune run {info.name} makes one "
            "(with --toy in a minute or two)"
        )
    return found[-1].parent


def facts(folder: Path) -> Facts:
    """Everything that a brief may name, of the run in this folder: numbers, words, true and false."""
    settings = reading.json_file(folder / run_folder.SETTINGS, Settings).config
    return gather(run_folder.summary(folder), settings) | lowest(folder / "metrics.csv")


def gather(summary: dict[str, Any], settings: dict[str, Any]) -> Facts:
    found = {**_plain(settings), **_plain(summary), **_plain(summary["metrics"])}
    for name, check in summary.get("checks", {}).items():
        found |= {name: check["value"]} | ({f"error.{name}": check["error"]} if "error" in check else {})
    for group in ("baseline", "target", "standard_error"):
        short = group.removeprefix("standard_")
        found |= {f"{short}.{name}": value for name, value in _plain(summary.get(group) or {}).items()}
    found["derived.minutes"] = summary["seconds"] / 60
    found["derived.peak_gb"] = summary["peak_rss_bytes"] / 1e9
    for name, value in _plain(summary.get("baseline") or {}).items():
        if value and name in summary["metrics"]:
            found[f"derived.{name}_change_percent"] = 100 * abs(summary["metrics"][name] / value - 1)
    return found


def lowest(path: Path) -> Facts:
    """Of every loss in a run's metrics.csv, by phase: its least mean over WINDOW steps."""
    series: dict[str, list[float]] = {}
    if path.exists():
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if value and name and "loss" in name:
                        series.setdefault(f"lowest.{row.get('phase', MAIN)}.{name}", []).append(float(value))
    return {
        name: min(sum(values[i : i + WINDOW]) / WINDOW for i in range(len(values) - WINDOW + 1))
        for name, values in series.items()
        if len(values) >= WINDOW
    }


def _plain(values: dict[str, Any]) -> Facts:
    return {k: v for k, v in values.items() if isinstance(v, (int, float, str))}


def holds(condition: str, found: Facts) -> bool:
    """Whether the run meets the condition; a name that the run lacks is false."""
    return all(_one(part.split(), condition, found) for part in condition.split(" and "))


def _one(words: list[str], condition: str, found: Facts) -> bool:
    if len(words) == 1:
        return found.get(words[0], False) is not False
    if len(words) == 2 and words[0] == "not":
        return found.get(words[1], False) is False
    if len(words) != 3 or words[1] not in OPERATORS:
        raise UserError(f"a brief's condition '{condition}' is not NAME, not NAME or NAME OP VALUE, joined by and")
    left, right = (_value(word, found) for word in (words[0], words[2]))
    if left is None:
        return False
    right = words[2] if right is None else right
    if not isinstance(left, str) and isinstance(right, str):
        try:
            right = float(right)
        except ValueError:
            return False
    try:
        return bool(OPERATORS[words[1]](left, right))
    except TypeError:
        return False


def spoken(value: float, lang: str) -> str:
    """A number as it is spoken: three digits, large ones in words."""
    units = {
        "en": ((1e9, " billion"), (1e6, " million"), (1e3, " thousand")),
        "zh": ((1e8, " 亿"), (1e4, " 万")),
    }[lang]
    if 0 < abs(value) < 1e-6:
        return {"en": "less than a millionth", "zh": "不到百万分之一"}[lang]
    for size, word in units:
        if abs(value) >= max(size, 1e4):
            return f"{value / size:.3g}{word}".replace("-", "−")
    text = str(value) if isinstance(value, int) else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return text.replace("-", "−")


def fill(template: str, found: Facts, lang: str) -> str:
    """The template with its numbers and words. UserError names a field that the run does not have."""

    def one(match: re.Match[str]) -> str:
        name = match[1]
        if _missing(name, found):
            raise UserError(f"the brief names {{{name}}}, which the run does not have{nearest(name, found)}")
        value = _value(name, found)
        if isinstance(value, str):
            return value
        percent = name.startswith("percent.")
        error = found.get(f"error.{name.removeprefix('abs.').removeprefix('percent.')}") or 0.0
        error *= 100 if percent else 1
        if error < AUDIBLE * abs(value):
            text = f"{value:.3g}" if percent else spoken(value, lang)
        else:
            text = uncertain(value, error).replace("-", "−") if error else spoken(value, lang)
        return text + ("%" if percent else "")

    text = FIELD.sub(one, template).strip()
    return text if lang == "en" else re.sub(r"(?<=[万亿]) (?=[\u4e00-\u9fff])| (?=不到)", "", text)


def _value(name: str, found: Facts) -> Any:
    """A named value as text; None if the run does not have it."""
    kind, _, rest = name.partition(".")
    if kind not in ("abs", "percent"):
        return found.get(name)
    value = found.get(rest)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    return abs(value) if kind == "abs" else 100 * value


def _missing(name: str, found: Facts) -> bool:
    value = _value(name, found)
    return value is None or isinstance(value, bool)


def passages(interview: content.Interview, found: Facts, lang: str) -> list[str]:
    """The passages that apply to this run. UserError if none of them has a number of the run."""
    able = [p for p in interview.brief if not p.when or holds(p.when, found)]
    have = [p for p in able if not any(_missing(name, found) for name in FIELD.findall(p.text[lang]))]
    if not any(FIELD.search(p.text[lang]) for p in have):
        for passage in able:
            fill(passage.text[lang], found, lang)  # names what is missing
    return [fill(p.text[lang], found, lang) for p in have]


def brief(info: ModuleInfo, lang: str = "en", run: Path | None = None) -> str:
    """The module's brief and place as Markdown, with the numbers of `run` (the newest finished one)."""
    interview = content.read(info)
    folder = run or last_run(info)
    text = (" " if lang == "en" else "").join(passages(interview, facts(folder), lang))
    title, source = (info.title, "Numbers from") if lang == "en" else (info.title_zh, "数字来自")
    return f"# {title}\n\n{text}\n\n{interview.place[lang].strip()}\n\n*{source} {folder.name}*\n"
