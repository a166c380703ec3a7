"""`finetune doctor`: what this machine has, which backends work, and why the others do not."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from finetune.kernels import cuda_toolkit
from finetune.runs import machine
from finetune.runs.display import size

Row = dict[str, Any]  # {"what": str, "ok": bool | None, "found": str}; None: neither good nor bad


def report() -> list[Row]:
    """All findings, in the order they are shown. Nothing here raises: a failed look-up is a finding."""
    rows: list[Row] = []
    for section in (system, packages, compilers, gpu, driver, native):
        try:
            rows += section()
        except Exception as e:
            rows.append(row(section.__name__, f"cannot be determined: {type(e).__name__}: {e}", False))
    return rows


def row(what: str, found: str, ok: bool | None = None) -> Row:
    return {"what": what, "ok": ok, "found": found}


def system() -> Iterator[Row]:
    about = machine.describe()
    yield row("system", about["system"])
    yield row("cpu", f"{about['cpu']}, {' '.join(about['cpu_features']) or 'no known vector extensions'}")
    quota = machine.cpu_quota()
    limit = f", limited to {quota:g} by the cgroup" if quota != float("inf") else ""
    yield row("threads", f"{about['physical_cores']} by default (--threads), {os.cpu_count()} logical CPUs{limit}")
    available = machine.available_memory_bytes()
    free = f", {size(available)} available" if available is not None else ""
    yield row("memory", f"{size(about['memory_bytes'])}{free}", available is None or available > 2e9)
    disk = shutil.disk_usage(Path.cwd()).free
    yield row("disk", f"{size(disk)} free in {Path.cwd()}", disk > 2e9)


def packages() -> Iterator[Row]:
    from importlib.metadata import PackageNotFoundError, version

    yield row("python", machine.versions()["python"])
    for name, needed in (
        ("torch", True),
        ("numpy", True),
        ("safetensors", True),
        ("tokenizers", True),
        ("matplotlib", True),
        ("transformers", False),
        ("peft", False),
        ("trl", False),
        ("triton", False),
    ):
        try:
            yield row(name, version(name), True)
        except PackageNotFoundError:
            extra = "test" if name == "triton" else "peers"
            fix = "pip install -e ." if needed else f"optional: pip install -e '.[{extra}]'"
            yield row(name, f"not installed ({fix})", False if needed else None)


def compilers() -> Iterator[Row]:
    found = next((c for c in (os.environ.get("CXX"), "c++", "g++", "clang++") if c and shutil.which(c)), None)
    missing = "none found: install one (Debian: apt install g++; macOS: xcode-select --install)"
    yield row("C++ compiler", first_line(found, "--version") if found else missing, found is not None)
    if ninja := shutil.which("ninja"):
        yield row("ninja", first_line(ninja, "--version"), True)
    else:
        yield row("ninja", "not on PATH (the build brings its own)", None)
    nvcc = cuda_toolkit.tool("nvcc")
    text = f"{last_line(nvcc, '--version')}, {nvcc}" if nvcc else "not found: the CUDA kernels are not built (CPU only)"
    yield row("nvcc", text, True if nvcc else None)


def gpu() -> Iterator[Row]:
    import torch

    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(i)
            yield row(f"GPU {i}", f"{about.name}, {size(about.total_memory)}, sm_{about.major}{about.minor}", True)
    elif torch.version.cuda is None:
        yield row("GPU", "not usable: this torch is a CPU build", None)
    else:
        yield row("GPU", f"none found by torch (built for CUDA {torch.version.cuda})", None)


def driver() -> Iterator[Row]:
    """NVIDIA's driver, and whether it is new enough for the CUDA runtime that the native library holds."""
    import torch

    newest = cuda_toolkit.driver_cuda()
    if newest is None:
        yield row("NVIDIA driver", "none found", None)
        return
    known = Path("/proc/driver/nvidia/version")
    numbers = re.findall(r"\b\d{3}\.\d+(?:\.\d+)?\b", known.read_text()) if known.exists() else []
    text = f"{numbers[0] + ', ' if numbers else ''}runs CUDA up to {newest // 1000}.{newest % 1000 // 10}"
    from finetune import ops

    info = "" if ops._backends.NATIVE_PROBLEM else torch.ops.finetune.build_info()
    problem = cuda_toolkit.driver_problem(newest, info)
    yield row("NVIDIA driver", f"{text}; {problem}" if problem else text, not problem)


def native() -> Iterator[Row]:
    import torch

    from finetune import ops

    problem = ops._backends.NATIVE_PROBLEM
    if problem:
        yield row("native library", problem, False)
    else:
        own = torch.ops.finetune
        yield row("native library", own.build_info().replace("|", ", "), True)
        yield row(
            "CPU level", f"{own.cpu_level()} in use, {own.cpu_level_supported()} supported (FINETUNE_CPU lowers it)"
        )
    table = ops.table()
    for backend in dict.fromkeys(r["backend"] for r in table):
        mine = [r for r in table if r["backend"] == backend]
        good = [r["op"] for r in mine if r["ok"]]
        why = "; ".join(dict.fromkeys(r["reason"].replace(f"{r['op']} ", "", 1) for r in mine if not r["ok"]))
        text = f"{len(good)} of {len(mine)} ops" + (f" ({why})" if why else "")
        yield row(f"backend {backend}", text, True if len(good) == len(mine) else None)


def first_line(*command: str, pick: Callable[[list[str]], str] = lambda lines: lines[0]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return pick((done.stdout or done.stderr).strip().splitlines() or ["(says nothing)"])


def last_line(*command: str) -> str:
    return first_line(*command, pick=lambda lines: lines[-1])
