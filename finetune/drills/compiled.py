"""Answers in CUDA and C++: compiled, called on tensors, and what they do to memory.

A solution.cu or .cpp has an `extern "C"` function `launch`, given to the learner, and between the lines `// write
this` and `// written` what they write. A CUDA answer runs in the emulator's checked build: races, divergent barriers,
reads of uninitialized memory and accesses out of bounds are failures that name the line.
"""

from __future__ import annotations

import ctypes
import math
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.errors import UserError
from finetune.kernels import alone

CANARY = 64  # elements around an output of a C++ answer that must stay as they are
FLAGS = ["-std=c++20", "-O2", "-march=native", "-shared", "-fPIC", "-Wall", "-ffp-contract=fast"]


class DoesNotCompile(Exception):
    """The compiler's first error, and its line."""

    def __init__(self, said: str, path: Path) -> None:
        found = re.search(rf"{re.escape(path.name)}:(\d+):\d+: (?:fatal )?error: (.*)", said)
        self.line = int(found[1]) if found else None
        super().__init__(found[2] if found else said.strip()[-300:])


class Cuda:
    """A CUDA answer, compiled for the emulator."""

    def __init__(self, path: Path) -> None:
        try:
            self.kernel = alone.Kernel(alone.build(path, "checked", path.stem), "launch")
        except UserError as error:
            raise DoesNotCompile(str(error), path) from None

    def __call__(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], sizes: Sequence[int]) -> None:
        self.kernel(inputs, outputs, sizes)

    def counts(self, call: Callable[[], Any]) -> dict[str, int]:
        """Of what `call` launches: sectors of global memory, requests of warps to it, and wavefronts of shared
        memory above the fewest that would do."""
        controls = self.kernel.controls
        controls.set_counting(True)
        call()
        rows = controls.statistics()
        controls.set_counting(False)
        far = [row for row in rows if row["kind"] in alone.GLOBAL]
        near = [row for row in rows if row["kind"] in alone.SHARED]
        return {
            "sectors": sum(row["units"] for row in far),
            "requests": sum(row["requests"] for row in far),
            "conflicts": sum(row["units"] - row["ideal"] for row in near),
        }


class Cpp:
    """A C++ answer, compiled for this machine."""

    def __init__(self, path: Path) -> None:
        compiler = shutil.which("g++") or shutil.which("c++")
        if not compiler:
            raise UserError("C++ drills are compiled by g++, which is not installed: apt install g++")
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / f"{path.stem}.so"
            done = subprocess.run([compiler, *FLAGS, path, "-o", library], capture_output=True, text=True)
            if done.returncode:
                raise DoesNotCompile(done.stderr, path)
            self.launch = ctypes.CDLL(str(library)).launch

    def __call__(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], sizes: Sequence[int]) -> None:
        wide = [torch.full((t.numel() + 2 * CANARY,), 77, dtype=t.dtype) for t in outputs]
        for own, guarded in zip(outputs, wide, strict=True):
            guarded[CANARY:-CANARY] = own.flatten()
        inner = [t[CANARY : len(t) - CANARY] for t in wide]
        self.launch(
            *(ctypes.c_void_p(t.data_ptr()) for t in (*inputs, *inner)), *(ctypes.c_int64(size) for size in sizes)
        )
        for own, guarded, part in zip(outputs, wide, inner, strict=True):
            if bool((guarded[:CANARY] != 77).any()) or bool((guarded[-CANARY:] != 77).any()):
                raise RuntimeError("it writes outside its output")
            own.copy_(part.view(own.shape))


Answer = Cuda | Cpp


def load(path: Path, source: str | None = None) -> Answer:
    """A compiled answer; `source` in the place of what the file holds."""
    if source is None:
        return Cuda(path) if path.suffix == ".cu" else Cpp(path)
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / path.name
        other.write_text(source, encoding="utf-8")
        return load(other)


def launch(code: Answer, inputs: Sequence[Tensor], outputs: Sequence[Any], sizes: Sequence[int]) -> Any:
    """Calls an answer with outputs full of NaN, each a shape in fp32 or a pair of shape and integer type, then full of
    −99; returns them, one alone without its tuple."""
    typed = [each if each and isinstance(each[0], tuple) else (each, torch.float32) for each in outputs]
    made = [torch.full(shape, math.nan if kind == torch.float32 else -99, dtype=kind) for shape, kind in typed]
    code([t.contiguous() for t in inputs], made, sizes)
    return made[0] if len(made) == 1 else tuple(made)
