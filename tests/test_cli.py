"""`python -m finetune` as its users meet it: output, exit codes, one clear line for every mistake."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from finetune import cli, smoke
from finetune.runs import config, registry

ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "tests" / "fixtures" / "modules"


def finetune(*words, **environment):
    return call(sys.executable, "-m", "finetune", *words, **environment)


def call(*command, **environment):
    env = {**os.environ, **environment}
    return subprocess.run([*map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def tiny(*words):
    return finetune(*words, FINETUNE_MODULES=str(FIXTURES))


def test_list_is_quick_and_needs_no_torch():
    code = "import sys; from finetune.cli import main; main(['list']); sys.exit('torch' in sys.modules)"
    assert call(sys.executable, "-c", code).returncode == 0
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        found = finetune("list")
        seconds.append(time.perf_counter() - began)
    assert "sft" in found.stdout
    assert "post_train/alignment" in found.stdout
    began = time.perf_counter()
    call(sys.executable, "-c", "import rich_click, rich.table")  # what no command-line program of this kind is without
    floor = time.perf_counter() - began
    assert min(seconds) <= max(0.3, 2 * floor)


def test_json_is_json_and_nothing_else():
    rows = json.loads(finetune("list", "--json").stdout)
    assert {"name", "group", "title", "summary", "status"} == set(rows[0])
    assert {"op", "backend", "ok", "reason"} <= set(json.loads(finetune("ops", "--json").stdout)[0])
    assert {"what", "ok", "found"} == set(json.loads(finetune("doctor", "--json").stdout)[0])
    assert json.loads(finetune("memory", "llama-7b", "--json").stdout)["parameters"] == 6_738_415_616


def test_ops_shows_what_is_not_there_yet():
    text = finetune("ops").stdout
    for word in ("attention", "adamw", "reference", "cpp", "triton", "cuda"):
        assert word in text


def test_run_json_and_folder(tmp_path):
    done = tiny("run", "tinynet", "--toy", "--json", "--out", tmp_path / "run", "--seed", "3")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["module"], summary["toy"], summary["seed"], summary["steps"]) == ("tinynet", True, 3, 12)
    assert "all targets reached" in done.stderr


def test_run_help_shows_settings_with_their_comments():
    text = tiny("run", "tinynet", "--help").stdout
    for word in (
        "--lr",
        "Adam's step size",
        "0.01",
        "mse|l1",
        "--no-noise",
        "the same seed gives the same run",
        "--resume",
    ):
        assert word in text
    assert "MODULE" in finetune("run", "--help").stdout
    assert "Start with" in finetune("--help").stdout
    assert "Start with" in finetune().stdout


def test_resume_takes_the_newest_and_refuses_other_settings(tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "finetune", "run", "tinynet", "--out", str(folder), "--sleep", "0.1"]
    env = {**os.environ, "FINETUNE_MODULES": str(FIXTURES)}
    child = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (folder / "checkpoints/step_000005").exists():
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    assert child.wait() == 130
    changed = tiny("run", "tinynet", "--resume", "--out", folder, "--lr", "1")
    assert changed.returncode == 2
    assert "--lr 1.0" in changed.stderr
    assert "has 0.01" in changed.stderr
    assert "--toy: the run in" in tiny("run", "tinynet", "--toy", "--resume", "--out", folder).stderr
    assert tiny("run", "tinynet", "--resume", "--out", folder).returncode == 0
    assert "finished already" in tiny("run", "tinynet", "--resume", "--out", folder).stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "tinyent"], "unknown module 'tinyent'"),
        (["run"], "which module?"),
        (["run", "--lr", "1", "tinynet"], "the module's name comes first"),
        (["run", "tinynet", "--lrr", "1"], "unknown option --lrr"),
        (["run", "tinynet", "--lr", "fast"], "--lr 'fast': expected float"),
        (["run", "tinynet", "--loss", "mes"], "expected mse|l1"),
        (["run", "tinynet", "--steps", "-1"], "--steps -1 is too small"),
        (["run", "tinynet", "--resume", "--out", "/nonexistent/run"], "holds no run to resume"),
        (["run", "tinynet", "--toy", "--out", "/proc/nothing"], "cannot write /proc/nothing"),
        (["run", "tinynet", "--toy", "--out", "{tmp}", "--nan-at", "3"], "loss became nan at step 3"),
        (["memory", "llama-7"], "unknown module or model 'llama-7'"),
        (["memory", "llama-7b", "--bach", "8"], "unknown option --bach"),
        (["memory", "llama-7b", "--batch", "0"], "--batch 0 is too small"),
        (["memory", "tinynet"], "'tinynet' has no memory plan"),
        (["generate", "--model", "nowhere", "--prompt", "x"], "there is no model nowhere"),
        (["generate", "--prompt", "x"], "--model"),
        (["generate", "--model", "smollm2", "--prompt", "x", "--top-p", "2"], "--top-p"),
        (["bench", "attenion"], "unknown op 'attenion'"),
        (["bench", "rms_norm", "--sample", "none"], "unknown sample 'none'"),
        (["fetch", "gpt5"], "smollm2"),
        (["smoke", "--modules", "tinyent"], "unknown module 'tinyent'"),
        (["lsit"], "lsit"),
        (["list", "--jsn"], "--jsn"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_a_mistake_gives_one_line_and_code_2(words, message, tmp_path):
    done = tiny(*(word.replace("{tmp}", str(tmp_path / "run")) for word in words))
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert any(part in lines[-1] for part in message.split("|")), done.stderr
    assert lines[-1].startswith("error: ")
    assert "Traceback" not in done.stderr


def test_a_suggestion_comes_with_the_mistake():
    assert "tinynet" in tiny("run", "tinyent").stderr
    assert "lr" in tiny("run", "tinynet", "--lrr", "1").stderr.split("did you mean")[1]
    assert "attention" in finetune("bench", "attenion").stderr
    assert "did you mean 'toy'?" in tiny("run", "tinynet", "--tyo").stderr, "an option of the command itself"
    assert "planned (day 14 of the path)" in finetune("run", "deepspeed").stderr


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("rows.jsonl", lambda f: f.write_text(""), "holds no rows"),
        ("rows.jsonl", lambda f: f.write_text('{"prompt": "a", "completion": "b"}\n{"x"'), "line 2: not JSON"),
        ("rows.jsonl", lambda f: None, "there is no such file"),
    ],
)
def test_bad_data_files(tmp_path, name, make, message):
    file = tmp_path / name
    make(file)
    done = finetune("run", "sft", "--toy", "--data", file, "--out", tmp_path / "run")
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_prompt_that_is_too_long(smollm2):
    done = finetune("generate", "--model", smollm2, "--prompt", "word " * 9000)
    assert done.returncode == 2
    assert "does not fit the model's maximum length of 8192: shorten it" in done.stderr


def test_memory_before_training():
    text = finetune("memory", "sft").stdout
    for word in ("weights", "gradients", "optimizer states", "activations", "logits", "peak", "This machine has"):
        assert word in text
    text = finetune("memory", "llama-2-7b", "--optimizer", "adamw", "--batch", "8", "--seq", "4096").stdout
    assert "6.74 billion" in text
    assert "does not fit" in text


def test_generate_with_an_adapter(tmp_path, smollm2, smollm2_model):
    """A folder that holds an adapter: its base is loaded, and it changes the answer as the merged model does."""
    import copy

    import torch

    from finetune.chat import answer
    from finetune.lm.io import load, save
    from finetune.peft import adapters, lora

    model = copy.deepcopy(smollm2_model)
    lora.apply_lora(model, 4, generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, layer in lora.adapters(model):
            layer.part("default").lora_B.normal_(generator=draw).mul_(0.02)
    adapters.save_adapter(model, tmp_path / "adapter", str(smollm2))
    lora.merge(model)
    save.model(model, tmp_path / "merged", load.tokenizer(smollm2))
    base, adapter, merged = (
        answer(str(source), ["What is a list?"], max_new_tokens=12)
        for source in (smollm2, tmp_path / "adapter", tmp_path / "merged")
    )
    assert adapter == merged != base
    config = tmp_path / "adapter" / adapters.CONFIG
    config.write_text(config.read_text().replace(str(smollm2), ""))
    done = finetune("generate", "--model", tmp_path / "adapter", "--prompt", "x")
    assert (done.returncode, "--base" in done.stderr) == (2, True)


# --- the learning path's short commands


def test_run_py_and_smoke_test_py(tmp_path):
    assert call(sys.executable, "run.py", "--list").stdout == finetune("list").stdout
    env = {"FINETUNE_MODULES": str(FIXTURES)}
    done = call(sys.executable, "run.py", "--module", "tinynet", "--toy", "--out", tmp_path / "run", **env)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/summary.json").read_text())["toy"] is True
    assert call(sys.executable, "run.py", "--module", "tinyent", **env).returncode == 2
    assert call(sys.executable, "run.py", "--toy").returncode == 2
    assert "usage" in call(sys.executable, "run.py", "--help").stdout


def test_smoke_reports(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_MODULES", str(FIXTURES))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    script = [sys.executable, ROOT / "scripts" / "smoke_test.py", "--modules", "tinynet"]
    done = subprocess.run([*map(str, script)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "output/smoke_reports").glob("*.json")
    report = json.loads(path.read_text())
    assert report["passed"] is True
    (module,) = report["modules"]
    assert module["metrics"]["test_loss"] < module["baseline"]["test_loss"]
    page = path.with_suffix(".md").read_text(encoding="utf-8")
    assert str(path.with_suffix(".md").name) in done.stdout
    assert "1 of 1 modules passed" in page
    assert f"| tinynet | test_loss | {module['metrics']['test_loss']:.4g} |" in page


def test_smoke_reports_what_fails(tmp_path, monkeypatch):
    """A missed target, a crash and a setting that the help does not name, each in one line."""
    monkeypatch.setenv("FINETUNE_MODULES", str(FIXTURES))
    info = registry.find("tinynet")
    summary = {"passed": False, "reached": {"a": True, "b": False}, "metrics": {"a": 1, "b": 2}, "baseline": {"b": 1},
               "target": {"b": 3}, "standard_error": {"b": 0.25},
               "higher_is_better": {"a": True, "b": True}, "peak_rss_bytes": 5}  # fmt: skip
    help_text = " ".join(f"--{config.dashed(f.name)}" for f in config.describe(registry.load(info).Config))
    answers = {"missed": (0, json.dumps(summary), []), "crashed": (1, "", ["…", "ValueError: no"])}
    for case, (toy, help_, error) in {
        "missed": ("missed", help_text, "target missed: b"),
        "crashed": ("crashed", help_text, "ValueError: no"),
        "unnamed": ("missed", help_text.replace("--noise", ""), "--help: does not name noise"),
    }.items():
        monkeypatch.setattr(smoke, "call", lambda *w, h=help_, t=toy: (0, h, []) if "--help" in w else answers[t])
        report = smoke.smoke(["tinynet"], Console(file=io.StringIO()), tmp_path / case)
        assert report["passed"] is False
        assert report["modules"][0]["error"] == error
        page = Path(report["report"]).read_text(encoding="utf-8")
        assert f"| tinynet | **FAILED** {error} |" in page
        assert ("| tinynet | b | 2.00 ± 0.25 | 1 | ≥ 3 | **missed** |" in page) == (case == "missed")


def test_broken_pipe_and_interrupt(monkeypatch, capsys):
    monkeypatch.setattr(cli.app, "main", lambda **_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.main([]) == 130
    assert "interrupted" in capsys.readouterr().err
