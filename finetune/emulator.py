"""The CUDA kernels of csrc/cuda without a GPU: built with g++ and run on CPU tensors (csrc/emulator).

Three builds of the same sources: `emulated` (plain), `checked` (bounds, alignment, uninitialised and in-flight memory,
races, divergent barriers, access statistics, by source line) and `sanitized` (AddressSanitizer and UBSan; the process
must have been started with libasan preloaded). Loading one makes it a backend of every op that has a CUDA kernel:
`ops.rms_norm(x, w, backend="checked")`.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import torch
from filelock import FileLock

from finetune import ops
from finetune.errors import UserError

ROOT = Path(__file__).parents[1]
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
        f"-DPYTHON_INCLUDE_DIR={sysconfig.get_path('include')}",
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
            out = subprocess.run([str(word) for word in command], capture_output=True, text=True)
            if out.returncode:
                raise UserError(f"the emulator does not build: {(out.stdout + out.stderr)[-4000:]}")
    return folder / f"{name}.so"


@functools.cache
def load(name: str = "emulated") -> ModuleType:
    """Builds and loads one of `BUILDS`, adds it as a backend to every op, and returns its controls (python.cpp)."""
    if ops._op.NATIVE_PROBLEM:
        raise UserError(ops._op.NATIVE_PROBLEM)
    path = str(build(name))
    spec = importlib.util.spec_from_file_location(
        name, path, loader=importlib.machinery.ExtensionFileLoader(name, path)
    )
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for op in ops.REGISTRY.values():
        op.add_backend(name)
        if not ops._op.missing(op.name, name):
            op.native.register(ops._op.LIBRARIES[name])
    return module
