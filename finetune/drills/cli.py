"""`python -m finetune drill`."""

import time
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import rich_click as click

if TYPE_CHECKING:
    from finetune.drills.catalog import Drill
    from finetune.drills.journal import Journal

LANG = click.option("--lang", type=click.Choice(["en", "zh"]), default="en", show_default=True, help="Language.")

COLUMNS = {
    "en": ["drill", "task", "subject", ">level", ">minutes", "state"],
    "zh": ["练习", "任务", "类别", ">难度", ">分钟", "状态"],
}
WORDS = {
    "en": {
        "star": "★", "green": "green", "due": "due again", "begun": "begun", "new": "",
        "kept": "your earlier draft is {path}",
        "start": "{minutes} minutes · {asked}",
        "next": "write in the file, then: python -m finetune drill check {name}",
        "again": "again {when}",
        "hint": "hint {number} of {count}: ",
        "solution": "To earn the star now, start again later: python -m finetune drill start {name}",
        "watch": "checking {path} whenever it is saved; Ctrl-C ends",
        "count": "{stars} of {count} drills have a star; {due} are due again",
    },
    "zh": {
        "star": "★", "green": "已通过", "due": "该复习", "begun": "已开始", "new": "",
        "kept": "之前的草稿在 {path}",
        "start": "{minutes} 分钟 · {asked}",
        "next": "在文件里作答，然后运行：python -m finetune drill check {name} --lang zh",
        "again": "下次复习：{when}",
        "hint": "提示 {number}/{count}：",
        "solution": "要得到星标，请以后重新开始：python -m finetune drill start {name} --lang zh",
        "watch": "每次保存都会检查 {path}；按 Ctrl-C 结束",
        "count": "{count} 个练习中 {stars} 个有星标，{due} 个该复习",
    },
}  # fmt: skip


@click.group(invoke_without_command=True)
@click.option("--due", is_flag=True, help="Only drills whose time to repeat has come.")
@click.option("--level", type=click.IntRange(1, 5), help="Only drills of this level.")
@click.option("--subject", type=click.Choice(["tensor", "cuda", "triton", "cpp", "debug"]), help="Only this subject.")
@LANG
@click.pass_context
def drill(context: click.Context, due: bool, level: int | None, subject: str | None, lang: str) -> int:
    """Write code from memory and have it checked: drill | drill start, check, hint, solution, watch NAME."""
    if context.invoked_subcommand:
        return 0
    from finetune.drills import catalog
    from finetune.drills.journal import Journal
    from finetune.runs import display

    words, journal = WORDS[lang], Journal()
    rows: list[list[display.Cell] | display.Cell] = []
    found = catalog.drills()
    for each in found:
        late = journal.due(each)
        if (due and not late) or level not in (None, each.text.level) or subject not in (None, each.subject):
            continue
        entry = journal.entry(each)
        state = "star" if entry.star else "green" if entry.green else "begun" if journal.draft(each).exists() else "new"
        shown = " · ".join(words[s] for s in (state, "due") if words[s] and (s != "due" or late))
        rows.append([each.name, each.title(lang), each.subject, str(each.text.level), str(each.text.minutes), shown])
    console = display.console()
    if rows:
        display.table(console, COLUMNS[lang], rows)
    stars = sum(journal.entry(each).star for each in found)
    again = sum(map(journal.due, found))
    display.say(console, words["count"].format(stars=stars, count=len(found), due=again), "dim")
    return 0


@drill.command()
@click.argument("name")
@LANG
def start(name: str, lang: str) -> int:
    """Write a new draft into your data folder and print where it is; an earlier draft is kept."""
    from finetune.drills import catalog
    from finetune.drills.journal import Journal
    from finetune.runs import display

    words, found = WORDS[lang], catalog.find(name)
    path, kept = Journal().start(found, lang)
    console = display.console()
    display.say(console, found.title(lang), "bold")
    display.say(
        console, words["start"].format(minutes=found.text.minutes, asked=getattr(found.text.asked, lang)), "dim"
    )
    click.echo(path.read_text(encoding="utf-8"))
    click.echo(str(path))
    if kept:
        display.say(console, words["kept"].format(path=kept), "dim")
    display.say(console, words["next"].format(name=name), "dim")
    return 0


@drill.command()
@click.argument("name")
@LANG
def check(name: str, lang: str) -> int:
    """Red or green, with the smallest input that fails; exits with 1 when red."""
    from finetune.drills import catalog
    from finetune.drills.journal import Journal

    found, journal = catalog.find(name), Journal()
    return 0 if checked(found, journal, lang) else 1


@drill.command()
@click.argument("name")
@LANG
def hint(name: str, lang: str) -> int:
    """The next of three hints."""
    from finetune.drills import catalog
    from finetune.drills.journal import Journal
    from finetune.runs import display

    found = catalog.find(name)
    number = Journal().hint(found)
    text = getattr(found.text.hints[number], lang)
    words = WORDS[lang]["hint"].format(number=number + 1, count=len(found.text.hints))
    display.say(display.console(), words + text)
    return 0


@drill.command()
@click.argument("name")
@LANG
def solution(name: str, lang: str) -> int:
    """A right answer; the star then needs a new start."""
    from finetune.drills import catalog
    from finetune.drills.journal import Journal
    from finetune.runs import display

    found = catalog.find(name)
    Journal().look(found)
    click.echo(found.solution.read_text(encoding="utf-8"))
    display.say(display.console(), WORDS[lang]["solution"].format(name=name), "dim")
    return 0


@drill.command()
@click.argument("name")
@LANG
def watch(name: str, lang: str) -> int:
    """Check the draft whenever it is saved, until it is green."""
    from finetune.drills import catalog
    from finetune.drills.journal import Journal
    from finetune.runs import display

    found, journal = catalog.find(name), Journal()
    path = journal.started(found)
    display.say(display.console(), WORDS[lang]["watch"].format(path=path), "dim")
    saved = 0
    while True:
        try:
            changed = path.stat().st_mtime_ns
        except FileNotFoundError:  # an editor replaces it
            changed = saved
        if changed != saved:
            saved = changed
            if checked(found, journal, lang):
                return 0
        time.sleep(0.3)


def checked(found: "Drill", journal: "Journal", lang: str) -> bool:
    """Checks the draft, prints the verdict and notes it."""
    from finetune.drills import run
    from finetune.interview.quiz import when
    from finetune.runs import display

    console = display.console()
    verdict = run.check(found, journal.started(found))
    for text, style in run.told(found, verdict, lang):
        for line in text.splitlines():
            display.say(console, line, style)
    due = journal.record(found, verdict["ok"])
    if due:
        display.say(console, WORDS[lang]["again"].format(when=when(due, datetime.now(timezone.utc), lang)), "dim")
    return bool(verdict["ok"])
