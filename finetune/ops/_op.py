"""The dispatcher: an op is a plain-torch reference that defines it, and backends that must agree with it.

`Op(name, reference, backends)` is called like the reference, plus `backend=`. Without a choice the first available
backend of `ORDER` for the tensors' device runs. A forced backend that cannot run raises `BackendUnavailable` with the
reason; an automatic choice that falls through to the reference warns once, with the reason.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

BACKENDS = ("reference", "cpp", "triton", "cuda")
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
    overload: Callable[..., tuple[Any, tuple[Any, ...]]] | None = None  # call → torch operator and its arguments


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

    @cached_property
    def args(self) -> tuple[Any, ...]:
        return self.given() if callable(self.given) else self.given

    def cast(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """Fresh copies of the arguments, float64 tensors converted to `dtype`; those of `grad` require gradients."""

        def one(arg: Any, grad: bool) -> Any:
            if isinstance(arg, list):
                return [one(item, grad) for item in arg]
            if not isinstance(arg, torch.Tensor):
                return arg
            keep = dtype if arg.dtype == torch.float64 else arg.dtype
            copy = torch.empty_strided(arg.shape, arg.stride(), dtype=keep)  # a view's gaps and order are kept
            return copy.copy_(arg.detach()).requires_grad_(grad)

        return tuple(one(arg, i in self.grad) for i, arg in enumerate(self.args))


REGISTRY: dict[str, Op] = {}


class Op:
    """See the module's text. `samples()` yields the op's `Sample`s. `torch_kernel`: torch's own fused form of the op,
    if it has one; like the reference it shows what accuracy torch achieves (`_check`)."""

    def __init__(
        self,
        name: str,
        reference: Callable[..., Any],
        backends: dict[str, Backend],
        samples: Callable[[], Iterator[Sample]],
        torch_kernel: Callable[..., Any] | None = None,
    ) -> None:
        self.name, self.reference, self.samples, self.torch_kernel = name, reference, samples, torch_kernel
        self.backends = {"reference": Backend(reference, lambda *a, **k: None), **backends}
        self.warned: set[str] = set()
        REGISTRY[name] = self

    def why_not(self, backend: str, *args: Any, **kwargs: Any) -> str | None:
        """None if `backend` can run this call, else the reason."""
        if backend not in BACKENDS:
            raise ValueError(f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}")
        found = self.backends.get(backend)
        return found.supports(*args, **kwargs) if found else f"{self.name} has no {backend} kernel yet"

    def __call__(self, *args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        backend = backend or forced
        if backend:
            if reason := self.why_not(backend, *args, **kwargs):
                raise BackendUnavailable(f"{self.name}: backend {backend} cannot run this call: {reason}")
            return self.backends[backend].call(*args, **kwargs)
        for name in ORDER[device_of(args)]:
            if name not in self.backends:
                continue
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
        return f"the native library does not load ({error}): pip install -e . builds it anew"
    wanted = os.environ.get("FINETUNE_CPU")
    if wanted and wanted != torch.ops.finetune.cpu_level():
        raise RuntimeError(
            f"FINETUNE_CPU={wanted}: this machine supports up to {torch.ops.finetune.cpu_level_supported()} "
            "(portable < avx2 < avx512 < amx); unset it or choose a lower one"
        )
    return None


NATIVE_PROBLEM = load_library()


def native_float(*tensors: torch.Tensor | None) -> str | None:
    """The `supports` that most cpp backends share: CPU tensors of one dtype, float32 or bfloat16."""
    if NATIVE_PROBLEM:
        return NATIVE_PROBLEM
    given = [t for t in tensors if t is not None]
    if any(t.device.type != "cpu" for t in given):
        return "it takes CPU tensors"
    dtypes = {t.dtype for t in given}
    if len(dtypes) > 1:
        return f"it takes one dtype, got {', '.join(sorted(str(d).removeprefix('torch.') for d in dtypes))}"
    if not dtypes <= {torch.float32, torch.bfloat16}:
        return f"it takes float32 and bfloat16, got {str(dtypes.pop()).removeprefix('torch.')}"
    return None


def table() -> list[dict[str, Any]]:
    """op × backend × ok | reason, for small CPU samples (`python -m finetune ops`)."""
    rows = []
    for op in REGISTRY.values():
        sample = next(s for s in op.samples() if not s.bench)
        args = sample.cast(torch.float32)
        for backend in BACKENDS:
            reason = op.why_not(backend, *args, **sample.kwargs)
            rows.append({"op": op.name, "backend": backend, "ok": reason is None, "reason": reason or ""})
    return rows
