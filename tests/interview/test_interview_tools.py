"""Briefs, quizzes, decks and comparisons over a run that this file writes itself."""

import json
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from rich.cells import cell_len

from finetune.cli import main
from finetune.errors import UserError
from finetune.interview import brief, compare, content, deck, quiz
from finetune.runs import registry

ROOT = Path(__file__).parents[2]
NOW = datetime(2026, 1, 1, tzinfo=timezone.utc)
MODULES = registry.modules()


@pytest.fixture
def sft(tmp_path, monkeypatch):
    """sft in a copy of the tree of modules, with one finished run."""
    info = registry.find("sft")
    folder = tmp_path / "modules" / info.group / "sft"
    (folder / "output" / "one").mkdir(parents=True)
    for name in ("module.toml", "interview.toml"):
        (folder / name).write_bytes((info.folder / name).read_bytes())
    summary = {
        "module": "sft", "toy": False, "seed": 0, "steps": 60, "seconds": 229.0, "peak_rss_bytes": 2_000_000_000,
        "metrics": {"held_out_loss": 3.1382, "tokens_per_second": 189.1, "trained_parameters": 2_442_240},
        "baseline": {"held_out_loss": 4.5011}, "target": {"held_out_loss": 3.376}, "passed": True,
    }  # fmt: skip
    (folder / "output/one/summary.json").write_text(json.dumps(summary))
    (folder / "output/one/config.json").write_text(json.dumps({"config": {"steps": 60, "batch": 8}}))
    monkeypatch.setenv("FINETUNE_MODULES", str(tmp_path / "modules"))
    return registry.find("sft")


@pytest.mark.parametrize("lang", content.LANGUAGES)
def test_a_brief_speaks_the_runs_numbers(sft, lang):
    text = brief.brief(sft, lang)
    for number in {"en": ("2.44 million", "4.5", "3.14", "60"), "zh": ("244 万", "4.5", "3.14", "60")}[lang]:
        assert number in text
    assert "{" not in text
    (sft.folder / "output/one/summary.json").unlink()
    with pytest.raises(UserError, match="python -m finetune run sft"):
        brief.brief(sft, lang)


def test_default_runs_go_before_toy_ones(sft):
    toy = sft.folder / "output" / "two"
    toy.mkdir()
    summary = json.loads((sft.folder / "output/one/summary.json").read_text())
    (toy / "summary.json").write_text(json.dumps(summary | {"toy": True}))
    assert brief.last_run(sft).name == "one"


def test_numbers_and_their_words():
    assert brief.spoken(0.034567, "en") == "0.0346"
    assert brief.spoken(1234.5, "en") == "1234"
    assert brief.spoken(12_345, "en") == "12.3 thousand"
    assert brief.spoken(3.2e9, "en") == "3.2 billion"
    assert brief.spoken(3.2e9, "zh") == "32 亿"
    with pytest.raises(UserError, match=r"\{los\}.*did you mean 'loss'"):
        brief.fill("the {los}", {"loss": 1.0}, "en")


def test_a_field_may_be_derived(sft):
    found = brief.facts(sft.folder / "output/one")
    assert found["derived.minutes"] == pytest.approx(3.8167, abs=1e-3)
    assert found["derived.held_out_loss_change_percent"] == pytest.approx(30.28, abs=0.01)
    assert found["baseline.held_out_loss"] == 4.5011


@pytest.mark.parametrize("info", MODULES, ids=lambda info: info.name)
def test_every_module_has_its_row_and_questions(info):
    interview = content.read(info)
    assert len({question.id for question in interview.questions}) == len(interview.questions) >= 8
    assert set(info.compare) == set(registry.COMPARED)
    assert all(text["en"] and text["zh"] for text in info.compare.values())


def answers(*lines):
    left = list(lines)

    def read(prompt):
        if not left:
            raise EOFError
        return left.pop(0)

    return read


def collect(out):
    return lambda text, style: out.append(text)


def test_a_quiz_grades_follows_up_and_schedules(sft, tmp_path):
    first, second = content.read(sft).questions[:2]
    schedule, out = quiz.Schedule(tmp_path / "data" / "quiz.json"), []
    assert schedule.new(first)
    assert not schedule.due(first, NOW), "what was never asked is new, not due"
    assert len(first.text["en"].points) == 4
    read = answers("", "y", "maybe", "y", "n", "y", "", "", *["y"] * len(second.text["en"].points))
    shares = quiz.ask((first, second), schedule, read=read, write=collect(out), now=lambda: NOW)
    assert shares == [0.75, 1.0]
    text = "\n".join(out)
    assert first.text["en"].follow_up in text
    assert second.text["en"].follow_up not in text, "nothing was missed"
    assert "question 1 of 2" in text
    assert "question 2 of 2" in text
    assert "4/4 of the points named · again in 10 minutes" in text
    again = quiz.Schedule(tmp_path / "data" / "quiz.json")  # from the disk
    assert not again.due(first, NOW)
    assert not again.due(second, NOW)
    assert again.due(first, NOW + timedelta(days=60))
    dues = [datetime.fromisoformat(again.entries[q.id]["card"]["due"]) for q in (first, second)]
    assert dues[0] < dues[1], "what was named in part comes back sooner"


def test_when_a_question_comes_again():
    assert quiz.when(NOW + timedelta(minutes=10), NOW, "en") == "in 10 minutes"
    assert quiz.when(NOW + timedelta(minutes=10), NOW, "zh") == "10 分钟后"
    later = (NOW + timedelta(days=3)).astimezone()
    assert quiz.when(NOW + timedelta(days=3), NOW, "en") == f"on {later:%Y-%m-%d at %H:%M}"
    assert quiz.when(NOW + timedelta(hours=1), NOW, "en").startswith("on 2026-01-01 at ")


def test_due_has_no_new_ones_and_new_has_a_limit_a_day(sft, tmp_path):
    questions = content.read(sft).questions
    schedule = quiz.Schedule(tmp_path / "quiz.json")
    assert quiz.chosen(questions, schedule, NOW) == list(questions)
    assert quiz.chosen(questions, schedule, NOW, due=True) == []
    assert quiz.chosen(questions, schedule, NOW, new=2) == list(questions[:2])
    schedule.grade(questions[0], 1.0, NOW)
    assert quiz.chosen(questions, schedule, NOW, new=2) == [questions[1]], "one of today's two is used up"
    later = NOW + timedelta(days=1)
    assert quiz.chosen(questions, schedule, later, due=True) == [questions[0]]
    assert quiz.chosen(questions, schedule, later, due=True, new=2) == list(questions[:3])


@pytest.mark.parametrize("given", [("q",), ("", "y", "q"), ("", "y", "y")])
def test_an_answer_that_is_cut_off_does_not_count(sft, tmp_path, given):
    question = content.read(sft).questions[0]
    schedule = quiz.Schedule(tmp_path / "quiz.json")
    assert quiz.ask([question] * 2, schedule, read=answers(*given), write=collect([])) == []
    assert schedule.new(question)
    assert not (tmp_path / "quiz.json").exists()


def test_quitting_keeps_what_was_answered(sft, tmp_path):
    questions = content.read(sft).questions[:2]
    schedule = quiz.Schedule(tmp_path / "quiz.json")
    read = answers("", *["y"] * len(questions[0].text["en"].points), "q", "never read")
    assert quiz.ask(questions, schedule, read=read, write=collect([])) == [1.0]
    assert not schedule.new(questions[0])
    assert schedule.new(questions[1])


@pytest.mark.parametrize("lang", content.LANGUAGES)
@pytest.mark.parametrize("width", [80, 60])
def test_quiz_and_brief_are_wrapped_by_words(sft, lang, width, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("FINETUNE_DATA", str(tmp_path / "data"))
    monkeypatch.setattr("builtins.input", lambda prompt: "y")
    assert main(["quiz", "sft", "--lang", lang]) == 0
    asked = capsys.readouterr().out
    assert main(["brief", "sft", "--lang", lang]) == 0
    spoken = capsys.readouterr().out
    for text in (asked, spoken):
        assert max(cell_len(line) for line in text.splitlines() if "://" not in line and "/" not in line) <= width
    flat = "".join(asked.split())
    for question in content.read(sft).questions:
        for part in (question.text[lang].question, *question.text[lang].points, question.text[lang].wrong):
            assert "".join(part.split()) in flat
    for word in brief.brief(sft, "en").split() if lang == "en" else ():
        assert word in spoken.split()


def test_more_right_answers_space_further(sft, tmp_path):
    question, now = content.read(sft).questions[0], NOW
    schedule, gaps = quiz.Schedule(tmp_path / "quiz.json"), []
    for _ in range(4):
        due = schedule.grade(question, 1.0, now)
        gaps.append(due - now)
        now = due
    assert gaps[1:] == sorted(gaps[1:])
    assert gaps[-1] > 3 * gaps[1] > timedelta(0)
    assert schedule.grade(question, 0.0, now) - now < gaps[1], "a miss brings it back"


def test_anki_opens_the_deck(sft, tmp_path):
    collection = pytest.importorskip("anki.collection", reason="needs the test extra")
    questions = content.read(sft).questions
    path = tmp_path / "deck.apkg"
    assert deck.write(questions, path, "zh") == len(questions)
    mine = collection.Collection(str(tmp_path / "collection.anki2"))
    request = collection.ImportAnkiPackageRequest(package_path=str(path))
    mine.import_anki_package(request)
    mine.import_anki_package(request)  # again: updates, no doubles
    notes = [mine.get_note(note) for note in mine.find_notes("")]
    assert len(notes) == len(questions)
    assert {note["Question"] for note in notes} == {q.text["zh"].question for q in questions}
    assert "<li>" in notes[0]["Points"]
    mine.close()


def test_compare(sft):
    row = compare.matrix([compare.of(sft)])[0]
    assert row["memory"] == "2.00 GB"
    assert row["result"] == "held_out_loss\n3.138 / 4.501"
    assert row["time"] == "60, 229 s"
    (sft.folder / "output/one/summary.json").unlink()
    assert compare.matrix([compare.of(sft)], "zh")[0]["memory"] == "尚无运行"


def test_compare_shows_the_first_results(sft):
    path = sft.folder / "output/one/summary.json"
    summary = json.loads(path.read_text())
    names = ("a", "b", "c", "d")
    summary |= {"metrics": dict.fromkeys(names, 2.0), "baseline": dict.fromkeys(names, 1.0)}
    path.write_text(json.dumps(summary))
    assert compare.matrix([compare.of(sft)])[0]["result"] == "a\n2 / 1\nb\n2 / 1\n+ 2"


def test_the_seeds_short_commands(sft, tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def script(name, *words):
        command = [sys.executable, ROOT / "scripts" / name, *words]
        return subprocess.run([*map(str, command)], cwd=tmp_path, capture_output=True, text=True, input="\n")

    assert "2.44 million" in script("interview_brief.py", "--module", "sft").stdout
    asked = " ".join(script("interview_qa.py", "--module", "sft").stdout.split())
    assert content.read(sft).questions[0].text["en"].points[0] in asked
    assert script("export_interview_briefs.py").returncode == 0
    written = {path.name for path in (tmp_path / "output/interview_briefs").iterdir()}
    assert written == {"sft.en.md", "sft.zh.md"}
    assert script("interview_brief.py", "--module", "sfd").returncode == 2


def test_commands(sft, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FINETUNE_DATA", str(tmp_path / "data"))
    assert main(["brief", "--all", "--out", str(tmp_path / "briefs"), "--lang", "zh"]) == 0
    assert "244 万" in (tmp_path / "briefs/sft.zh.md").read_text(encoding="utf-8")
    assert main(["brief", "sft"]) == 0
    assert "2.44 million" in capsys.readouterr().out
    monkeypatch.setattr("builtins.input", lambda prompt: "q")
    assert main(["quiz", "sft", "--level", "3"]) == 0
    assert "question 1 of 2 · sft · level 3" in capsys.readouterr().out
    assert main(["quiz", "--due"]) == 0
    assert "nothing is due" in capsys.readouterr().out
    assert main(["compare", "sft", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["module"] == "sft"
    assert main(["quiz", "sft", "--export", "anki", "--out", str(tmp_path / "d.apkg")]) == 0
    assert (tmp_path / "d.apkg").stat().st_size > 1000
    for words, message in (
        (["brief"], "brief MODULE, or"),
        (["brief", "--all"], "needs --out"),
        (["brief", "sfd"], "did you mean 'sft'"),
        (["quiz", "--day", "14"], "day 14 has no module yet"),
        (["quiz", "sft", "--day", "5"], "not both"),
        *(
            ([command, "deepspeed"], "module 'deepspeed' is planned (day 14 of the path) and does not exist yet")
            for command in ("quiz", "brief", "compare", "run", "memory")
        ),
    ):
        assert main(words) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "quiz.json").write_text("{")
    assert main(["quiz", "sft"]) == 2
    assert "fix it or move it away" in capsys.readouterr().err
