"""The terminal at 80 and 60 columns: no number is cut or parted, no line is too wide, no text is read as markup."""

import io
import json
import re
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.progress import Progress

from finetune.cli import main
from finetune.kernels import cli as kernels
from finetune.runs import display, registry

ROOT = Path(__file__).parents[2]
WIDTHS = (110, 80, 60)


def shown(width, *args, **keywords):
    con = Console(file=io.StringIO(), width=width)
    display.table(con, *args, **keywords)
    return con.file.getvalue()


def numbers(text):
    return re.findall(rf"[^\s,;:(){display.WIDE}]*\d[^\s;:(){display.WIDE}]*", text)


def narrow(text, width):
    return [line for line in text.splitlines() if cell_len(line) > width]


@pytest.mark.parametrize("width", [*WIDTHS, 30, 24])
def test_a_table_keeps_every_number_and_word(width):
    row = ["rms_norm", "1,248,256", "-3.1415e-05", "pip install -e '.[peers]' brings [bold]1,024 tensors[/] of 2.25 GB"]
    text = shown(width, ("op", ">sectors", ">error", "what it says"), [row, "a row over all columns, 65,536 wide"])
    assert not narrow(text, width)
    assert numbers(text) == numbers(" ".join([*row, "65,536"]))
    assert "'.[peers]'" in text
    assert "[bold]1,024" in text
    for word in ("rms_norm", "install", "columns,"):
        assert word in text


def test_a_folder_with_brackets_is_shown_as_it_is(tmp_path):
    folder = tmp_path / "run[bold]1"
    folder.mkdir()
    (folder / "values.png").touch()
    con = Console(file=io.StringIO(), width=200)
    display.closing(con, {"metrics": {}, "passed": True, "seconds": 1.0, "peak_rss_bytes": 1}, {}, folder)
    assert str(folder) in con.file.getvalue()
    assert "pictures: values.png" in con.file.getvalue()


def test_wide_characters_are_counted_and_words_stay_whole():
    text = "这里两者都从真实的 token 开始，DPO、PPO、GRPO 都从它出发；训练后并入 W。"
    for width in range(8, 40):
        lines = display.wrap(text, width)
        assert all(cell_len(line) <= width for line in lines)
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")
        assert not any(line[0] in display.CLOSING for line in lines)
        for word in ("token", "DPO", "PPO", "GRPO"):
            assert any(word in line for line in lines)


def test_a_word_that_is_wider_than_the_line_is_parted_at_its_marks():
    assert display.wrap("in /home/somebody/linear_cross_entropy", 16) == [
        "in",
        "/home/somebody/",
        "linear_cross_",
        "entropy",
    ]
    assert display.wrap("abcdefghij", 4) == ["abcd", "efgh", "ij"]


@pytest.mark.parametrize("width", [110, 100, 80, 60, 40])
@pytest.mark.parametrize("done", [0, 14, 146])
def test_a_bar_keeps_count_rate_and_time(width, done):
    now = [0.0]
    live = Progress(get_time=lambda: now[0])
    live.add_task("ppo_0.95", total=146, metrics={})
    task = live.tasks[0]
    for i in range(1, done + 1):
        now[0] += 0.52
        metrics = {"value_error": 0.1192, "value_error_limits_as_ends": 7.032, "lr": 0.1004}
        live.update(task.id, completed=i, metrics=metrics)
    line = display.bar(task, width).plain
    assert not narrow(line, width)
    wanted = {0: ["0/146"], 14: ["14/146", "1.92 step/s", "1:09 left"], 146: ["146/146", "1.92 step/s", "1:16 taken"]}
    for part in ["ppo_0.95", *wanted[done]]:
        assert part in line
    assert ("━" in line) == (width >= 60 or done == 0)
    if width == 110 and done:
        assert "value_error_limits_as_ends 7.032" in line


def test_metrics_are_those_of_the_phase_that_runs(tmp_path):
    from contextlib import contextmanager

    from finetune.runs import config, run

    seen = []

    @contextmanager
    def progress(con, phase, start, total):
        yield lambda done, metrics: seen.append((phase, dict(metrics)))

    one = run.Run(tmp_path / "run", config.Config(steps=1, threads=1), console=Console(file=io.StringIO()))
    before, run.display.progress = run.display.progress, progress
    try:
        for phase in ("critic", "ppo"):
            for step in one.steps(1, {}, phase):
                one.log(step, **{f"{phase}_metric": 1.0})
    finally:
        run.display.progress = before
    assert seen == [("critic", {"critic_metric": 1.0}), ("ppo", {"ppo_metric": 1.0})]


def test_results_with_a_target_come_first_and_only_they_are_judged():
    names = {"loss_before": 6.4, "share": 0.5, "held_out_loss": 0.0156, "cost": 1e9, "same": 2}
    summary = {"metrics": names, "passed": False, "seconds": 8.0, "peak_rss_bytes": 1}
    judged = {
        "share": {"baseline": 0.1, "target": None, "passed": True, "higher": True, "error": 0.034},
        "held_out_loss": {"baseline": 6.4, "target": 0.01, "passed": False, "higher": False, "error": None},
        "same": {"baseline": 2.0, "target": None, "passed": None},
    }
    for width in WIDTHS:
        con = Console(file=io.StringIO(), width=width)
        display.closing(con, summary, judged, display.Path("RUN"))
        lines = con.file.getvalue().splitlines()
        rows = {line.split()[0]: line.split()[1:] for line in lines if line.split()[:1] and line.split()[0] in names}
        assert list(rows) == ["held_out_loss", "loss_before", "share", "cost", "same"]
        assert rows["held_out_loss"] == ["0.0156", "6.4", "≤", "0.01", "missed"]
        assert rows["share"] == ["0.500", "±", "0.034", "0.1", "–", "–"]
        assert rows["same"] == ["2", "2", "–", "equal"]
        assert "reached" not in "\n".join(lines).replace("targets reached", "")


TRACE = [
    {"file": "csrc/cuda/attention.cu", "line": 12345, "source": "  float x = q[row * 128 + lane];", "kind": kind,
     "requests": 1048576, "width": 16, "units": 41943040, "ideal": 4194304}
    for kind in ("global load", "shared store")
]  # fmt: skip


@pytest.mark.parametrize("width", WIDTHS)
def test_a_trace_shows_every_number_of_its_json(width):
    con = Console(file=io.StringIO(), width=width)
    kernels._print_trace(con, TRACE)
    text = con.file.getvalue()
    assert not narrow(text, width)
    for row in TRACE:
        assert f"attention.cu:{row['line']}" in text
        assert row["source"].strip() in " ".join(text.split())
        for key in kernels.TRACED:
            assert len(re.findall(rf"(?<![\d,]){row[key]:,}(?![\d,])", text)) >= 2
    assert text.count("10.00") == 2


@pytest.mark.parametrize("width", [80, 60])
@pytest.mark.parametrize("op", ["attention", "rms_norm"])
def test_the_static_table_shows_every_number_of_its_json(op, width):
    rows = json.loads((ROOT / "assets" / "kernels_static.json").read_text())["kernels"][op]["80"]
    con = Console(file=io.StringIO(), width=width)
    kernels._static_table(con, f"{op} sm_80", rows)
    text = con.file.getvalue()
    assert not narrow(text, width)
    words = text.split()
    lines = [line.split() for line in text.splitlines()]
    for name, row in rows.items():
        assert "".join(name.split()) in "".join(words)
        numbers = [str(row[key]) for key in ("threads", "registers", "stack", "spills", "shared")]
        assert [*numbers, f"{row['occupancy']:.0%}"] in lines
        for size, count in (*row["load"].items(), *row["store"].items()):
            assert f"{count}×{size}" in words
        assert all(str(count) in words for word, count in row["code"].items() if word not in ("LDG", "STG"))


@pytest.mark.parametrize("width", [110, 80, 60])
def test_the_levels_show_every_number_of_their_json(width, monkeypatch, capsys):
    ladder = registry.load(registry.find("cuda"))
    counts = [
        ladder.Count(level, f"level_{level}", 1e-7, 10**9, 10**6, 2**20 // level, 2**24 // level, 2**22 // level,
                     2**18, 1024, 96, 4, 56, 18, 24, 12, 5)
        for level in (1, 2, 3)
    ]  # fmt: skip
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(ladder, "climb", lambda name, size: counts)
    monkeypatch.setattr(ladder, "build_all", lambda *words: None)
    assert main(["kernels", "levels", "transpose"]) in (0, None)
    text = capsys.readouterr().out
    assert not narrow(text, width)
    for count in counts:
        for number in (count.requests, count.sectors, count.wavefronts, count.excess, count.atomics, count.barriers):
            assert re.search(rf"(?<![\d,]){number:,}(?!,?\d)", text), number


@pytest.mark.parametrize("width", [80, 60])
@pytest.mark.parametrize(
    "words",
    ["list", "ops", "doctor", "compare", "compare --lang zh", "progress", "progress --lang zh", "memory",
     "memory llama-7b", "run sft --help", "run peft --help"],
)  # fmt: skip
def test_every_table_fits_and_keeps_its_numbers(words, width, monkeypatch, capsys, tmp_path):
    cells = []

    def table(con, heads, rows, *rest, keep=display.table, **keywords):
        rows = list(rows)
        for row in rows:
            cells.extend(row if isinstance(row, list) else [row])
        keep(con, heads, rows, *rest, **keywords)

    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("FINETUNE_DATA", str(tmp_path))
    monkeypatch.setattr(display, "table", table)
    assert main(words.split()) in (0, None)
    text = capsys.readouterr().out
    assert not narrow(text, width)
    for cell in cells:
        part = cell if isinstance(cell, str) else cell[0]
        for word in numbers(part):
            parts = display.SOFT.split(word) if len(word) > display.LONG else [word]
            assert all(part in text for part in parts), word
    assert cells


def test_json_and_terminal_tell_the_same(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("FINETUNE_DATA", str(tmp_path))
    assert main(["ops"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert main(["ops", "--json"]) == 0
    for row in json.loads(capsys.readouterr().out):
        assert row["ok"] or row["reason"].removeprefix(f"{row['op']} ") in text
    reasons = {"it takes CUDA tensors"}
    assert all(text.count(reason) <= 2 for reason in reasons), "a reason is said once, below the table"
