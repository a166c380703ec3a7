"""The backends of the ops: the native library, and which devices and dtypes each backend takes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune import environment
from finetune.errors import UserError

LIBRARY = Path(__file__).parents[1] / "_native.so"
LIBRARIES = {"cpp": "finetune", "cuda": "finetune", "triton": "finetune_triton"}  # in torch.ops
LIBRARIES |= {build: f"finetune_{build}" for build in environment.EMULATIONS}
ORDER = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}  # of an automatic choice


def load_library() -> str | None:
    """Loads the native library; None, or the reason why it cannot be loaded."""
    if not LIBRARY.exists():
        return "the native library is not built: pip install -e . in the project folder"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"the native library does not load ({error}): pip install -e . builds it again"
    wanted = environment.choice("FINETUNE_CPU")
    if wanted and wanted != torch.ops.finetune.cpu_level():
        raise UserError(
            f"FINETUNE_CPU={wanted}: this machine supports up to {torch.ops.finetune.cpu_level_supported()} "
            f"({' < '.join(environment.CPU_LEVELS)}); unset it or choose a lower one"
        )
    return None


NATIVE_PROBLEM = load_library()


def known(operator: str) -> bool:
    """Whether torch has this operator, `library::name`."""
    library, name = operator.split("::")
    return hasattr(getattr(torch.ops, library), name)


def missing(op: str, backend: str) -> str | None:
    """Why `backend` has no native operators for this op, if so."""
    if NATIVE_PROBLEM:
        return NATIVE_PROBLEM
    name = f"{LIBRARIES[backend]}::{op}"
    key = "CUDA" if backend == "cuda" else "CPU"
    if any(torch._C._dispatch_has_kernel_for_dispatch_key(name + end, key) for end in ("", "_") if known(name + end)):
        return None
    if backend == "cuda" and "nvcc=0" in torch.ops.finetune.build_info():
        return (
            "the native library was built without its CUDA kernels: with nvcc installed (and FINETUNE_CUDA not 0), "
            "pip install -e . builds them"
        )
    return f"{op} has no {backend} kernel yet"


def native_float(backend: str, *tensors: Tensor | None) -> str | None:
    """The `supports` that most ops share: tensors of one floating dtype where the backend wants them; float16 only on
    GPUs (and their emulation)."""
    given = [t for t in tensors if t is not None]
    if fits(backend, given):
        return None
    if reason := wrong_device(backend, *given):
        return reason
    dtypes = {t.dtype for t in given}
    if len(dtypes) > 1:
        return f"it takes one dtype, got {', '.join(sorted(str(d).removeprefix('torch.') for d in dtypes))}"
    half = backend != "cpp"
    if not dtypes <= {torch.float32, torch.bfloat16, *([torch.float16] if half else [])}:
        names = "float32, bfloat16 and float16" if half else "float32 and bfloat16"
        return f"it takes {names}, got {str(dtypes.pop()).removeprefix('torch.')}"
    return None


def fits(backend: str, tensors: list[Tensor]) -> bool:
    """Whether there is nothing that `native_float` says against CPU tensors: the case of nearly every call, fast."""
    if backend != "cpp" or not tensors:
        return False
    dtype = tensors[0].dtype
    return (dtype is torch.float32 or dtype is torch.bfloat16) and all(t.is_cpu and t.dtype is dtype for t in tensors)


def device_for(backend: str) -> str:
    """The type of device whose tensors `backend` takes."""
    on_gpu = backend == "cuda" or (backend == "triton" and os.environ.get("TRITON_INTERPRET") != "1")
    return "cuda" if on_gpu else "cpu"


def wrong_device(backend: str, *tensors: Tensor) -> str | None:
    """CPU tensors for cpp and for what is emulated or interpreted, CUDA tensors for the GPU, all on one device."""
    if backend == "cpp" and all(t.is_cpu for t in tensors):
        return None
    wanted = device_for(backend)
    devices = list(dict.fromkeys(t.device for t in tensors))
    if len(devices) > 1:
        first, second = devices[:2]
        return f"Expected all tensors to be on the same device, but found at least two devices, {first} and {second}!"
    if all(t.device.type == wanted for t in tensors):
        return None
    how = "; TRITON_INTERPRET=1 interprets it on the CPU" if (backend, wanted) == ("triton", "cuda") else ""
    if wanted == "cuda" and not torch.cuda.is_available():
        why = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        return f"it takes CUDA tensors, and torch ({why}) finds no GPU{how}"
    return f"it takes {wanted.upper()} tensors{how}"


def device_of(arguments: Iterable[Any]) -> str:
    """Device type of the first tensor among the arguments (lists of tensors included)."""
    for arg in arguments:
        first = arg[0] if isinstance(arg, (list, tuple)) and arg else arg
        if isinstance(first, Tensor):
            return "cuda" if first.is_cuda else "cpu"
    return "cpu"
