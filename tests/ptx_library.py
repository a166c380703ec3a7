"""An op's CUDA kernels as nvcc compiles them, run by tests/ptx_executor.py as the backend "ptx" on CPU tensors: the
real launchers and bindings, linked with a CUDA runtime that calls Python for each launch
(tests/fixtures/ptx/runtime.cpp)."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import shutil
import subprocess
from pathlib import Path

import ptx_executor
import ptx_machine
import torch

from finetune import ops
from finetune.kernels import cuda_toolkit, emulator, weave

ROOT = emulator.ROOT
LAUNCH = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t
)
LIBRARY = "finetune_ptx"


def run(command: list[str], folder: Path) -> None:
    out = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True)
    assert out.returncode == 0, (out.stdout + out.stderr)[-3000:]


def build(op: str, bug: str = "") -> Path:
    """The folder of <op>.ptx and <op>.so, perhaps with a deliberate fault. Known sources are not built again."""
    sources = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cu", ".cuh", ".h", ".cpp", ".faults"))
    wanted = [p for p in sources if p.stem.startswith(op) or p.suffix in (".cuh", ".h", ".faults")]
    wanted += [ROOT / "csrc/cpu/dispatch.cpp", ROOT / "tests/fixtures/ptx/runtime.cpp"]
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in wanted) + (torch.__version__ + bug).encode())
    folder = ROOT / "build/ptx" / f"{op}-{digest.hexdigest()[:16]}"
    if (folder / f"{op}.so").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    csrc, torch_folder = ROOT / "csrc", Path(torch.__path__[0])
    includes = [f"-I{csrc / 'include'}", f"-I{csrc / 'emulator'}", f"-I{csrc / 'cuda'}"]
    cuda = shutil.copytree(csrc / "cuda", folder / "cuda", dirs_exist_ok=True) if bug else csrc / "cuda"
    if bug:
        for source, edits in weave.edits_of(cuda).items():
            chosen = [edit for edit in edits if edit.fault == bug]
            source.write_text(weave.weave(source.read_text(), chosen, weave.planted))
    kernels = [path for path in cuda.glob(f"{op}*.cu") if path.stem in (op, f"{op}_hopper")]
    for path in kernels:
        arch = "90a" if path.stem.endswith("_hopper") else "80"
        how = ["-std=c++20", "-O3", "-lineinfo", f"-gencode=arch=compute_{arch},code=compute_{arch}", "--keep"]
        how += ["-Xcompiler=-fPIC,-fvisibility=hidden"]
        run([cuda_toolkit.tool("nvcc"), *how, includes[0], "-c", path, "-o", f"{path.stem}.o"], folder)
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-w", "-DFINETUNE_EMULATED", f"-DFINETUNE_LIBRARY={LIBRARY}"]
    flags += [*includes, "-isystem", torch_folder / "include", "-Wl,-Bsymbolic", f"-L{torch_folder / 'lib'}"]
    code = [csrc / f"bindings/{op}.cpp", csrc / "cpu/dispatch.cpp", ROOT / "tests/fixtures/ptx/runtime.cpp"]
    objects = [f"{path.stem}.o" for path in kernels]
    run(["g++", *flags, *code, *objects, "-o", f"{op}.tmp", "-ltorch", "-ltorch_cpu"], folder)
    for left in folder.glob("*.ii"):
        left.unlink()
    (folder / f"{op}.tmp").rename(folder / f"{op}.so")
    return folder


class Loaded:
    """One op's library, and what it asks of Python."""

    def __init__(self, op: str, folder: Path) -> None:
        self.kernels = ptx_executor.parse(folder / f"{op}.ptx")
        torch.ops.load_library(str(folder / f"{op}.so"))
        self.library = ctypes.CDLL(str(folder / f"{op}.so"))
        self.launches: list[str] = []  # the kernels that ran, by name
        self.callback = LAUNCH(self.launch)
        self.library.ptx_on_launch(self.callback)

    def launch(self, name: bytes, sizes, args, shared: int) -> None:
        try:
            kernel = self.kernels[name.decode()]
            self.launches.append(kernel.name)
            parameters = bytearray()
            for i, (offset, size) in enumerate(kernel.parameters.values()):
                parameters += bytes(offset - len(parameters)) + ctypes.string_at(args[i], size)
            ptx_machine.launch(kernel, sizes[0:3], sizes[3:6], shared, bytes(parameters), self.regions())
        except Exception as error:  # ctypes would drop it
            self.library.ptx_fault(f"{type(error).__name__}: {error}".encode())

    def regions(self) -> ptx_machine.Regions:
        size = self.library.ptx_regions(None, 0)
        flat = (ctypes.c_int64 * size)()
        self.library.ptx_regions(flat, size)
        return ptx_machine.Regions([tuple(flat[i : i + 3]) for i in range(0, size, 3)])


@functools.cache
def load(op: str, bug: str = "") -> Loaded:
    """Builds the op's library and makes it the op's backend "ptx"; a process can hold one of an op's."""
    loaded = Loaded(op, build(op, bug))
    ops._backends.LIBRARIES["ptx"] = LIBRARY
    ops.REGISTRY[op].add_backend("ptx")
    ops.REGISTRY[op].register(LIBRARY)
    return loaded
