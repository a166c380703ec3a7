"""`python -m finetune brief | quiz | compare`."""

import json as jsonlib
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import rich_click as click

from finetune.errors import UserError

LANG = click.option("--lang", type=click.Choice(["en", "zh"]), default="en", show_default=True, help="Language.")

WORDS = {
    "en": {
        "deck": "{count} questions in {path}",
        "none": "nothing is due; --new N asks new ones",
        "end": "questions answered: {count}, points named: {share:.0%} · {path}",
        "level": "level {level} of {levels}",
        "day": "day {day} of {days}",
        "missing": "to do:",
        "all": "everything that exists is mastered",
    },
    "zh": {
        "deck": "{path}：{count} 个问题",
        "none": "没有到期的问题；--new N 可以加新题",
        "end": "已回答 {count} 个问题，答出 {share:.0%} 的要点 · {path}",
        "level": "等级 {level}，共 {levels} 级",
        "day": "第 {day} 天，共 {days} 天",
        "missing": "待做：",
        "all": "现有的都已掌握",
    },
}


@click.command()
@click.argument("module", required=False)
@click.option("--all", "all_", is_flag=True, help="Every module that has a run; needs --out.")
@click.option("--run", type=click.Path(path_type=Path), help="Run folder; default: the module's newest finished run.")
@click.option("--out", type=click.Path(path_type=Path), help="Write <module>.<lang>.md there instead of printing.")
@LANG
def brief(module: str | None, all_: bool, run: Path | None, out: Path | None, lang: str) -> int:
    """What to say about a module in two or three minutes, with your own run's numbers."""
    from finetune.interview import brief as engine
    from finetune.runs import display, registry
    from finetune.runs.checkpoint import atomic_write, writing

    if all_ == bool(module):
        raise UserError("brief MODULE, or brief --all --out DIR")
    if all_ and (run or not out):
        raise UserError("--all writes a file a module: it needs --out DIR, and takes no --run")
    missing = []
    for info in registry.modules() if all_ else [registry.find(module or "")]:
        try:
            text = engine.brief(info, lang, run)
        except UserError as e:
            if not all_:
                raise
            missing.append(str(e))
            continue
        if out is None:
            display.say(display.console(), text.rstrip())
            continue
        path = out / f"{info.name}.{lang}.md"
        with writing(path):
            out.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        click.echo(str(path))
    for line in missing:
        click.echo(line, err=True)
    return 0


@click.command()
@click.argument("module", required=False)
@click.option("--day", type=click.IntRange(1, 14), help="The modules of that day of the path.")
@click.option("--level", type=click.IntRange(1, 5), help="Only questions of this difficulty.")
@click.option("--due", is_flag=True, help="Only questions to repeat whose time has come.")
@click.option("--new", type=click.IntRange(0), help="New questions, at most N a day; with --due in addition.")
@click.option("--limit", type=click.IntRange(1), help="At most N questions.")
@click.option("--export", type=click.Choice(["anki"]), help="Write a deck for Anki instead of asking.")
@click.option("--out", type=click.Path(path_type=Path), help="File of --export; default: finetune-<lang>.apkg.")
@LANG
def quiz(
    module: str | None,
    day: int | None,
    level: int | None,
    due: bool,
    new: int | None,
    limit: int | None,
    export: str | None,
    out: Path | None,
    lang: str,
) -> int:
    """Be questioned: quiz [MODULE | --day N] [--due] [--new N]. Your grades decide when a question comes again."""
    from finetune.interview import content
    from finetune.interview import quiz as engine
    from finetune.runs import display, registry

    if module and day:
        raise UserError("quiz MODULE or quiz --day N, not both")
    infos = [registry.find(module)] if module else [m for m in registry.modules() if day in (None, m.day)]
    if not infos:
        raise UserError(f"day {day} has no module yet; `python -m finetune list` shows what there is")
    questions = [q for info in infos for q in content.read(info).questions if level in (None, q.level)]
    if not questions:
        raise UserError(f"{', '.join(info.name for info in infos)}: no question has level {level}")
    if export:
        from finetune.interview import deck

        path = out or Path(f"finetune-{lang}.apkg")
        click.echo(WORDS[lang]["deck"].format(count=deck.write(questions, path, lang), path=path))
        return 0
    schedule = engine.Schedule(engine.data_folder() / "quiz.json")
    questions = engine.chosen(questions, schedule, datetime.now(timezone.utc), due, new)[:limit]
    console = display.console()
    if not questions:
        display.say(console, WORDS[lang]["none"])
        return 0

    def write(text: str, style: str) -> None:
        display.say(console, text, style, indent="    " if text.startswith("  - ") else "")

    shares = engine.ask(questions, schedule, lang, write=write)
    if shares:
        share = sum(shares) / len(shares)
        console.print()
        display.say(console, WORDS[lang]["end"].format(count=len(shares), share=share, path=schedule.path))
    return 0


@click.command()
@click.argument("names", nargs=-1, metavar="[MODULE | RUN]…")
@click.option("--prompt", "own", multiple=True, metavar="TEXT", help="A prompt for all their models; repeatable.")
@click.option(
    "--prompts",
    "count",
    type=click.IntRange(0, 1000),
    default=5,
    show_default=True,
    help="Most prompts that runs kept and that their models answer here; 0: none.",
)
@click.option("--max-new-tokens", "new_tokens", type=click.IntRange(1, 1 << 16), default=40, show_default=True)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Write the answers there as Markdown.")
@LANG
@click.option("--json", is_flag=True, help="Print JSON on stdout.")
def compare(
    names: tuple[str, ...], own: tuple[str, ...], count: int, new_tokens: int, out: Path | None, lang: str, json: bool
) -> int:  # fmt: skip
    """Modules side by side: data, models in memory, memory and result of their last runs (or of given run folders), and
    what the models of two or more runs answer to the same prompts."""
    from finetune.interview import compare as engine
    from finetune.runs import display, registry

    entries = [engine.entry(name) for name in names] if names else [engine.of(info) for info in registry.modules()]
    rows: list[dict[str, Any]] = list(engine.matrix(entries, lang))
    prompts, found = answers_of(entries, own, count, new_tokens) if names and (own or count) else ([], None)
    if found is None and (own or out):
        raise UserError(
            "there is nothing to ask: fewer than two of what is named have a run that kept answers, as sft, dpo, grpo, "
            "ppo --task lm and rlhf do (python -m finetune run NAME --toy)"
        )
    if out and found:
        from finetune.interview.answers import markdown
        from finetune.runs.checkpoint import atomic_write

        with atomic_write(out) as temporary:
            temporary.write_text(markdown(prompts, found.rows, found.notes), encoding="utf-8")
    if json:
        for row in rows if found else ():
            keys = (row["module"], f"{row['module']} (kept)")
            row["answers"] = [
                {"prompt": prompt, "text": next((said[key] for key in keys if key in said), None)}
                for prompt, said in zip(prompts, found.rows if found else (), strict=True)
            ]
        click.echo(jsonlib.dumps(rows, indent=2, ensure_ascii=False))
        return 0
    heads = tuple(engine.HEADS[lang].get(key, "") for key in (rows[0] if rows else ()))
    texts: list[Any] = [[(row["module"], "bold"), *list(row.values())[1:]] for row in rows]
    console = display.console()
    display.table(console, heads, texts, apart=True)
    for prompt, said in zip(prompts, found.rows if found else (), strict=True):
        display.side_by_side(console, prompt, said)
    for note in found.notes if found else ():
        display.say(console, note, "dim", indent="  ")
    return 0


def answers_of(entries: Any, own: tuple[str, ...], count: int, new_tokens: int) -> tuple[list[str], Any]:
    """(prompts, interview.answers.Answers); ([], None) if fewer than two runs kept answers."""
    from finetune.interview import answers as engine
    from finetune.runs import display

    runs = [run for one in entries if one.folder and (run := engine.read(one.name, one.folder))]
    if len(runs) < 2:
        return [], None
    asked = [(text, None) for text in own] or engine.chosen(runs, count)
    return [text for text, _ in asked], engine.answered(runs, asked, new_tokens, display.console(stderr=True))


@click.command()
@LANG
@click.option("--json", is_flag=True, help="Print JSON on stdout.")
def progress(lang: str, json: bool) -> int:
    """Your level and day on the 14-day path, and what is missing, from your runs and quiz results."""
    from dataclasses import asdict

    from finetune.interview import path
    from finetune.interview import quiz as engine
    from finetune.runs import display

    found = path.progress(engine.Schedule(engine.data_folder() / "quiz.json").entries)
    if json:
        found["modules"] = {name: asdict(s) | {"mastered": s.mastered} for name, s in found["modules"].items()}
        click.echo(jsonlib.dumps(found, indent=2, ensure_ascii=False))
        return 0
    days, levels = path.read()
    heads = ("day", "module", "run", "quiz") if lang == "en" else ("天", "模块", "运行", "测验")
    rows: list[Any] = []
    for day in days:
        for name in day.modules:
            s = found["modules"][name]
            if s.exists:
                quiz_cell = f"{s.asked}/{s.questions} · {s.share:.0%}" if s.asked else "-"
                rows.append([str(day.number), name, ("✓", "green") if s.passed else "-", quiz_cell])
            else:
                rows.append([str(day.number), (name, "dim"), (path.WORDS[lang]["none"], "dim"), ""])
    console = display.console()
    display.table(console, heads, rows)
    words = WORDS[lang]
    title = f" ({levels[found['level'] - 1].title[lang]})" if found["level"] else ""
    reached = words["level"].format(level=found["level"], levels=len(levels))
    today = words["day"].format(day=min(found["day"], len(days)), days=len(days))
    console.print(f"[bold]{reached}[/]{title} · [bold]{today}[/]", highlight=False)
    console.print(words["missing" if found["missing"] else "all"])
    for command in found["missing"]:
        flag = f" --lang {lang}" if lang != "en" and " quiz " in command else ""
        console.print(f"  {command}{flag}", markup=False, highlight=False)
    return 0
