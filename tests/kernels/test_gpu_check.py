"""scripts/gpu_check, rehearsed with the emulator in the place of the GPU; what else can be known of a GPU run here."""

import importlib.metadata
import json
import os
import subprocess
import sys
import zipfile

import pytest

from finetune import ops
from finetune.kernels import cuda_toolkit, emulator

ROOT = emulator.ROOT
sys.path.insert(0, str(ROOT / "scripts"))
import gpu_check  # noqa: E402


@pytest.fixture
def logs(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(gpu_check, "SITE", tmp_path / "site")
    monkeypatch.setattr(gpu_check, "SECONDS", dict.fromkeys(gpu_check.STAGES, 900))  # this machine may be busy
    return tmp_path


def rehearse(folder, names, **how):
    status = gpu_check.check("emulated", folder / "report.json", how.pop("budget", 7000), names, **how)
    return status, json.loads((folder / "report.json").read_text())


def test_the_ops_are_those_of_the_registry():
    assert set(gpu_check.op_names()) == set(ops.REGISTRY)


def test_tests_find_their_row():
    assert gpu_check.belongs("test_values[rms_norm-odd size-cuda-f32]") == ("rms_norm", "values")
    assert gpu_check.belongs("test_opcheck[attention]") == ("attention", "rest")
    assert gpu_check.belongs("test_several_chunks_of_gradients") == ("other", "rest")
    assert gpu_check.architecture("9.0") == "90a"
    assert gpu_check.architecture("8.6") == "86"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "stages", [("smoke", "bench"), pytest.param(("smoke", "values", "bench", "memcheck"), marks=pytest.mark.long)]
)
def test_one_op_rehearsed(logs, stages):
    """By real processes; the other stages differ in the choice of tests."""
    status, report = rehearse(logs, ["loss_scale_update"], stages=stages)
    assert status == 0, report
    rows = report["ops"]["loss_scale_update"]
    assert set(rows) == set(stages)
    assert rows["smoke"]["passed"] == 1
    assert "values" not in stages or rows["values"]["passed"] == 2 * 3  # samples × dtypes
    assert rows["bench"]["cells"][0]["ratio"] > 0
    assert report["ok"]
    assert report["machine"]["torch"]


CHILD = """
import json, os, signal, sys, time
done = open(os.environ["GPU_CHECK_RESULTS"], "a")
op, stage = os.environ["GPU_CHECK_ONLY"].split()
print(json.dumps({"test": "first"}), file=done)
print(json.dumps({"test": "first", "outcome": "passed", "text": ""}), file=done)
print(json.dumps({"test": "second"}), file=done, flush=True)
if op == "gelu":
    os.kill(os.getpid(), signal.SIGSEGV)
if op == "rope":
    time.sleep(100)
print(json.dumps({"test": "second", "outcome": "failed" if op == "swiglu" else "passed", "text": "wrong"}), file=done)
sys.exit(op == "swiglu")
"""


def test_a_crash_and_a_hang_end_their_row_only(logs, monkeypatch):
    monkeypatch.setattr(gpu_check, "test_command", lambda op, stage: [sys.executable, "-c", CHILD])
    monkeypatch.setattr(gpu_check, "build", lambda *a: {"status": "passed", "errors": []})
    monkeypatch.setitem(gpu_check.SECONDS, "smoke", 4)
    status, report = rehearse(logs, ["gelu", "rope", "swiglu", "cast"], stages=("smoke",), jobs=2)
    rows = {op: report["ops"][op]["smoke"] for op in report["ops"]}
    assert status == 1
    assert {op: row["status"] for op, row in rows.items()} == dict.fromkeys(("gelu", "rope", "swiglu"), "failed") | {
        "cast": "passed"
    }
    assert rows["gelu"]["errors"][0] == {"test": "second", "text": "crashed (SIGSEGV)"}
    assert rows["rope"]["errors"] == [{"test": "second", "text": "timeout"}]
    assert rows["swiglu"]["errors"] == [{"test": "second", "text": "wrong"}]
    assert rows["cast"]["passed"] == 2


def test_what_the_time_does_not_allow_is_left_out(logs, monkeypatch):
    monkeypatch.setattr(gpu_check, "build", lambda *a: {"status": "passed", "errors": []})
    status, report = rehearse(logs, ["gelu"], budget=1)
    assert status == 3
    assert report["left_out"] == [f"gelu {stage}" for stage in gpu_check.STAGES if stage != "racecheck"]
    assert not report["ok"]


@pytest.mark.parametrize("part", ["describe", "install", "build"])
def test_a_failed_part_is_a_row_and_the_rest_is_tried(logs, monkeypatch, part):
    def fails(*args):
        raise OSError("no such program")

    monkeypatch.setattr(gpu_check, "test_command", lambda op, stage: [sys.executable, "-c", CHILD])
    monkeypatch.setattr(gpu_check, "build", lambda *a: {"status": "passed", "errors": []})
    monkeypatch.setattr(gpu_check, part, fails)
    status, report = rehearse(logs, ["cast"], stages=("smoke",))
    assert (status, report["ops"]["cast"]["smoke"]["passed"]) == (1, 2)
    assert ":  OSError: no such program" in gpu_check.table(report)


def test_what_a_tool_found_is_told(logs, monkeypatch):
    """compute-sanitizer's own words, not the end of a long log."""
    said = "========= COMPUTE-SANITIZER\n========= Invalid __global__ write of size 16 bytes\nmuch else\n"
    script = logs / "compute-sanitizer"
    script.write_text(f"#!/bin/sh\nprintf '{said}'\nexit 99\n")
    script.chmod(0o755)
    monkeypatch.setattr(gpu_check, "tool", lambda name: str(script))
    row = gpu_check.run_script("gelu", "memcheck", 60, gpu_check.environment("cuda", 1))
    assert row["status"] == "failed"
    assert row["errors"][0]["text"] == "exit status 99: ========= Invalid __global__ write of size 16 bytes"


def test_the_plugin_stops_where_the_device_answers_no_more(tmp_path):
    """And the process that follows takes the tests that are left."""
    (tmp_path / "test_values.py").write_text(
        "import gpu_check, pytest\n"
        "def broken(): return False\n"
        "@pytest.mark.parametrize('case', ['gelu-a', 'gelu-b', 'gelu-c', 'rope-a'])\n"
        "def test_values(case):\n"
        "    if case == 'gelu-b':\n"
        "        gpu_check.healthy = broken\n"
        "        raise RuntimeError('CUDA error: an illegal memory access was encountered')\n"
    )
    results = tmp_path / "results"
    env = gpu_check.environment("emulated", 1) | {"GPU_CHECK_ONLY": "gelu values", "GPU_CHECK_RESULTS": str(results)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu_check", "--rootdir", str(tmp_path), str(tmp_path)]
    statuses = [subprocess.run(command, env=env, cwd=tmp_path, capture_output=True).returncode for _ in range(2)]
    assert statuses == [gpu_check.STOPPED, 0]
    ended = [(row["test"][-2:-1], row["outcome"]) for row in gpu_check.read_lines(results) if "outcome" in row]
    assert ended == [("a", "passed"), ("b", "failed"), ("c", "passed")]


def test_only_missing_wheels_are_installed(tmp_path):
    for name in ("finetune_test_wheel", "torch"):
        with zipfile.ZipFile(tmp_path / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}.py", "answer = 42\n")
            wheel.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            wheel.writestr(
                f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            wheel.writestr(f"{name}-1.0.dist-info/RECORD", "")
    before = importlib.metadata.version("torch")
    row = gpu_check.install(tmp_path, tmp_path / "site")
    assert row["wheels"] == ["finetune_test_wheel-1.0-py3-none-any.whl"]
    assert (tmp_path / "site/finetune_test_wheel.py").exists()
    assert not (tmp_path / "site/torch.py").exists()
    assert importlib.metadata.version("torch") == before


def test_the_toolkit_is_found_off_the_path(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin/nvcc"
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", "/nowhere")
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv("CUDA_HOME", raising=False)
        monkeypatch.setenv(variable, str(tmp_path))
        assert cuda_toolkit.tool("nvcc") == str(nvcc)


def test_torchs_side_of_the_benches_stays_on_the_gpu(tmp_path):
    """No composition mixes CPU and CUDA tensors: fake ones show it."""
    import torch

    (tmp_path / "guard.cpp").write_text(
        "#include <c10/core/impl/DeviceGuardImplInterface.h>\n"
        "using Guard = c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>;\n"
        "C10_REGISTER_GUARD_IMPL(CUDA, Guard)\n"
    )
    where = torch.__path__[0]
    flags = ["-std=c++20", "-shared", "-fPIC", f"-I{where}/include", f"-L{where}/lib", "-lc10"]
    subprocess.run(["g++", "guard.cpp", "-o", "guard.so", *flags], cwd=tmp_path, check=True)
    path = os.pathsep.join([str(ROOT), str(ROOT / "benches")])
    command = [sys.executable, str(ROOT / "tests/fake_cuda.py"), str(tmp_path / "guard.so")]
    out = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert (out.returncode, out.stdout) == (0, ""), out.stderr[-2000:]


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_all_ops_rehearsed(logs):
    status, report = rehearse(logs, gpu_check.op_names(), stages=tuple(s for s in gpu_check.STAGES if s != "bench"))
    assert status == 0, gpu_check.table(report)
    assert len(report["ops"]) == len(ops.REGISTRY) + 1  # the tests of no op
