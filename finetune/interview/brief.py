"""A spoken brief over a run's own numbers.

A template's {name} is, in this order: a metric of the run, a value of its summary ({seconds}, {peak_rss_bytes}, …), a
setting ({steps}, {batch}, …); {baseline.name}, {target.name} and {error.name}, its standard error, are those of a
metric; {derived.x} are computed below.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from finetune.errors import UserError, nearest
from finetune.interview import content
from finetune.registry import ModuleInfo

FIELD = re.compile(r"\{([a-z_0-9.]+)\}")


def last_run(info: ModuleInfo) -> Path:
    """The newest finished run; default settings go before toy ones. UserError says which command makes one."""
    found = sorted(
        (info.folder / "output").glob("*/summary.json"),
        key=lambda path: (not json.loads(path.read_text(encoding="utf-8")).get("toy"), path.stat().st_mtime),
    )
    if not found:
        raise UserError(
            f"'{info.name}' has no finished run to speak about: python -m finetune run {info.name} makes one "
            "(--toy in seconds)"
        )
    return found[-1].parent


def numbers(folder: Path) -> dict[str, float]:
    """Everything that a template may name, of the run in this folder."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))["config"]
    except (OSError, ValueError, KeyError) as e:
        raise UserError(f"{folder} holds no finished run: {e}") from None
    found = {**_numeric(settings), **_numeric(summary), **_numeric(summary["metrics"])}
    for group in ("baseline", "target", "standard_error"):
        short = group.removeprefix("standard_")
        found |= {f"{short}.{name}": value for name, value in _numeric(summary.get(group) or {}).items()}
    found["derived.minutes"] = summary["seconds"] / 60
    found["derived.peak_gb"] = summary["peak_rss_bytes"] / 1e9
    for name, value in _numeric(summary.get("baseline") or {}).items():
        if value and name in summary["metrics"]:
            found[f"derived.{name}_change_percent"] = 100 * abs(summary["metrics"][name] / value - 1)
    return found


def _numeric(values: dict[str, Any]) -> dict[str, float]:
    return {k: v for k, v in values.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


def spoken(value: float, lang: str) -> str:
    """A number as one says it: three digits, large ones in words."""
    units = {
        "en": ((1e9, " billion"), (1e6, " million"), (1e3, " thousand")),
        "zh": ((1e8, "亿"), (1e4, "万")),
    }[lang]
    for size, word in units:
        if abs(value) >= max(size, 1e4):
            return f"{value / size:.3g}{word}"
    return str(value) if isinstance(value, int) else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def fill(template: str, values: dict[str, float], lang: str) -> str:
    """The template with its numbers. UserError names a field that the run does not have."""

    def one(match: re.Match[str]) -> str:
        name = match[1]
        if name not in values:
            raise UserError(f"the brief names {{{name}}}, which the run does not have{nearest(name, values)}")
        return spoken(values[name], lang)

    return FIELD.sub(one, template).strip()


def brief(info: ModuleInfo, lang: str = "en", run: Path | None = None) -> str:
    """The module's brief and place as Markdown, with the numbers of `run` (the newest finished one)."""
    interview = content.read(info)
    folder = run or last_run(info)
    text = fill(interview.brief[lang], numbers(folder), lang)
    title, source = (info.title, "Numbers from") if lang == "en" else (info.title_zh, "数字来自")
    return f"# {title}\n\n{text}\n\n{interview.place[lang].strip()}\n\n*{source} {folder.name}*\n"
