"""megatron: what its ranks train is the model that one process trains; its results, checkpoints and failures."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import seeds
import torch
from resumed import resumes_to_the_same_bytes

from finetune.errors import UserError
from finetune.lm.io import load
from finetune.runs import registry
from finetune.runs.run import execute

INFO = registry.find("megatron")
MODULE = registry.load(INFO)
TINY = {"dim": 16, "layers": 2, "heads": 2, "length": 16, "batch": 4, "micro": 2, "warmup": 2, "compare": 2}


def run(folder, **settings):
    cfg = dataclasses.replace(MODULE.Config.toy(), **settings)
    return execute(INFO, cfg, folder, toy=True)


def tiny(folder, **settings):
    return run(folder, **(TINY | {"steps": 4} | settings))


@pytest.mark.long
@pytest.mark.parametrize("seed", seeds.THREE)
def test_toy_is_below_the_bigram(tmp_path, seed):
    summary = run(tmp_path / "run", seed=seed)
    assert summary["passed"]
    assert summary["metrics"]["held_out_bits"] < summary["baseline"]["held_out_bits"] - 0.1


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A run long enough to know the frequencies of the characters and more."""
    folder = tmp_path_factory.mktemp("learned") / "run"
    return folder, run(folder, steps=80, warmup=20, lr=3e-3, layers=2, dim=64, length=32, compare=5)


def test_ranks_learn_and_equal_one_process(learned):
    folder, summary = learned
    found, checks = summary["metrics"], summary["checks"]
    assert found["held_out_bits"] < 4.0  # the unigram has 4.66
    assert found["largest_difference"] < 1e-5
    assert found["joined_difference"] < 1e-5
    assert found["bytes_over_formula"] == pytest.approx(1, abs=0.01)
    assert all(check["passed"] for check in checks.values())
    assert {"difference_tp2", "difference_dp2", "difference_cp2", "difference_pp2"} <= set(checks)
    assert checks["micro_batches_held"]["value"] == 2
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    assert [e["name"] for e in events if e["tid"] == 0] == ["F0", "F1", "B0", "F2", "B1", "F3", "B2", "B3"]
    for name in ("timeline.png", "volume.png", "scaling.png", "training_curves.png"):
        assert (folder / name).stat().st_size > 10_000


@pytest.mark.peer
def test_transformers_opens_the_model(learned):
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(20)[None]
    theirs = AutoModelForCausalLM.from_pretrained(learned[0] / "model").eval()
    torch.testing.assert_close(load.gpt(learned[0] / "model")(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)


def test_another_layout_goes_on_from_a_checkpoint(learned, tmp_path, no_pictures):
    """pp 2 → dp 2 with a sharded optimizer: the first loss is where the other run ended, not ln V."""
    shards = learned[0] / "checkpoints/shards/final"
    shape = {"layers": 2, "dim": 64, "heads": 4, "length": 32, "compare": 0}
    layout = {"pp": 1, "dp": 2, "sharded": True, "start": shards}
    tiny(tmp_path / "run", **(shape | layout | {"steps": 1, "lr": 0.0}))
    first = (tmp_path / "run/metrics.csv").read_text().splitlines()[1].split(",")
    assert float(first[1]) < 3.2
    with pytest.raises(UserError, match=r"has the shape \[\d+, 64\], the model needs \[\d+, 16\]"):
        tiny(tmp_path / "other", start=shards, compare=0)


@pytest.mark.long
def test_shuffled_text_teaches_frequencies_only(tmp_path, no_pictures):
    found = run(
        tmp_path / "run", steps=60, warmup=10, lr=3e-3, layers=2, dim=32, length=32, compare=0, shuffle=True
    )["metrics"]  # fmt: skip
    assert found["held_out_bits"] > 4.6


def test_without_steps_nothing_is_learned(tmp_path, no_pictures):
    summary = tiny(tmp_path / "run", steps=0)
    assert summary["passed"] is False
    assert summary["metrics"]["held_out_bits"] > 6


def test_resumed_run_gives_the_same_bytes(tmp_path, no_pictures):
    config = dataclasses.replace(MODULE.Config.toy(), **TINY, steps=5, checkpoint_every=2, sequence=True, tp=2, pp=1)
    resumes_to_the_same_bytes(INFO, config, tmp_path, calls=4)


def test_experts_on_two_ranks(tmp_path, no_pictures, capsys):
    summary = tiny(tmp_path / "run", pp=1, dp=2, experts=4, ep=2, capacity=1.0, dropout=0.1, recompute="block")
    assert "largest_difference" not in summary["metrics"]
    assert summary["checks"]["balance"]["value"] >= 1 - 1e-6
    assert summary["checks"]["choices_without_room"]["value"] > 0
    assert not (tmp_path / "run/model").exists()
    said = capsys.readouterr().out
    assert re.search(r"\[rank 1\] tp 0 pp 0 dp 1 cp 0: blocks 0–1; [\d,]+ parameters", said)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tp": 4, "pp": 1}, "tp 4 is too large: there are 2 key–value heads"),
        ({"pp": 4}, "4 pipeline stages are too many: the model has 2 layers"),
        ({"pp": 1, "cp": 3}, "cp 3 needs a length that 6 divides, not 16"),
        ({"tp": 2, "pp": 1, "experts": 4}, "experts: tp 2 is not supported"),
        ({"pp": 1, "dp": 2, "ep": 2}, "ep 2 needs experts"),
        ({"pp": 1, "chunks": 2}, "1f1b has one chunk a stage, not 2"),
    ],
)
def test_what_cannot_be_split_is_refused(tmp_path, settings, said):
    with pytest.raises(UserError, match=said):
        tiny(tmp_path / "run", **settings)
    assert not (tmp_path / "run/model").exists()


def started(folder, *options):
    words = [f"--{key}={value}" for key, value in TINY.items()]
    command = [sys.executable, "-m", "finetune", "run", "megatron", "--toy", *words, *options, "--out", folder]
    root = Path(__file__).parents[2]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(list(map(str, command)), text=True, cwd=root, **output)


def ranks_of(folder, process):
    """The pids of the ranks, once the run takes steps."""
    while process.poll() is None and not (folder / "checkpoints" / "shards").exists():
        time.sleep(0.1)
    found = {}
    for path in Path("/proc").glob("[0-9]*/fd"):
        try:
            targets = {os.readlink(fd) for fd in path.iterdir()}
        except OSError:
            continue
        if int(path.parent.name) != process.pid and any(t.startswith("socket:") for t in targets):
            parents = (path.parent / "stat").read_text().rsplit(")", 1)[1].split()
            found[int(path.parent.name)] = int(parents[1])
    servers = {pid for pid, parent in found.items() if parent == process.pid}
    return sorted(pid for pid, parent in found.items() if parent in servers)


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_a_run_ends_with_its_ranks(tmp_path, number):
    """A killed rank ends the run with code 2 and a line that names it; Ctrl-C ends all, and the run can be resumed."""
    folder = tmp_path / "run"
    process = started(folder, "--steps=100000", "--checkpoint-every=20", "--compare=0")
    ranks = ranks_of(folder, process)
    assert len(ranks) == 2
    time.sleep(0.5)
    began = time.monotonic()
    if number == signal.SIGKILL:
        os.kill(ranks[0], number)
    else:
        process.send_signal(number)
    said = process.communicate(timeout=60)[0]
    assert time.monotonic() - began < 60
    if number == signal.SIGKILL:
        assert process.returncode == 2
        named = r"rank \d was killed by SIGKILL, after its \w+ of \[[\d, ]*\] \w+ over (pp|model)"
        assert re.search(named, said), said[-2000:]
    else:
        assert process.returncode == 128 + signal.SIGINT
        assert "--resume" in said
    until = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in ranks) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
