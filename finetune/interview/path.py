"""The 14-day path (learning/path.toml): its days and levels, its pages, and how far the learner is.

A module is mastered when a run of it has reached its targets and the quiz's last answers to it named at least MASTERED
of the key points. A level is reached when all its modules exist and are mastered, and so are the levels below.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from finetune.interview import content
from finetune.runs import reading, registry, run_folder
from finetune.runs.registry import ModuleInfo

MASTERED = 0.7
FOLDER = Path(__file__).resolve().parents[2] / "learning"


@dataclass(frozen=True)
class Day:
    number: int
    modules: tuple[str, ...]
    text: dict[str, dict[str, str]]  # language → title, look, say


@dataclass(frozen=True)
class Level:
    number: int
    modules: tuple[str, ...]
    title: dict[str, str]


class Part(msgspec.Struct):
    modules: list[str]
    en: Any
    zh: Any


class PathToml(msgspec.Struct):
    """learning/path.toml."""

    days: list[Part]
    levels: list[Part]


def read() -> tuple[list[Day], list[Level]]:
    data = reading.toml_file(FOLDER / "path.toml", PathToml, "the path needs a checkout of the project")
    days = [Day(i, tuple(day.modules), {"en": day.en, "zh": day.zh}) for i, day in enumerate(data.days, start=1)]
    levels = [
        Level(i, tuple(each.modules), {"en": each.en, "zh": each.zh}) for i, each in enumerate(data.levels, start=1)
    ]
    return days, levels


# --- progress


@dataclass(frozen=True)
class Standing:
    """A module's progress: a run that reached its targets, questions answered, share of the points in last answers."""

    module: str
    exists: bool
    passed: bool = False
    asked: int = 0
    questions: int = 0
    share: float = 0.0

    @property
    def mastered(self) -> bool:
        return self.passed and self.asked == self.questions and self.share >= MASTERED

    def missing(self) -> list[str]:
        """The commands that are still to be run, with the reason."""
        if not self.exists:
            return []
        out = []
        if not self.passed:
            out.append(f"python -m finetune run {self.module} --toy")
        if self.asked < self.questions or self.share < MASTERED:
            out.append(f"python -m finetune quiz {self.module}")
        return out


def standing(name: str, known: dict[str, ModuleInfo], entries: dict[str, dict[str, Any]]) -> Standing:
    """entries: those of `quiz.Schedule`."""
    if name not in known:
        return Standing(name, exists=False)
    info = known[name]
    summaries = (run_folder.summary(p.parent) for p in (info.folder / "output").glob(f"*/{run_folder.SUMMARY}"))
    questions = content.read(info).questions
    last = [entries[q.id]["history"][-1]["share"] for q in questions if q.id in entries]
    share = sum(last) / len(last) if last else 0.0
    return Standing(name, True, any(s.get("passed") for s in summaries), len(last), len(questions), share)


def progress(entries: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """level: the highest reached (0 … 5); day: the first with a module that is not mastered, 15 when none is left;
    modules: a `Standing` each; missing: the commands of that day."""
    days, levels = read()
    known = {info.name: info for info in registry.modules()}
    found = {name: standing(name, known, entries) for day in days for name in day.modules}

    level = 0
    while level < len(levels) and all(found[name].mastered for name in levels[level].modules):
        level += 1
    open_days = [d for d in days if any(found[n].exists and not found[n].mastered for n in d.modules)]
    missing = [command for n in open_days[0].modules for command in found[n].missing()] if open_days else []
    day = open_days[0].number if open_days else len(days) + 1
    return {"level": level, "day": day, "modules": found, "missing": missing}


# --- pages

WORDS = {
    "en": {
        "roadmap": "Fourteen days", "levels": "Five levels", "day": "Day", "level": "Level", "run": "Run",
        "look": "Look at", "say": "Be able to say", "none": "does not exist yet",
        "check": "Checked by `python -m finetune progress`: of each module a run that reached its targets, every "
        "question of its quiz answered, and {share:.0%} of the key points named in the last answers.",
        "intro": "An hour or two a day: run the module, read its README and the plots in its run folder, speak its "
        "brief, be questioned. "
        "[Attention](attention.md) has a page of its own, for the day of nanogpt; the [cheat sheet](CHEAT_SHEET.md) is "
        "for every day.",
    },
    "zh": {
        "roadmap": "十四天路线", "levels": "五个等级", "day": "第", "level": "等级", "run": "运行", "look": "看",
        "say": "要能讲清", "none": "尚不存在",
        "check": "由 `python -m finetune progress` 检查：每个模块都有一次达到目标的运行，测验的每个问题都已回答，"
        "并且最近的回答覆盖了 {share:.0%} 的要点。",
        "intro": "每天一两个小时：运行模块，阅读它的 README 和运行目录里的图，出声把讲稿讲一遍，接受提问。"
        "[注意力](attention.zh-CN.md)另有一页，配合 nanogpt 那天；[速查表](CHEAT_SHEET.zh-CN.md)每天可用。",
    },
}  # fmt: skip


def pages() -> dict[str, str]:
    """File name → Markdown of ROADMAP_14_DAYS and LEVEL_CHECKPOINTS, each in both languages."""
    days, levels = read()
    known = {info.name: info for info in registry.modules()}
    out = {}
    for lang in content.LANGUAGES:
        words, end = WORDS[lang], "" if lang == "en" else ".zh-CN"

        def named(name: str, lang: str = lang, none: str = words["none"]) -> str:
            if name not in known:
                return f"`{name}` ({none})"
            info = known[name]
            title = info.title if lang == "en" else info.title_zh
            return f"[{title}](../modules/{info.group}/{name}) `{name}`"

        lines = [f"# {words['roadmap']}", "", words["intro"], ""]
        for day in days:
            text = day.text[lang]
            head = f"{words['day']} {day.number}" if lang == "en" else f"第 {day.number} 天"
            lines += [f"## {head} · {text['title']}", ""]
            lines += [f"- {named(name)}" for name in day.modules]
            if commands := [
                f"python -m finetune {verb} {name}{flag}"
                for name in day.modules
                if name in known
                for verb, flag in (("run", " --toy"), ("brief", f" --lang {lang}"), ("quiz", f" --lang {lang}"))
            ]:
                lines += ["", "```sh", *commands, "```"]
            stop = "." if lang == "en" else "。"
            lines += [
                "",
                f"**{words['look']}** {text['look']}{stop}",
                "",
                f"**{words['say']}** {text['say']}{stop}",
                "",
            ]
        out[f"ROADMAP_14_DAYS{end}.md"] = "\n".join(lines)
        lines = [f"# {words['levels']}", "", words["check"].format(share=MASTERED), ""]
        for level in levels:
            lines += [f"## {words['level']} {level.number} · {level.title[lang]}", ""]
            lines += [*(f"- {named(name)}" for name in level.modules), ""]
        out[f"LEVEL_CHECKPOINTS{end}.md"] = "\n".join(lines)
    return out
