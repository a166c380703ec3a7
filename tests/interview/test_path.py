"""The 14-day path: its pages are current, it names every module once, and progress follows runs and answers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.cli import main
from finetune.interview import content, path, quiz
from finetune.runs import registry

ROOT = Path(__file__).parents[2]
PLANNED = {
    "nanogpt", "megatron", "diffusion", "dit", "blip2", "llava", "flamingo", "sft", "dpo", "grpo", "ppo", "rlhf",
    "policy_gradient", "actor_critic", "peft", "mdp", "td_learning", "gae", "advantage", "cql", "bcq", "deepspeed",
    "cuda", "mixed_precision", "inference",
}  # fmt: skip


def test_every_module_has_its_day_and_its_level():
    days, levels = path.read()
    assert len(days) == 14
    assert sorted(name for day in days for name in day.modules) == sorted(PLANNED)
    assert sorted(name for level in levels for name in level.modules) == sorted(PLANNED)
    for info in registry.modules():
        assert info.name in days[info.day - 1].modules, f"{info.name}: day {info.day} of module.toml is not the path's"


def test_pages_are_current():
    check = subprocess.run([sys.executable, "scripts/learning.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert check.returncode == 0, check.stdout + check.stderr


def test_both_languages_have_the_same_pages():
    pages = path.pages()
    assert len(pages) == 4
    for name in ("ROADMAP_14_DAYS", "LEVEL_CHECKPOINTS"):
        en, zh = pages[f"{name}.md"].splitlines(), pages[f"{name}.zh-CN.md"].splitlines()
        assert len(en) == len(zh)
        assert [line[:2] == "##" for line in en] == [line[:2] == "##" for line in zh]
    assert "does not exist yet" in pages["ROADMAP_14_DAYS.md"] or len(registry.modules()) == len(PLANNED)


@pytest.fixture
def only_sft(tmp_path, monkeypatch):
    """A tree with sft alone, and its level cut down to it."""
    info = registry.find("sft")
    folder = tmp_path / "modules" / info.group / "sft"
    (folder / "output" / "one").mkdir(parents=True)
    for name in ("module.toml", "interview.toml"):
        (folder / name).write_bytes((info.folder / name).read_bytes())
    monkeypatch.setenv("FINETUNE_MODULES", str(tmp_path / "modules"))
    monkeypatch.setenv("FINETUNE_DATA", str(tmp_path / "data"))
    days, _ = path.read()
    levels = [
        path.Level(1, ("sft",), {"en": "all", "zh": "全部"}),
        path.Level(2, ("dpo",), {"en": "more", "zh": "更多"}),
    ]
    monkeypatch.setattr(path, "read", lambda: (days, levels))
    return registry.find("sft")


def test_progress_needs_a_run_and_answers(only_sft, tmp_path, capsys):
    def now():
        return path.progress(quiz.Schedule(tmp_path / "data" / "quiz.json").entries)

    assert (now()["level"], now()["day"]) == (0, 5)
    assert now()["missing"] == ["python -m finetune run sft --toy", "python -m finetune quiz sft"]
    summary = only_sft.folder / "output/one/summary.json"
    summary.write_text(json.dumps({"passed": False, "toy": True}))
    assert len(now()["missing"]) == 2, "a run that missed its targets does not count"
    summary.write_text(json.dumps({"passed": True, "toy": True}))
    assert now()["missing"] == ["python -m finetune quiz sft"]
    schedule, questions = quiz.Schedule(tmp_path / "data" / "quiz.json"), content.read(only_sft).questions
    for question in questions:
        schedule.grade(question, 0.5, quiz.datetime.now(quiz.timezone.utc))
    assert now()["level"] == 0, "half of the points is not enough"
    for question in questions:
        schedule.grade(question, 1.0, quiz.datetime.now(quiz.timezone.utc))
    assert (now()["level"], now()["day"], now()["missing"]) == (1, 15, [])
    assert main(["progress", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["modules"]["sft"]["mastered"] is True
    assert main(["progress", "--lang", "zh"]) == 0
    assert "全部" in capsys.readouterr().out
    schedule.grade(questions[0], 0.0, quiz.datetime.now(quiz.timezone.utc))
    for question in questions:
        schedule.grade(question, 0.0, quiz.datetime.now(quiz.timezone.utc))
    assert main(["progress", "--lang", "zh"]) == 0
    assert "quiz sft --lang zh" in capsys.readouterr().out


def test_a_level_is_not_reached_before_its_modules_exist():
    """Everything that exists is mastered, and yet: the last level names modules that do not exist."""
    _, levels = path.read()
    known = {info.name for info in registry.modules()}
    everything = {}
    for info in registry.modules():
        for question in content.read(info).questions:
            everything[question.id] = {"history": [{"share": 1.0}]}
    before = path.standing
    path.standing = lambda name, known, entries: path.Standing(name, name in known, name in known, 1, 1, 1.0)
    try:
        found = path.progress(everything)
    finally:
        path.standing = before
    complete = [level.number for level in levels if set(level.modules) <= known]
    assert found["level"] == (max(complete) if complete == list(range(1, len(complete) + 1)) else 0)
    assert found["level"] < 5 or len(known) == len(PLANNED)
