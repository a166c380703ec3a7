"""The engine of a run, on a tiny net in which everything is that a run has to restore."""

import csv
import dataclasses
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune import checkpoint, folders, registry
from finetune.errors import UserError
from finetune.run import NotFinite, Stopped, execute

ROOT = Path(__file__).parents[1]
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
def test_killed_at_ten_moments(whole, tmp_path):
    """kill -9, at times also while a checkpoint is written."""
    folder, draw = tmp_path / "run", random.Random(0)
    words = ["--sleep", 0.02, "--checkpoint-every", 1, "--out", folder]
    for kill in range(10):
        child = process(*words, *["--resume"] * (kill > 0))
        wait_for(folder, 3 * (kill + 1), child)
        time.sleep(draw.uniform(0, 0.02))
        child.kill()
        assert child.wait() == -signal.SIGKILL
    child = process(*words, "--resume")
    assert child.wait() == 0, child.stderr.read()
    assert result(folder) == result(whole[0])
    assert not list(folder.rglob(f"{checkpoint.TEMPORARY}*"))


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


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing", "empty meta"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(whole, tmp_path, damage, capsys):
    older, newest = interrupted(tmp_path / "run")
    tensors = newest / checkpoint.TENSORS
    content = tensors.read_bytes()
    if damage == "truncated":
        tensors.write_bytes(content[:-100])
    elif damage == "altered":
        tensors.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "missing":
        tensors.unlink()
    else:
        (newest / checkpoint.META).write_text("")
    run(tmp_path / "run", resume=True, sleep=0.02)
    assert f"falling back to {older.name}" in capsys.readouterr().out
    assert result(tmp_path / "run") == result(whole[0])


def test_no_good_checkpoint_left(tmp_path):
    for path in interrupted(tmp_path / "run"):
        (path / checkpoint.TENSORS).write_bytes(b"")
    with pytest.raises(UserError, match="no earlier one is left: start the run anew"):
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


# --- folders


def test_two_processes_cannot_share_a_folder(tmp_path):
    (tmp_path / "run").mkdir()
    with folders.locked(tmp_path / "run"), pytest.raises(UserError, match="another process is running in"):
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
    for folder in (tmp_path / "new", tmp_path / "kept"):
        with pytest.raises(UserError, match="no such data"):
            run(folder)
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == ["kept", "kept/notes"]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*choose another folder with --out"):
        run(tmp_path / "file" / "run")


def test_stopped_is_no_exception_to_swallow():
    assert not issubclass(Stopped, Exception)
    assert Stopped(signal.SIGTERM).exit_code == 143
