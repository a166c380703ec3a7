"""A level of a ladder: one .cu file, compiled for the emulator on its own and called through ctypes.

A level is standalone: a kernel, and `extern "C" int launch_level(…)` with the arguments that all levels of its topic
share (topics.py). The same file compiles with nvcc. What a build was made of is in its name, so that nothing is ever
compiled twice, and a level that you edit is compiled again.
"""

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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from filelock import FileLock

from finetune.errors import UserError
from finetune.kernels import weave
from finetune.kernels.emulator import ROOT

CODE = Path(__file__).parent
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


@dataclass(frozen=True)
class Level:
    topic: str
    number: int
    path: Path

    @property
    def name(self) -> str:
        """`shared_tile` of level_03_shared_tile.cu."""
        return self.path.stem.split("_", 2)[2]

    @property
    def idea(self) -> str:
        """The first line of the head."""
        return self.path.read_text(encoding="utf-8").splitlines()[0].removeprefix("// ")

    @property
    def faults(self) -> list[str]:
        """The deliberate faults of the level, from the file of the same name next to it."""
        return [fault.name for fault in weave.read(self.path).faults]


def levels(topic: str = "*") -> list[Level]:
    """All levels, or those of one topic, in order."""
    found = sorted(CODE.glob(f"{topic}/level_*.cu"))
    return [Level(path.parent.name, int(path.stem.split("_")[1]), path) for path in found]


# --- Building


def build(level: Level, kind: str) -> Path:
    """The shared object of a level, compiled if it is not there. UserError with the compiler's words."""
    everything, kernel = KINDS[kind]
    folder = ROOT / "build" / "levels" / kind
    folder.mkdir(parents=True, exist_ok=True)
    sources = sorted((ROOT / "csrc/emulator").glob("*.cpp"))
    sources = [path for path in sources if kind == "checked" or path.name not in CHECKER]
    core = [compiled(path, [*COMMON, *everything, *python_includes()], folder) for path in sources]
    mine = compiled(woven(level), [*COMMON, *everything, *kernel, "-x", "c++"], folder)
    library = folder / f"{level.topic}_{level.path.stem}-{digest(*core, mine)}.so"
    if not library.exists():
        # The core first: of the standard library's inline functions the linker keeps the first, not a checked kernel's.
        run("-shared", "-Wl,-Bsymbolic", *core, mine, "-ldl", target=library)
    return library


def woven(level: Level) -> Path:
    """The copy of a level that is compiled: with its faults in it, to be switched on at run time."""
    copy = ROOT / "build" / "levels" / "woven" / level.topic / level.path.name
    try:
        with FileLock(copy.parent.with_suffix(".lock")):
            weave.copy(level.path, copy, [edit for fault in weave.read(level.path).faults for edit in fault.edits])
    except weave.BadFault as error:
        raise UserError(str(error)) from None
    return copy


def build_all(chosen: Sequence[Level], kind: str, threads: int) -> None:
    """Builds what is missing, several at a time."""
    with ThreadPoolExecutor(max(1, threads)) as pool:
        list(pool.map(lambda level: build(level, kind), chosen))


def compiled(source: Path, flags: list[str], folder: Path) -> Path:
    target = folder / f"{source.parent.name}_{source.stem}-{digest(source, headers(), *flags)}.o"
    with FileLock(folder / f"{source.parent.name}_{source.stem}.lock"):
        if not target.exists():
            run(*flags, "-c", source, target=target)
    return target


def run(*words: str | Path, target: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not compiler:
        raise UserError("the levels are compiled by g++, which is not installed: apt install g++")
    part = target.with_suffix(f".{os.getpid()}.{hash(target) & 0xFFFF}.part")
    done = subprocess.run([compiler, *map(str, words), "-o", str(part)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{target.name} does not build: {done.stderr[-4000:]}")
    part.replace(target)


@functools.cache
def headers() -> str:
    """A digest of every header that a level or the emulator may include."""
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


# --- Calling


class Fault(RuntimeError):
    """What the emulator found wrong with a kernel."""


class Kernel:
    """A built level. `controls` is the emulator's Python module (csrc/emulator/python.cpp) of this very level."""

    def __init__(self, level: Level, kind: str) -> None:
        path = str(build(level, kind))
        name = f"{Path(path).stem}.level"  # pybind11 keeps one module for a name
        loader = importlib.machinery.ExtensionFileLoader(name, path)
        spec = importlib.util.spec_from_file_location(name, path, loader=loader)
        assert spec
        self.controls: ModuleType = importlib.util.module_from_spec(spec)
        loader.exec_module(self.controls)
        self.launch = ctypes.CDLL(path).launch_level

    def __call__(self, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], sizes: Sequence[int]) -> None:
        """Runs launch_level(inputs…, outputs…, sizes…, stream). Raises Fault if the emulator finds one."""
        for use, tensors in enumerate((inputs, outputs)):
            for t in tensors:
                self.controls.allow(t.data_ptr(), t.numel() * t.element_size(), use)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (*inputs, *outputs)]
        status = self.launch(*pointers, *map(ctypes.c_int64, sizes), None)
        if fault := self.controls.take_fault():
            raise Fault(re.sub(r"\s+", " ", fault))
        if status:
            raise UserError(f"the level refuses these sizes: {list(sizes)}")


@functools.cache
def load(level: Level, kind: str = "checked") -> Kernel:
    return Kernel(level, kind)
