"""Builds and checks everything on a machine with a GPU: one run of at most eight minutes, without network.

    scripts/gpu_check --pack               at home: wheels of what that machine may lack, into build/gpu_wheels
    scripts/gpu_check [--out FILE.json]    there: build, tests, benches against torch's kernels, compute-sanitizer
    scripts/gpu_check --device emulated    a rehearsal without a GPU: emulated kernels, small cases

The machine's own Python and torch are used as they are. Every op runs in processes of its own, with a timeout each, so
that a crash, a hang or a CUDA error (after which a process can do nothing more) ends a row of the table and not the
run. The order is what matters most first: one small call of each op, values, gradients, the other tests, benches,
compute-sanitizer. What the time does not allow is omitted, and listed. The JSON is written after every row.
Exit status: 0 all passed, 1 something failed, 3 nothing failed, but something was omitted.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import runpy
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WHEELS, SITE, LOGS = (ROOT / "build" / name for name in ("gpu_wheels", "gpu_site", "gpu_check"))
TESTS = ("smoke", "values", "gradients", "rest")  # stages that pytest runs; the others are benches and tools
STAGES = (*TESTS, "bench", "memcheck", "racecheck")
SECONDS = {"smoke": 60, "values": 150, "gradients": 150, "rest": 150, "bench": 90, "memcheck": 100, "racecheck": 100}
# No row of these stages starts after this share of the time: the later stages get the rest.
UNTIL = {"smoke": 0.6, "values": 0.6, "gradients": 0.6, "rest": 0.6, "bench": 0.82, "memcheck": 0.99, "racecheck": 0.99}
OTHER = "other"  # the row of tests that belong to no op
STOPPED = 86  # exit status of a test process whose device answers no more
Row = dict[str, Any]


def op_names() -> list[str]:
    """The ops, from the list of native sources: torch may not be importable yet."""
    names = re.findall(r"^([a-z]\w*)", (ROOT / "csrc/sources.txt").read_text(), re.MULTILINE)
    return [name for name in names if (ROOT / f"finetune/ops/{name}.py").exists()]  # a model's whole pass is no op


def tool(name: str) -> str | None:
    """Path of a program of the CUDA toolkit, or of one next to this Python."""
    beside_python = shutil.which(name, path=sysconfig.get_path("scripts"))
    return runpy.run_path(str(ROOT / "finetune/kernels/cuda_toolkit.py"))["tool"](name) or beside_python


# --- wheels


def pack(folder: Path = WHEELS, python: str = "3.12") -> int:
    """Downloads what the project imports, and pytest, as wheels for that Python; torch, and numpy and matplotlib, which
    every such machine has in its own version, are omitted."""
    import tomllib

    own = {"torch", "numpy", "matplotlib"}
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    wanted = [line for line in listed if re.split(r"[^\w-]", line)[0] not in own] + ["pytest", "pytest-timeout"]
    folder.mkdir(parents=True, exist_ok=True)
    where = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    where += [f"--platform=manylinux_2_{glibc}_x86_64" for glibc in (34, 28, 27, 24, 17)]
    where += ["--platform=manylinux2014_x86_64", "--platform=manylinux1_x86_64"]
    pip = [sys.executable, "-m", "pip"]
    report = folder / "report.json"
    resolve = ["install", "--quiet", "--dry-run", "--ignore-installed", "--target", str(SITE), "--report", str(report)]
    subprocess.run([*pip, *resolve, *where, *wanted], check=True)
    found = [each["metadata"] for each in json.loads(report.read_text())["install"]]
    report.unlink()
    pinned = [f"{each['name']}=={each['version']}" for each in found if each["name"] not in own]
    for old in folder.glob("*.whl"):
        old.unlink()
    subprocess.run([*pip, "download", "--quiet", "--no-deps", "--dest", str(folder), *where, *pinned], check=True)
    wheels = list(folder.glob("*.whl"))
    print(f"{len(wheels)} wheels, {sum(w.stat().st_size for w in wheels) / 2**20:.1f} MiB in {folder}")
    return 0


def install(folder: Path | None = None, site: Path | None = None) -> Row:
    """Puts those wheels whose package this Python lacks into `site`, which children have on their path."""
    folder, site = folder or WHEELS, site or SITE
    missing = []
    for wheel in sorted(folder.glob("*.whl")):
        try:
            importlib.metadata.version(wheel.name.split("-")[0])
        except importlib.metadata.PackageNotFoundError:
            missing.append(wheel)
    shutil.rmtree(site, ignore_errors=True)
    if missing:
        how = ["install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--target", str(site)]
        subprocess.run([sys.executable, "-m", "pip", *how, *map(str, missing)], check=True)
    return {"status": "passed", "wheels": [wheel.name for wheel in missing], "errors": []}


# --- children


def environment(device: str, jobs: int) -> dict[str, str]:
    path = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "benches"), str(SITE), os.environ.get("PYTHONPATH", "")]
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    given = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path)), "FINETUNE_GPU_CHECK": device}
    return given | {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}


def child(command: list[str], log: Path, seconds: float, env: dict[str, str]) -> int | None:
    """Runs a command with its output in `log`; its status, negative for a signal, None if it ran out of time."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, cwd=ROOT, env=env, start_new_session=True)
        try:
            return process.wait(max(seconds, 1))
        except subprocess.TimeoutExpired:
            return None
        finally:  # with what it started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def how_it_ended(status: int | None) -> str:
    if status is None:
        return "timeout"
    return f"crashed ({signal.Signals(-status).name})" if status < 0 else f"exit status {status}"


def tail(log: Path, size: int = 1500) -> str:
    return log.read_text(errors="replace")[-size:] if log.exists() else ""


def read_lines(path: Path) -> list[Row]:
    """The JSON lines of a file that its writer may not have finished."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def test_command(op: str, stage: str) -> list[str]:
    files = [str(f) for f in sorted((ROOT / "tests").glob("test_*.py")) if "pytest.mark.gpu" in f.read_text()]
    files = [f for f in files if Path(f).name != "test_gpu_check.py"]
    return [sys.executable, "-m", "pytest", "-p", "gpu_check", "-m", "gpu", "-q", "-rN", "--tb=short", *files]


def run_tests(op: str, stage: str, seconds: float, env: dict[str, str]) -> Row:
    """One op's tests of one stage. A process that dies, or meets a CUDA error, is followed by one for the others."""
    results, log = LOGS / f"{op}.{stage}.jsonl", LOGS / f"{op}.{stage}.log"
    env = env | {"GPU_CHECK_ONLY": f"{op} {stage}", "GPU_CHECK_RESULTS": str(results)}
    begin, ends = time.monotonic(), []
    for _ in range(4):
        ends.append(child(test_command(op, stage), log, seconds - (time.monotonic() - begin), env))
        broken = ends[-1] is not None and (ends[-1] < 0 or ends[-1] == STOPPED)  # stopped by the plugin below
        if not broken or time.monotonic() - begin > seconds / 2:
            break
    rows = read_lines(results)
    outcomes = {row["test"]: row for row in rows if "outcome" in row}
    errors = [{"test": name, "text": row["text"]} for name, row in outcomes.items() if row["outcome"] == "failed"]
    unfinished = [row["test"] for row in rows if "outcome" not in row and row["test"] not in outcomes]
    bad = [status for status in ends if status not in (0, 1, STOPPED, 5)]  # 5: there are no such tests
    errors += [{"test": name, "text": how_it_ended(status)} for name, status in zip(unfinished, bad, strict=False)]
    if bad and not unfinished:
        errors.append({"test": "", "text": f"{how_it_ended(bad[-1])}: {tail(log)}"})
    count = {name: sum(row["outcome"] == name for row in outcomes.values()) for name in ("passed", "skipped")}
    status = "failed" if errors else "passed" if outcomes else "none"
    return {"status": status, **count, "failed": len(errors), "errors": errors[:8]}


def run_script(op: str, stage: str, seconds: float, env: dict[str, str]) -> Row:
    """A bench (its rows in "cells") or a small case under a tool of compute-sanitizer."""
    results, log = LOGS / f"{op}.{stage}.json", LOGS / f"{op}.{stage}.log"
    command = [sys.executable, str(Path(__file__)), "--child", stage, op, str(results)]
    sanitizer = tool("compute-sanitizer")
    if stage != "bench" and env["FINETUNE_GPU_CHECK"] == "cuda":
        if not sanitizer:
            return {"status": "none", "errors": [{"test": "", "text": "no compute-sanitizer here"}]}
        command = [sanitizer, "--tool", stage, "--report-api-errors", "no", "--error-exitcode", "99", *command]
        env = env | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    status = child(command, log, seconds, env)
    row: Row = {"status": "passed" if status == 0 else "failed", "errors": []}
    if stage == "bench":
        report = json.loads(results.read_text()) if results.exists() else {"results": [], "refused": []}
        keep = ("op", "sample", "work", "dtype", "backend")
        row["cells"] = [
            {name: each["cell"][name] for name in keep}
            | {"ours": each["ours"]["median"], "torch": each["torch"]["median"], "ratio": each["ratio"]["median"]}
            | {"baseline": each["baseline"], "bytes_per_second": each["bytes_per_second"]}
            | {"flops_per_second": each["flops_per_second"]}
            for each in report["results"]
        ]
        row["errors"] = [{"test": "", "text": text} for text in report["refused"]]
    if status != 0 and not row["errors"]:
        found = re.findall(r"^========= (?!COMPUTE-SANITIZER)\S.*", tail(log, 10**6), re.MULTILINE)
        row["errors"] = [{"test": "", "text": f"{how_it_ended(status)}: {' '.join(found[:6]) or tail(log)}"}]
    return row


# --- what a child does: with pytest this file is a plugin


def belongs(name: str) -> tuple[str, str]:
    """(op, stage) of a test by its name: `test_values[rms_norm-…]`."""
    function, _, parameters = name.partition("[")
    op = parameters.rstrip("]").split("-")[0]
    stage = function.removeprefix("test_")
    return (op if op in op_names() else OTHER, stage if stage in TESTS else "rest")


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    if not (only := os.environ.get("GPU_CHECK_ONLY")):
        return
    begun = {row["test"] for row in read_lines(Path(os.environ["GPU_CHECK_RESULTS"]))}
    chosen = [i for i in items if " ".join(belongs(i.name)) == only and i.nodeid not in begun]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


def record(**row: Any) -> None:
    with open(os.environ["GPU_CHECK_RESULTS"], "a") as file:
        file.write(json.dumps(row) + "\n")


def pytest_runtest_logstart(nodeid: str) -> None:
    record(test=nodeid)


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome != "passed":
        text = "" if report.outcome == "passed" else " ".join(str(report.longrepr).split())[-400:]
        record(test=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 3), text=text)
    if report.failed and not healthy():
        import pytest

        pytest.exit("CUDA error", returncode=STOPPED)


def healthy() -> bool:
    """Does the device still answer? After an illegal access it does so in no process that met it."""
    import torch

    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def run_child(stage: str, op: str, results: str) -> int:
    """A bench, or one small call of the op with its gradients, as compute-sanitizer shall see it."""
    import torch

    from finetune import ops
    from finetune.ops._check import flat, run

    real = os.environ["FINETUNE_GPU_CHECK"] == "cuda"
    if stage == "bench":
        import fcntl

        import harness

        LOGS.mkdir(parents=True, exist_ok=True)
        with (LOGS / "bench.lock").open("w") as lock:  # imports overlap, measurements do not
            fcntl.flock(lock, fcntl.LOCK_EX)
            small = min(harness.bench_samples(op).values(), key=lambda sample: sample.bytes)
            how = ["--backend", "cuda", "triton"] if real else ["--backend", "cpp", "--sample", small.name]
            how += ["--dtype", "bf16", "f32"] if real else ["--dtype", "f32"]
            return harness.main([op, *how, "--seconds", "0.15" if real else "0.01", "--json", results])
    if not real:
        from finetune.kernels import emulator

        emulator.load("checked")
    backend = "cuda" if real else "checked"
    samples = [s for s in ops.REGISTRY[op].samples() if not s.bench and any(t.numel() for t in flat(s.args))]
    ran = 0
    for sample in sorted(samples, key=lambda s: sum(t.numel() for t in flat(s.args)))[:2]:
        for dtype in (torch.float32, torch.bfloat16):
            where = "cuda" if real else "cpu"
            if ops.REGISTRY[op].why_not(backend, *sample.cast(dtype, where), **sample.options(where)) is None:
                run(op, sample, dtype, backend)
                ran += 1
    return 0 if ran else 4


# --- the machine and the build


def nvidia_smi() -> dict[str, str]:
    """name, driver, memory and compute capability of the first GPU; empty without one."""
    fields = ("name", "driver_version", "memory.total", "compute_cap")
    try:
        out = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=30,
        )  # fmt: skip
        first = out.stdout.splitlines()[0].split(", ")
    except (OSError, IndexError, subprocess.TimeoutExpired):
        return {}
    return dict(zip(fields, first, strict=False)) if out.returncode == 0 else {}


def describe() -> Row:
    about: Row = {"gpu": nvidia_smi(), "python": sys.version.split()[0], "system": platform.platform()}
    about["cores"] = os.cpu_count()
    for package in ("torch", "triton", "flash-attn", "liger-kernel", "pytest", "numpy"):
        try:
            about[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            about[package] = None
    for name in ("nvcc", "compute-sanitizer", "cmake", "ninja"):
        about[name] = tool(name)
    git = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    about["commit"] = git.stdout.strip() or None
    return about


def architecture(capability: str) -> str:
    """ "9.0" → "90a": machine code for this GPU alone, without PTX."""
    digits = capability.replace(".", "")
    return f"{digits}a" if int(digits) >= 90 else digits


def build(device: str, capability: str, seconds: float, env: dict[str, str]) -> Row:
    """The native library for this GPU (without its CUDA kernels, if these do not compile: Triton's can still be
    checked), or the emulated kernels."""
    begin, log = time.monotonic(), LOGS / "build.log"
    env = env | {"MAX_JOBS": str(os.cpu_count() or 1)}
    if device == "emulated":
        code = "from finetune.kernels import emulator; emulator.build('emulated'); emulator.build('checked')"
        steps = [[sys.executable, "-c", code]]
    else:
        env |= {"FINETUNE_CUDA_ARCHS": architecture(capability)} if capability else {}
        torch = importlib.util.find_spec("torch")
        cmake, ninja, nvcc = tool("cmake"), tool("ninja"), tool("nvcc")
        if not (torch and torch.submodule_search_locations and cmake):
            return {"status": "failed", "errors": [{"test": "", "text": "no torch" if cmake else "no cmake"}]}
        folder = ROOT / "build" / "gpu"
        configure = [cmake, "-S", str(ROOT), "-B", str(folder), f"-DNVCC={nvcc or 'NVCC-NOTFOUND'}"]
        configure += [f"-DTORCH_DIR={torch.submodule_search_locations[0]}", f"-DCMAKE_INSTALL_PREFIX={ROOT}/finetune"]
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        steps = [configure, [cmake, "--build", str(folder), "--parallel", env["MAX_JOBS"]]]
        steps += [[cmake, "--install", str(folder)]]
        env |= {"FINETUNE_CUDA": "1"}

    def done(how: dict[str, str]) -> bool:
        return all(child(step, log, seconds - (time.monotonic() - begin), how) == 0 for step in steps)

    row: Row = {"status": "passed" if done(env) else "failed", "archs": env.get("FINETUNE_CUDA_ARCHS"), "errors": []}
    if row["status"] == "failed":
        row["errors"] = [{"test": "", "text": tail(log, 4000)}]
        if device == "cuda":
            row["without_cuda"] = done(env | {"FINETUNE_CUDA": "0"})
    return row | {"seconds": round(time.monotonic() - begin, 1)}


# --- the run


def save(path: Path, report: Row) -> None:
    """Never half a file; written with the standard library alone, since it must come whatever is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    temporary.replace(path)


def cell(row: Row | None) -> str:
    if not row or row["status"] in ("none", "left out"):
        return "-" if not row or row["status"] == "none" else "left out"
    if "cells" in row:
        best: dict[str, list[float]] = {}
        for each in row["cells"]:
            best.setdefault(each["backend"], []).append(each["ratio"])
        ratios = " ".join(f"{name} {min(v):.2f}-{max(v):.2f}x" for name, v in best.items())
        return ratios + (" FAILED" if row["status"] == "failed" else "") or "-"
    if row["status"] == "failed":
        return f"{row['failed']} FAILED" if row.get("failed") else "FAILED"
    return f"ok {row['passed']}" if "passed" in row else "ok"


def table(report: Row) -> str:
    rows = [["op", *STAGES]]
    rows += [[op, *(cell(stages.get(stage)) for stage in STAGES)] for op, stages in report["ops"].items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    failures = [(name, report[name]) for name in ("machine", "installed", "build")]
    failures += [(f"{op} {stage}", row) for op, stages in report["ops"].items() for stage, row in stages.items()]
    for name, row in failures:
        if row.get("status") == "failed":
            first = row["errors"][0]
            text = " ".join(first["text"].split())
            lines.append(f"{name}: {first['test'].rpartition('::')[2]} {text[-300:]}")
    return "\n".join(lines)


def guarded(function: Callable[..., Row], *args: Any) -> Row:
    """A row, whatever happens: the others follow."""
    try:
        return function(*args)
    except Exception as error:
        return {"status": "failed", "errors": [{"test": "", "text": f"{type(error).__name__}: {error}"}]}


def check(
    device: str, out: Path, budget: float, names: list[str], stages: tuple[str, ...] = STAGES, jobs: int | None = None
) -> int:
    """The whole run; the exit status."""
    begin = time.monotonic()
    jobs = jobs or max(1, min(8, (os.cpu_count() or 1) // 2))
    report: Row = {
        "device": device,
        "machine": {},
        "installed": [],
        "build": {},
        "ops": {},
        "left_out": [],
        "ok": False,
    }
    guard = threading.Lock()

    def note(op: str | None, stage: str, row: Any) -> None:
        with guard:
            if op is None:
                report[stage] = row
            else:
                report["ops"].setdefault(op, {})[stage] = row
            report["seconds"] = round(time.monotonic() - begin, 1)
            save(out, report)
            print(f"{report['seconds']:6.1f} s  {op or ''} {stage} {row.get('status', '')}", flush=True)

    def one(op: str, stage: str) -> None:
        at = time.monotonic()
        left = min(SECONDS[stage], begin + UNTIL[stage] * budget - at)
        if left < 2:
            note(op, stage, {"status": "left out", "errors": []})
            return
        run: Callable[..., Row] = run_tests if stage in TESTS else run_script
        note(op, stage, guarded(run, op, stage, left, env) | {"seconds": round(time.monotonic() - at, 1)})

    shutil.rmtree(LOGS, ignore_errors=True)
    env = environment(device, jobs)
    note(None, "machine", guarded(describe))
    note(None, "installed", guarded(install))
    capability = report["machine"].get("gpu", {}).get("compute_cap", "")
    note(None, "build", guarded(build, device, capability, 0.45 * budget, env))
    for group in (TESTS, ("bench",), ("memcheck", "racecheck")):
        chosen = [stage for stage in group if stage in stages and not (device == "emulated" and stage == "racecheck")]
        with ThreadPoolExecutor(2 if group == ("bench",) else jobs) as pool:  # one imports while the other measures
            for stage in chosen:
                for op in names + ([OTHER] if stage == "rest" and names == op_names() else []):
                    pool.submit(one, op, stage)
    rows = [(op, stage, row) for op, stages in report["ops"].items() for stage, row in stages.items()]
    ends = [row for *_, row in rows] + [report[name] for name in ("machine", "installed", "build")]
    failed = [row for row in ends if row.get("status") == "failed"]
    report["left_out"] = [f"{op} {stage}" for op, stage, row in rows if row["status"] == "left out"]
    report["ok"] = not failed and not report["left_out"]
    report["seconds"] = round(time.monotonic() - begin, 1)
    save(out, report)
    print(f"\n{table(report)}\n")
    if report["left_out"]:
        print(f"left out for want of time: {', '.join(report['left_out'])}")
    print(f"{len(failed)} failed of {len(ends)} rows, {report['seconds']} s, {out}")
    return 1 if failed else 3 if report["left_out"] else 0


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="scripts/gpu_check", description=(__doc__ or "").partition("\n")[0])
    p.add_argument("--pack", action="store_true", help="only download wheels for a machine without network")
    p.add_argument("--device", choices=("cuda", "emulated"), default="cuda", help="emulated: a rehearsal without a GPU")
    p.add_argument("--out", type=Path, default=ROOT / "build/gpu_check.json", help="the report")
    p.add_argument("--seconds", type=float, default=480, help="for all of it (480)")
    p.add_argument("--only", nargs="+", choices=op_names(), default=op_names(), metavar="OP", help="these ops (all)")
    p.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    wanted = p.parse_args(argv)
    if wanted.pack:
        return pack()
    if wanted.child:
        return run_child(*wanted.child)
    return check(wanted.device, wanted.out.resolve(), wanted.seconds, wanted.only)


if __name__ == "__main__":
    sys.exit(main())
