"""One .cu file compiled by itself for the emulator, and called through ctypes.

The file has kernels and an `extern "C" int <entry>(inputs…, outputs…, sizes…, stream)`; it includes what
csrc/cuda has. What a build was made of is in its name, so that nothing is ever compiled twice, and a file that was
edited is compiled again.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from filelock import FileLock

from finetune.errors import UserError
from finetune.kernels.emulator import ROOT

COMMON = ["-std=c++20", "-fPIC", "-fno-gnu-unique", "-fno-strict-aliasing", "-ffp-contract=off", "-Wall", "-Wextra",
          "-Wno-unknown-pragmas", "-Icsrc/include", "-Icsrc/emulator", "-Icsrc/cuda", "-DFINETUNE_EMULATED",
          "-DEMULATOR_MODULE=level"]  # fmt: skip
CHECKER = {"checker.cpp", "lines.cpp", "races.cpp", "regions.cpp", "statistics.cpp"}  # in the checked build only
# kind -> (flags of all, flags of the kernels)
KINDS = {
    "emulated": (["-O1", "-g1", "-DEMULATOR_emulated"], []),
    "debug": (["-O0", "-g3", "-DEMULATOR_emulated"], []),
    "checked": (["-O1", "-g1", "-DEMULATOR_checked"], ["-fsanitize=thread", "-fno-tree-sra"]),
}

SECTOR = 32  # bytes: what global memory is fetched in
GLOBAL = ("global load", "global store", "global atomic", "cp.async from global", "TMA from global")
SHARED = ("shared load", "shared store", "shared atomic", "ldmatrix", "cp.async to shared", "TMA to shared")


def build(source: Path, kind: str, name: str) -> Path:
    """The shared object of a source, called `name`; compiled if it is not there. `kind` is one of KINDS. UserError with
    the compiler's words."""
    everything, kernel = KINDS[kind]
    folder = ROOT / "build" / "levels" / kind
    folder.mkdir(parents=True, exist_ok=True)
    sources = sorted((ROOT / "csrc/emulator").glob("*.cpp"))
    sources = [path for path in sources if kind == "checked" or path.name not in CHECKER]
    core = [compiled(path, [*COMMON, *everything, *python_includes()], folder) for path in sources]
    mine = compiled(source, [*COMMON, *everything, *kernel, "-x", "c++"], folder)
    library = folder / f"{name}-{digest(*core, mine)}.so"
    if not library.exists():
        # The core first: of the standard library's inline functions the linker keeps the first, not a checked kernel's.
        run("-shared", "-Wl,-Bsymbolic", *core, mine, "-ldl", target=library)
    return library


def compiled(source: Path, flags: list[str], folder: Path) -> Path:
    target = folder / f"{source.parent.name}_{source.stem}-{digest(source, headers(), *flags)}.o"
    with FileLock(folder / f"{source.parent.name}_{source.stem}.lock"):
        if not target.exists():
            run(*flags, "-c", source, target=target)
    return target


def run(*words: str | Path, target: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not compiler:
        raise UserError("kernels are compiled by g++ here, which is not installed: apt install g++")
    part = target.with_suffix(f".{os.getpid()}.{hash(target) & 0xFFFF}.part")
    done = subprocess.run([compiler, *map(str, words), "-o", str(part)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{target.name} does not build: {done.stderr[-4000:]}")
    part.replace(target)


@functools.cache
def headers() -> str:
    """A digest of every header that a kernel or the emulator may include."""
    folders = ("csrc/cuda", "csrc/cuda/device", "csrc/emulator", "csrc/include/finetune")
    return digest(*sorted(p for f in folders for p in (ROOT / f).iterdir() if p.suffix in (".h", ".cuh")))


@functools.cache
def python_includes() -> list[str]:
    return [f"-isystem{torch.__path__[0]}/include", f"-isystem{sysconfig.get_path('include')}"]  # pybind11 is torch's


def digest(*parts: str | Path) -> str:
    total = hashlib.blake2b(digest_size=8)
    for part in parts:
        total.update(part.read_bytes() if isinstance(part, Path) else part.encode())
    return total.hexdigest()


class Fault(RuntimeError):
    """What the emulator found wrong with a kernel."""


class Kernel:
    """A built kernel. `controls` is the emulator's Python module (csrc/emulator/python.cpp) of this very library."""

    def __init__(self, library: Path, entry: str) -> None:
        path = str(library)
        name = f"{library.stem}.level"  # pybind11 keeps one module for a name
        loader = importlib.machinery.ExtensionFileLoader(name, path)
        spec = importlib.util.spec_from_file_location(name, path, loader=loader)
        assert spec
        self.controls: ModuleType = importlib.util.module_from_spec(spec)
        loader.exec_module(self.controls)
        self.launch = getattr(ctypes.CDLL(path), entry)

    def __call__(self, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], sizes: Sequence[int]) -> None:
        """Runs entry(inputs…, outputs…, sizes…, stream). Raises Fault if the emulator finds one."""
        for use, tensors in enumerate((inputs, outputs)):
            for t in tensors:
                self.controls.allow(t.data_ptr(), t.numel() * t.element_size(), use)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (*inputs, *outputs)]
        status = self.launch(*pointers, *map(ctypes.c_int64, sizes), None)
        if fault := self.controls.take_fault():
            raise Fault(re.sub(r"\s+", " ", fault))
        if status:
            raise UserError(f"the kernel refuses these sizes: {list(sizes)}")
