"""The CUDA kernels of csrc/cuda without a GPU: built with g++ and run on CPU tensors (csrc/emulator).

Three builds of the same sources: `emulated` (plain), `checked` (bounds, alignment, uninitialized and in-flight memory,
races, divergent barriers, access statistics, by source line) and `sanitized` (AddressSanitizer and UBSan; the process
must have been started with libasan preloaded). Loading one makes it a backend of every op that has a CUDA kernel:
`ops.rms_norm(x, w, backend="checked")`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.machinery
import importlib.util
import linecache
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from filelock import FileLock

from finetune import ops
from finetune.errors import UserError

ROOT = Path(__file__).parents[2]
BUILDS = ("emulated", "checked", "sanitized")


def build(name: str) -> Path:
    """Builds what is out of date of one of `BUILDS`; the library's path. UserError with the compiler's words."""
    ninja, cmake = (
        shutil.which(tool) or shutil.which(tool, path=sysconfig.get_path("scripts")) for tool in ("ninja", "cmake")
    )
    if not cmake:
        raise UserError("the emulator is built with cmake, which is not installed: pip install cmake ninja")
    folder = ROOT / "build" / "emulator"
    folder.mkdir(parents=True, exist_ok=True)
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else ["-G", "Unix Makefiles"]
    configure = [
        cmake, "-S", ROOT, "-B", folder, *generator, "-DFINETUNE_EMULATOR=ON", f"-DTORCH_DIR={torch.__path__[0]}",
        f"-DPYTHON_INCLUDE_DIR={sysconfig.get_path('include')}", f"-DPYTHON={sys.executable}",
    ]  # fmt: skip
    with FileLock(folder / "lock"):
        for command in (
            configure,
            [
                cmake,
                "--build",
                folder,
                "--target",
                name,
                "--parallel",
                os.environ.get("MAX_JOBS") or os.cpu_count() or 1,
            ],
        ):
            code, said = watched([str(word) for word in command])
            if code:
                raise UserError(f"the emulator does not build: {said[-4000:]}")
    return folder / f"{name}.so"


def watched(command: list[str]) -> tuple[int, str]:
    """Runs a build; its exit code and output. A bar on stderr says how far it is: compiling takes minutes."""
    from finetune.runs import display

    said, steps = "", re.compile(r"\[(\d+)/(\d+)\] (?!Re-)")  # ninja's, but for its look at what there is
    console, total, show = display.console(stderr=True), 0, None
    with contextlib.ExitStack() as stack:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for line in process.stdout or ():
            said += line
            if not (found := steps.match(line)):
                continue
            if int(found[2]) != total:
                total = int(found[2])
                stack.close()
                show = stack.enter_context(display.progress(console, "compiling", 0, total))
            assert show
            show(int(found[1]), {})
        return process.wait(), said


def import_library(name: str) -> ModuleType:
    """Builds and imports a library of emulated kernels; its controls are csrc/emulator/python.cpp's."""
    path = str(build(name))
    spec = importlib.util.spec_from_file_location(
        name, path, loader=importlib.machinery.ExtensionFileLoader(name, path)
    )
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def load(name: str = "emulated") -> ModuleType:
    """Builds and loads one of `BUILDS`, adds it as a backend to every op, and returns its controls (python.cpp)."""
    if ops._backends.NATIVE_PROBLEM:
        raise UserError(ops._backends.NATIVE_PROBLEM)
    module = import_library(name)
    for op in ops.REGISTRY.values():
        op.add_backend(name)
        if not ops._backends.missing(op.name, name):
            op.register(ops._backends.LIBRARIES[name])
    return module


def trace(call: Callable[[], object]) -> list[dict[str, Any]]:
    """What the kernels that `call` runs on the checked build do to memory, by source line and kind of access.

    Dicts of file, line, source (the line's text), kind ("global load", "shared store", "ldmatrix", …), requests (of
    warps), width (the most bytes a lane asked for at once), units (32-byte sectors of global memory, wavefronts of
    shared memory) and ideal (as few units as would do). Kinds that are no accesses (barriers, shuffles, mma) have
    requests only. A kernel's tests hold it to its promises: `assert not excess(trace(call))`.
    """
    controls = load("checked")
    controls.set_counting(True)
    try:
        call()
    finally:
        controls.set_counting(False)
    rows = controls.statistics()
    for row in rows:
        row["file"] = in_tree(row["file"])
        row["source"] = linecache.getline(str(ROOT / row["file"]), row["line"]).strip()
    return rows


def in_tree(path: str) -> str:
    """A source's path relative to the project, whatever folder the compiler (or its cache) saw it in."""
    parts = Path(path).parts
    inside = (Path(*parts[i:]) for i in range(1, len(parts)))
    return str(next((each for each in inside if (ROOT / each).is_file() and ".." not in each.parts), path))


def excess(rows: list[dict[str, Any]], kinds: str = "") -> list[str]:
    """Of `trace`'s rows, those of these kinds (a part of their name) that take more units than needed, as text."""
    return [
        f"{row['file']}:{row['line']}: {row['kind']}, {row['units']} units, {row['ideal']} would do: {row['source']}"
        for row in rows
        if kinds in row["kind"] and row["units"] > row["ideal"]
    ]
