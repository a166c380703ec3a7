"""The engine of a run, on a tiny net in which everything is that a run has to restore."""

import csv
import dataclasses
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune import cli
from finetune.errors import UserError
from finetune.runs import checkpoint, registry, run_folder
from finetune.runs.run import NotFinite, Run, Stopped, execute

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures" / "modules"


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setenv("FINETUNE_MODULES", str(FIXTURES))
    monkeypatch.syspath_prepend(str(ROOT))


def settings(**changes):
    return dataclasses.replace(registry.load(registry.find("tinynet")).Config(), threads=1, **changes)


def run(folder, resume=False, **changes):
    return execute(registry.find("tinynet"), settings(**changes), folder, resume=resume)


def process(*words, **more):
    command = [sys.executable, "-m", "finetune", "run", "tinynet", "--threads", "1", *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


def wait_for(folder, step, child):
    began = time.monotonic()
    while not any((folder / "checkpoints").glob(f"step_{step:06d}")):
        assert child.poll() is None, child.stderr.read()
        assert time.monotonic() - began < 60
        time.sleep(0.005)


def result(folder):
    return (folder / "model/model.safetensors").read_bytes(), (folder / "metrics.csv").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody interrupts."""
    os.environ["FINETUNE_MODULES"] = str(FIXTURES)
    folder = tmp_path_factory.mktemp("whole") / "run"
    summary = run(folder)
    del os.environ["FINETUNE_MODULES"]
    return folder, summary


def test_what_a_run_leaves(whole):
    folder, summary = whole
    assert summary == json.loads((folder / "summary.json").read_text())
    assert summary["passed"] is True
    assert summary["metrics"]["test_loss"] < summary["baseline"]["test_loss"]
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [int(r["step"]) for r in rows] == list(range(40))
    assert {"loss", "lr", "test_loss"} < set(rows[0])
    saved = json.loads((folder / "config.json").read_text())
    assert saved["config"]["steps"] == 40
    assert {"versions", "machine", "git", "command", "started"} < set(saved)
    assert (folder / "training_curves.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in sorted((folder / "checkpoints").iterdir())] == ["step_000035", "step_000040"]
    assert sorted(p.name for p in (folder / "checkpoints/step_000040").iterdir()) == [
        "meta.json",
        "tensors.safetensors",
    ]


def test_the_same_seed_gives_the_same_bytes(whole, tmp_path):
    run(tmp_path / "again")
    run(tmp_path / "other", seed=1)
    assert result(tmp_path / "again") == result(whole[0])
    assert result(tmp_path / "other")[0] != result(whole[0])[0]


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("at", [1, 5, 13, 40])
def test_resuming_gives_the_same_bytes(tmp_path, at, double, monkeypatch):
    run(tmp_path / "whole", double_phase=double)
    real, seen = checkpoint.save, []

    def save(folder, tensors, meta):
        real(folder, tensors, meta)
        seen.append(meta["step"])
        if len(seen) == 3 + double * at // 8:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", save)
    every = {"checkpoint_every": max(1, at // 3), "double_phase": double}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "part", **every)
    monkeypatch.setattr(checkpoint, "save", real)
    run(tmp_path / "part", resume=True, **every)
    assert result(tmp_path / "part") == result(tmp_path / "whole")


@pytest.mark.slow
def test_killed_at_five_moments(whole, tmp_path):
    """kill -9, at times also while a checkpoint is written."""
    folder, draw = tmp_path / "run", random.Random(0)
    words = ["--sleep", 0.02, "--checkpoint-every", 1, "--out", folder]
    for kill in range(5):
        child = process(*words, *["--resume"] * (kill > 0))
        wait_for(folder, 3 * (kill + 1), child)
        time.sleep(draw.uniform(0, 0.02))
        child.kill()
        assert child.wait() == -signal.SIGKILL
    child = process(*words, "--resume")
    assert child.wait() == 0, child.stderr.read()
    assert result(folder) == result(whole[0])
    assert not list(folder.rglob(".finetune-*"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_and_saves(whole, tmp_path, number, code):
    folder = tmp_path / "run"
    child = process("--sleep", 0.05, "--out", folder)
    wait_for(folder, 5, child)
    child.send_signal(number)
    assert child.wait() == code
    error = child.stderr.read()
    assert f"--resume --out {folder}" in error
    assert "Traceback" not in error
    steps = [int(p.name[5:]) for p in (folder / "checkpoints").glob("step_*")]
    assert 5 <= max(steps) < 40  # 5 where it came between two steps
    assert len((folder / "metrics.csv").read_text().splitlines()) == 1 + max(steps)
    child = process("--resume", "--out", folder)
    assert child.wait() == 0, child.stderr.read()
    assert result(folder) == result(whole[0])


def test_nan_is_named_and_what_was_recorded_stays(tmp_path):
    with pytest.raises(NotFinite, match="loss became nan at step 7: try a smaller learning rate"):
        run(tmp_path / "run", nan_at=7)
    rows = list(csv.DictReader((tmp_path / "run/metrics.csv").open()))
    assert [int(r["step"]) for r in rows] == list(range(7))
    assert not (tmp_path / "run/summary.json").exists()


# --- damaged and full


def interrupted(folder):
    child = process("--sleep", 0.02, "--out", folder)
    wait_for(folder, 15, child)
    child.send_signal(signal.SIGINT)
    assert child.wait() == 130
    return sorted((folder / "checkpoints").glob("step_*"))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was interrupted."""
    os.environ["FINETUNE_MODULES"] = str(FIXTURES)
    folder = tmp_path_factory.mktemp("stopped") / "run"
    interrupted(folder)
    del os.environ["FINETUNE_MODULES"]
    return folder


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing", "empty meta", "another step", "types of meta"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(whole, stopped, tmp_path, damage, capsys):
    shutil.copytree(stopped, tmp_path / "run")
    older, newest = sorted((tmp_path / "run/checkpoints").glob("step_*"))
    tensors = newest / checkpoint.TENSORS
    content = tensors.read_bytes()
    if damage == "truncated":
        tensors.write_bytes(content[:-100])
    elif damage == "altered":
        tensors.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "missing":
        tensors.unlink()
    else:
        meta = json.loads((newest / checkpoint.META).read_text())
        texts = {
            "empty meta": "",
            "another step": json.dumps(meta | {"step": 3}),
            "types of meta": json.dumps(meta | {"sha256": 3}),
        }
        (newest / checkpoint.META).write_text(texts[damage])
    (newest.parent / "step_x").mkdir()  # strangers in the folder are left alone
    (newest.parent / "step_999999").write_text("")
    run(tmp_path / "run", resume=True, sleep=0.02)
    assert f"falling back to {older.name}" in capsys.readouterr().out
    assert result(tmp_path / "run") == result(whole[0])


def test_no_good_checkpoint_left(tmp_path):
    for path in interrupted(tmp_path / "run"):
        (path / checkpoint.TENSORS).write_bytes(b"")
    with pytest.raises(UserError, match="no earlier one is left: omit --resume to start a new run"):
        run(tmp_path / "run", resume=True, sleep=0.02)


def test_a_full_disk_leaves_the_last_checkpoint(whole, tmp_path):
    """A limit on the size of files stands for the disk: the write fails half-way."""
    folder = tmp_path / "run"
    interrupted(folder)
    before = {p.name: p.stat().st_mtime for p in (folder / "checkpoints").iterdir()}
    size = max(p.stat().st_size for p in folder.rglob("*.safetensors"))

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, size - 1))

    child = process("--resume", "--out", folder, preexec_fn=limit)
    assert child.wait() == 2
    error = child.stderr.read()
    assert "cannot write" in error
    assert "free some space, or choose another folder with --out" in error
    assert "Traceback" not in error
    assert {p.name: p.stat().st_mtime for p in (folder / "checkpoints").iterdir()} == before
    child = process("--resume", "--out", folder)
    assert child.wait() == 0, child.stderr.read()
    assert result(folder) == result(whole[0])


# --- what a run depends on


def resumable(folder, tmp_path):
    """A run that stopped, with a data file."""
    data = tmp_path / "rows.txt"
    data.write_text("one")
    real = checkpoint.save

    def save(at, tensors, meta):
        real(at, tensors, meta)
        if meta["step"] == 15:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", save)
        with pytest.raises(KeyboardInterrupt):
            run(folder, data=data)
    return data


def resumed(folder, data, **more):
    return execute(registry.find("tinynet"), settings(data=data), folder, resume=True, **more)


def test_a_resumed_run_refuses_other_data(whole, tmp_path):
    folder = tmp_path / "run"
    data = resumable(folder, tmp_path)
    data.touch()  # another time of change alone does not count
    data.write_text("two")
    with pytest.raises(UserError, match=r"data \(.*rows.txt\) has other contents: restore it"):
        resumed(folder, data)
    data.write_text("one")
    assert resumed(folder, data)["changes"] == []
    assert result(folder) == result(whole[0])


@pytest.mark.parametrize("what", ["torch", "kernels"])
def test_a_resumed_run_refuses_other_versions_and_kernels_unless_they_are_accepted(tmp_path, what):
    folder = tmp_path / "run"
    data = resumable(folder, tmp_path)
    saved = json.loads((folder / "config.json").read_text())
    saved["versions"][what] = "another"
    (folder / "config.json").write_text(json.dumps(saved))
    for _ in range(2):  # a refusal changes nothing
        with pytest.raises(UserError, match=f"{what} was another and is .*: restore it"):
            resumed(folder, data)
    assert [line.split(" was ")[0] for line in resumed(folder, data, accept_changes=True)["changes"]] == [what]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda rows: [*rows[:3], rows[3].replace("0", "1"), *rows[4:]], "the rows of metrics.csv were altered"),
        (lambda rows: rows[:5], "the rows of metrics.csv were altered"),
        (lambda rows: [*rows[:3], "3,x,nan", *rows[4:]], "metrics.csv, line 4 is damaged"),
    ],
)
def test_a_resumed_run_refuses_rows_that_were_altered(tmp_path, damage, message):
    folder = tmp_path / "run"
    data = resumable(folder, tmp_path)
    rows = (folder / "metrics.csv").read_text().splitlines()
    (folder / "metrics.csv").write_text("\n".join(damage(rows)) + "\n")
    with pytest.raises(UserError, match=message):
        resumed(folder, data)


def test_a_checkpoint_of_another_run_is_not_taken(tmp_path, capsys):
    resumable(tmp_path / "run", tmp_path)
    data = resumable(tmp_path / "other", tmp_path)
    for name in ("step_000005", "step_000010", "step_000015"):
        (tmp_path / "run/checkpoints" / name).rename(tmp_path / name)
        (tmp_path / "other/checkpoints" / name).rename(tmp_path / "run/checkpoints" / name)
    with pytest.raises(UserError, match="is of another run; no earlier one is left"):
        resumed(tmp_path / "run", data)


def test_settings_that_were_altered_are_refused_with_their_names(tmp_path):
    folder = tmp_path / "run"
    resumable(folder, tmp_path)
    saved = json.loads((folder / "config.json").read_text())
    for key, value, message in (
        ("toy", 3, "toy is 3: expected `bool`"),
        ("config", [], "config is .*: expected `object`"),
        ("id", "x", "id is 'x'"),
        ("config", saved["config"] | {"lr": "1"}, "--lr '1': expected float"),
    ):
        (folder / "config.json").write_text(json.dumps(saved | {key: value}))
        child = process("--resume", "--out", folder)
        assert child.wait() == 2
        error = child.stderr.read()
        assert re.search(message, error), error
        assert len(error.splitlines()) == 1


def test_what_follows_the_last_step_can_be_repeated(whole, tmp_path, monkeypatch, capsys):
    """`finish`: the last act fails, is repaired and repeated; then once more, of a run that is finished."""
    folder = tmp_path / "run"

    def fails(*_):
        raise UserError("no room for samples")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finetune.runs.run.Run.table", fails)
        with pytest.raises(UserError, match=r"no room for samples; what was trained is kept in .* finetune finish"):
            run(folder)
    assert not (folder / "summary.json").exists()
    for _ in range(2):
        assert cli.main(["finish", str(folder)]) == 0
        assert json.loads((folder / "summary.json").read_text())["passed"] is True
        assert result(folder) == result(whole[0])
        (folder / "samples.json").unlink()
    assert cli.main(["finish", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_a_result_that_is_not_finite_is_no_result(tmp_path):
    one = Run(tmp_path / "run", settings())
    with pytest.raises(NotFinite, match="error is nan, which is no result"):
        one.result("error", float("nan"))
    with pytest.raises(NotFinite, match="speed became inf at step 3"):
        one.log(3, speed=float("inf"))
    with pytest.raises(UserError, match=r"summary.json is not written: metrics.x is not a finite number"):
        checkpoint.write_json(tmp_path / "summary.json", {"metrics": {"x": float("-inf")}})
    assert not (tmp_path / "summary.json").exists()


# --- folders


def test_a_run_removes_nothing_that_is_not_its_own(whole, tmp_path):
    folder = tmp_path / "run"
    data = resumable(folder, tmp_path)
    own = json.loads((folder / "config.json").read_text())["id"]
    outside = tmp_path / "outside"
    outside.mkdir()
    kept = [
        folder / ".tmp-notes",
        folder / "mine" / ".tmp-work" / "thesis.txt",
        folder / ".finetune-0123456789abcdef-1-other-run",
        outside / f".finetune-{own}-1-behind-a-link",
    ]
    for path in kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    (folder / "link").symlink_to(outside)
    left = folder / "checkpoints" / f".finetune-{own}-1-step_000020"
    left.mkdir()
    (left / "tensors.safetensors").write_text("half")
    resumed(folder, data)
    assert all(path.read_text() == "mine" for path in kept)
    assert not left.exists()


def test_a_reader_that_goes_away_does_not_stop_a_run(whole, tmp_path):
    command = [sys.executable, "-m", "finetune", "run", "tinynet", "--threads", "1", "--out", str(tmp_path / "run")]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    child.stdout.readline()
    child.stdout.close()
    assert child.wait() == 0
    assert child.stderr.read() == "nobody reads the output any more; continuing without it\n"
    assert result(tmp_path / "run") == result(whole[0])


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("", "--out '' names no folder"),
        (b"bad-\xff", "is not UTF-8"),
        ("x" * 300, "is too long a name"),
    ],
)
def test_names_that_no_folder_can_have(tmp_path, out, message):
    command = [sys.executable, "-m", "finetune", "run", "tinynet", "--out", out]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 2
    assert message in child.stderr
    assert len(child.stderr.splitlines()) == 1


def test_a_name_with_brackets_is_a_name(tmp_path):
    assert run(tmp_path / "[bold]x[/y]")["passed"] is True


def test_two_processes_cannot_share_a_folder(tmp_path):
    (tmp_path / "run").mkdir()
    with run_folder.locked(tmp_path / "run"), pytest.raises(UserError, match="another process is running in"):
        run(tmp_path / "run")


def test_a_finished_run_is_not_overwritten_nor_resumed(whole, tmp_path):
    before = result(whole[0])
    with pytest.raises(UserError, match="already holds a run: continue it with --resume"):
        run(whole[0])
    assert run(whole[0], resume=True) == whole[1]
    assert result(whole[0]) == before
    with pytest.raises(UserError, match="holds no run to resume"):
        run(tmp_path / "nothing", resume=True)


def test_a_run_refused_before_it_began_leaves_its_place_free(tmp_path, monkeypatch):
    def refuses(cfg, run):
        raise UserError("no such data")

    monkeypatch.setattr(registry.load(registry.find("tinynet")), "main", refuses)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "notes").write_text("mine")
    with pytest.raises(UserError, match="no such data"):
        run(tmp_path / "new")
    with pytest.raises(UserError, match=r"is not empty \(notes\): a run needs a new or an empty folder"):
        run(tmp_path / "kept")
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == ["kept", "kept/notes"]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*choose another folder with --out"):
        run(tmp_path / "file" / "run")


def test_stopped_is_no_exception_to_swallow():
    assert not issubclass(Stopped, Exception)
    assert Stopped(signal.SIGTERM).exit_code == 143
