"""The dispatcher: an op is a plain-torch reference that defines it, and backends that must agree with it.

`Op(name, reference, native, samples)` is called like the reference, plus `backend=`. Without a choice the first
available backend of `ORDER` for the tensors' device runs. A forced backend that cannot run raises `BackendUnavailable`
with the reason; an automatic choice that falls through to the reference warns once, with the reason.

Every backend but the reference is a torch library of operators with the same schemas, so that an op's autograd formula
and shape functions are written once, on its page: cpp and cuda are one library under two dispatch keys, triton is a
second one, and the CUDA kernels that the emulator runs on CPU tensors (`finetune.emulator`) are a third.
"""

from __future__ import annotations

import mmap
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from finetune.errors import UserError
from finetune.ops._library import Library, differentiated_otherwise

BACKENDS = ("reference", "cpp", "triton", "cuda")
LIBRARIES = {"cpp": "finetune", "cuda": "finetune", "triton": "finetune_triton"}
LIBRARIES |= {build: f"finetune_{build}" for build in ("emulated", "checked", "sanitized")}  # see finetune.emulator
ORDER = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}
LIBRARY = Path(__file__).parents[1] / "_native.so"

forced: str | None = os.environ.get("FINETUNE_BACKEND")


class BackendUnavailable(RuntimeError):
    """A backend that was asked for cannot run this call; the message says why."""


@dataclass(frozen=True)
class Backend:
    """One implementation of an op. `supports(*args, **kwargs)` returns None or the reason why not."""

    call: Callable[..., Any]
    supports: Callable[..., str | None]


@dataclass(frozen=True)
class Native:
    """An op as torch operators, whichever library they come from (`operators` is torch.ops.<library>)."""

    call: Callable[..., Any]  # (operators, *args, **kwargs): the op's result through them
    overload: Callable[..., tuple[str, tuple[Any, ...]]]  # (*args, **kwargs): the operator's name and its arguments
    supports: Callable[..., str | None]  # (backend, *args, **kwargs): None or the reason why not
    register: Callable[[Library], None]  # its shape functions and derivatives
    on_host: tuple[str, ...] = ()  # arguments that may be on the CPU while the others are on a GPU


@dataclass(frozen=True)
class Sample:
    """One call of an op, for tests, benches and learning pages. Tensors are float64; `cast` makes them any dtype."""

    name: str
    given: tuple[Any, ...] | Callable[[], tuple[Any, ...]]  # the arguments, or what makes them: large ones when used
    kwargs: dict[str, Any] = field(default_factory=dict)
    grad: tuple[int, ...] = ()  # positions of the differentiable arguments
    mutates: tuple[int, ...] = ()  # positions of the arguments (tensors or lists of them) changed in place
    bench: bool = False  # of a size worth timing
    flops: float = 0.0
    bytes: float = 0.0  # read and written once, at fp32
    odd: tuple[int | str, ...] = ()  # the arguments (or "incoming gradient") that begin one element off their memory
    far: tuple[int, int] | None = None  # (argument, dimension): its elements lie more than 2^32 elements apart

    @property
    def placed(self) -> bool:
        """Is it another sample at other addresses? Tests of what does not depend on them leave it out."""
        return bool(self.odd) or self.far is not None

    @cached_property
    def args(self) -> tuple[Any, ...]:
        return self.given() if callable(self.given) else self.given

    def cast(self, dtype: torch.dtype, device: str = "cpu") -> tuple[Any, ...]:
        """Fresh copies of the arguments on `device`, float64 tensors converted to `dtype`; those of `grad` require
        gradients. A view's gaps and order are kept."""

        def one(arg: Any, i: int) -> Any:
            if isinstance(arg, list):
                return [one(item, i) for item in arg]
            if not isinstance(arg, torch.Tensor):
                return arg
            keep = dtype if arg.dtype == torch.float64 else arg.dtype
            dimension = self.far[1] if self.far and self.far[0] == i else None
            copy = place(arg.shape, arg.stride(), keep, device, i in self.odd, dimension)
            return copy.copy_(arg.detach()).requires_grad_(i in self.grad)

        return tuple(one(arg, i) for i, arg in enumerate(self.args))

    def options(self, device: str = "cpu") -> dict[str, Any]:
        """The keyword arguments, tensors among them on `device`."""

        def one(name: str, arg: Any) -> Any:
            if not isinstance(arg, torch.Tensor):
                return arg
            return place(arg.shape, arg.stride(), arg.dtype, device, name in self.odd, None).copy_(arg)

        return {name: one(name, arg) for name, arg in self.kwargs.items()}

    def at_odd_addresses(self) -> Iterator[Sample]:
        """This sample with one of its tensors after another, then with all of them, one element off the aligned start
        of their memory: a kernel must not take the alignment of one for that of another."""
        given: list[tuple[int | str, Any]] = [*enumerate(self.args), *self.kwargs.items()]
        tensors = [at for at, arg in given if isinstance(arg, torch.Tensor) or (arg and isinstance(arg, list))]
        if self.grad:
            tensors.append("incoming gradient")
        for at in tensors:
            yield replace(self, name=f"{self.name}, odd {at}", odd=(at,))
        if len(tensors) > 1:
            yield replace(self, name=f"{self.name}, all odd", odd=tuple(tensors))

    def far_apart(self, *dimensions: tuple[int, int]) -> Iterator[Sample]:
        """This sample with one after another of some (argument, dimension) spread over more than 2^32 elements."""
        for at, dimension in dimensions:
            yield replace(self, name=f"{self.name}, far {at}.{dimension}", far=(at, dimension))


def place(
    shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, device: str, odd: bool, far: int | None
) -> torch.Tensor:
    """An uninitialized tensor of this layout; `odd`: one element behind the start of its memory; `far`: with a stride
    in this dimension that takes its last element more than 2^32 elements away."""
    if far is not None:
        strides = (*strides[:far], 64 * (2**32 // (64 * (shape[far] - 1)) + 1) + strides[far], *strides[far + 1 :])
    if far is None and not odd:
        return torch.empty_strided(shape, strides, dtype=dtype, device=device)
    extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if 0 not in shape else 0
    if far is not None and device == "cpu":
        flat = sparse(extent, dtype)
    else:
        flat = torch.empty(extent + odd, dtype=dtype, device=device)
    return flat.as_strided(shape, strides, int(odd))


def sparse(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros of which only those that are touched take memory."""
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)  # from Python 3.13 on
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize, flags=flags), dtype=dtype)


REGISTRY: dict[str, Op] = {}


class Op:
    """See the module's text. `samples()` yields the op's `Sample`s. `torch_kernel`: torch's own fused form of the op,
    if it has one; like the reference it shows what accuracy torch achieves (`_check`)."""

    def __init__(
        self,
        name: str,
        reference: Callable[..., Any],
        native: Native,
        samples: Callable[[], Iterator[Sample]],
        torch_kernel: Callable[..., Any] | None = None,
    ) -> None:
        self.name, self.reference, self.native = name, reference, native
        self.samples, self.torch_kernel = samples, torch_kernel
        self.backends = {"reference": Backend(reference, lambda *a, **k: None)}
        for backend in ("cpp", "triton", "cuda"):
            self.add_backend(backend)
        self.warned: set[str] = set()
        if not NATIVE_PROBLEM:
            try:
                self.register("finetune")
            except RuntimeError as error:
                raise UserError(
                    f"{LIBRARY} is older than the sources ({error}): pip install -e . builds it again"
                ) from error
        REGISTRY[name] = self

    def register(self, library: str) -> None:
        """Shape functions and derivatives for the operators of a torch library."""
        self.native.register(Library(library, self.native.on_host))

    def add_backend(self, backend: str) -> None:
        """Makes the operators of `backend`'s library callable through this op."""

        absent = (
            missing(self.name, backend) if backend != "triton" else None
        )  # known for good, so that tracers need not ask

        def call(*args: Any, **kwargs: Any) -> Any:
            return self.native.call(getattr(torch.ops, LIBRARIES[backend]), *args, **kwargs)

        def supports(*args: Any, **kwargs: Any) -> str | None:
            reason = load_triton(self) if backend == "triton" else absent
            return reason or self.native.supports(backend, *args, **kwargs)

        self.backends[backend] = Backend(call, supports)

    def overload(self, library: str, *args: Any, **kwargs: Any) -> tuple[Any, tuple[Any, ...]]:
        """The torch operator that this call becomes, and its arguments."""
        name, arguments = self.native.overload(*args, **kwargs)
        return getattr(getattr(torch.ops, library), name).default, arguments

    def why_not(self, backend: str, *args: Any, **kwargs: Any) -> str | None:
        """None if `backend` can run this call, else the reason."""
        if backend not in self.backends:
            raise ValueError(f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}")
        if backend != "reference" and (reason := differentiated_otherwise((*args, *kwargs.values()))):
            return reason
        return self.backends[backend].supports(*args, **kwargs)

    def __call__(self, *args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        backend = backend or forced
        if backend:
            if reason := self.why_not(backend, *args, **kwargs):
                raise BackendUnavailable(f"{self.name}: backend {backend} cannot run this call: {reason}")
            return self.backends[backend].call(*args, **kwargs)
        for name in ORDER[device_of(args)]:
            if reason := self.why_not(name, *args, **kwargs):
                if reason not in self.warned:
                    self.warned.add(reason)
                    warnings.warn(f"{self.name}: {name} not used: {reason}", stacklevel=3)
                continue
            return self.backends[name].call(*args, **kwargs)
        raise AssertionError("the reference supports every call")


def device_of(args: tuple[Any, ...]) -> str:
    """Device type of the first tensor among the arguments (lists of tensors included)."""
    for arg in args:
        first = arg[0] if isinstance(arg, (list, tuple)) and arg else arg
        if isinstance(first, torch.Tensor):
            return "cuda" if first.is_cuda else "cpu"
    return "cpu"


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Forces one backend for every op called inside."""
    global forced
    before, forced = forced, name
    try:
        yield
    finally:
        forced = before


def load_library() -> str | None:
    """Loads the native library; None, or the reason why it cannot be loaded."""
    if not LIBRARY.exists():
        return "the native library is not built: pip install -e . in the project folder"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"the native library does not load ({error}): pip install -e . builds it again"
    wanted = os.environ.get("FINETUNE_CPU")
    if wanted and wanted != torch.ops.finetune.cpu_level():
        raise UserError(
            f"FINETUNE_CPU={wanted}: this machine supports up to {torch.ops.finetune.cpu_level_supported()} "
            "(portable < avx2 < avx512 < amx); unset it or choose a lower one"
        )
    return None


NATIVE_PROBLEM = load_library()


def load_triton(op: Op) -> str | None:
    """Why there are no Triton operators for this op, if so."""
    if NATIVE_PROBLEM:
        return NATIVE_PROBLEM  # they take their schemas from it
    from finetune.ops import _triton

    return _triton.load(op)


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


def known(operator: str) -> bool:
    library, name = operator.split("::")
    return hasattr(getattr(torch.ops, library), name)


def native_float(backend: str, *tensors: torch.Tensor | None) -> str | None:
    """The `supports` that most ops share: tensors of one floating dtype where the backend wants them; float16 only on
    GPUs (and their emulation)."""
    given = [t for t in tensors if t is not None]
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


def device_for(backend: str) -> str:
    """The type of device whose tensors `backend` takes."""
    on_gpu = backend == "cuda" or (backend == "triton" and os.environ.get("TRITON_INTERPRET") != "1")
    return "cuda" if on_gpu else "cpu"


def wrong_device(backend: str, *tensors: torch.Tensor) -> str | None:
    """CPU tensors for cpp and for what is emulated or interpreted, CUDA tensors for the GPU, all on one device."""
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


def table() -> list[dict[str, Any]]:
    """op × backend × ok | reason, for small samples where each backend wants them (`python -m finetune ops`)."""
    rows = []
    for op in REGISTRY.values():
        sample = next(s for s in op.samples() if not s.bench)
        for backend in BACKENDS:
            device = device_for(backend) if torch.cuda.is_available() else "cpu"
            reason = op.why_not(backend, *sample.cast(torch.float32, device), **sample.options(device))
            rows.append({"op": op.name, "backend": backend, "ok": reason is None, "reason": reason or ""})
    return rows
