"""The dispatcher: an op is a plain-torch reference that defines it, and backends that must agree with it.

An op file reads

    @op
    def rms_norm(x, weight, eps=1e-5, *, backend=None): …     the reference; only the dispatcher uses `backend`
    @rms_norm.fake() …  @rms_norm.backward() …                what else it declares: the decorators of `Op`
    @rms_norm.sampled …                                       calls for tests, benches and learning pages

Every backend but the reference is a torch library of operators with the same schemas, so an op's derivative and shape
functions are written once: cpp and cuda are one library under two dispatch keys, triton is a second one, and the CUDA
kernels that run on CPU tensors (finetune/kernels/emulator.py) are a third.

The path of a call, here attention on the CPU with gradients:

    ops.attention(q, k, v, lengths=n)
    └ Op.__call__                   the backend that the call, `use_backend` or FINETUNE_BACKEND forces, else by `ORDER`
      ├ Op.bind                     all arguments by name, defaults included
      ├ @attention.check            the errors that every backend raises
      ├ Op.reason                   None, or why this backend cannot run this call:
      │ ├ differentiated_otherwise    inside of torch.func, or in forward mode?
      │ └ @attention.supports         devices, dtypes and sizes: native_float → wrong_device
      └ Op.run_operator
        ├ Op.operands               @attention.operands; then the order of the operator's schema
        ├ torch.ops.finetune.attention    torch's dispatcher
        │ ├ Library.derivative            autograd: keeps what @attention.backward needs
        │ └ csrc/bindings/attention.cpp   checks, allocation
        │   └ csrc/cpu/attention.cpp      the kernel (of CUDA tensors: csrc/cuda/attention.cu)
        └ @attention.results        which of the operator's outputs the op returns

An automatic choice that falls through to the reference warns once, with the reason; a forced backend that cannot run
raises `BackendUnavailable` with it.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from finetune import environment
from finetune.errors import UserError
from finetune.ops._backends import (
    LIBRARIES,
    LIBRARY,
    NATIVE_PROBLEM,
    ORDER,
    device_for,
    device_of,
    known,
    missing,
    native_float,
)
from finetune.ops._library import Derivative, Library, Schema, differentiated_otherwise
from finetune.ops._samples import Sample

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])

MISSING = inspect.Parameter.empty
below_autograd = torch._C._AutoDispatchBelowAutograd  # context without the layer that records, which costs 10 µs a call

forced: str | None = environment.choice("FINETUNE_BACKEND")


class BackendUnavailable(RuntimeError):
    """The backend that a call forces cannot run it; the message says why."""


@dataclass(frozen=True)
class Backend:
    """One implementation of an op. Both functions are called with the op's arguments by name."""

    call: Callable[..., Any]
    supports: Callable[..., str | None]  # None, or the reason why it cannot run the call


class Parameters:
    """The parameters of a reference, without `backend`."""

    def __init__(self, reference: Callable[..., Any]) -> None:
        self.signature = inspect.signature(reference)
        own = [p for p in self.signature.parameters.values() if p.name != "backend"]
        self.names = [p.name for p in own]
        self.defaults = {p.name: p.default for p in own}  # MISSING without one
        self.positional = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in own)

    def bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments by name, in order. (inspect.Signature.bind is slow, and opaque to tracers.)"""
        given = dict(zip(self.names, args, strict=False)) | kwargs
        bound = self.defaults | given
        fits = len(bound) == len(self.names) and not any(value is MISSING for value in bound.values())
        if not fits or len(args) > self.positional or len(given) != len(args) + len(kwargs):
            self.signature.bind(*args, **kwargs)  # raises the TypeError that a function would raise
        return bound


REGISTRY: dict[str, Op] = {}


class Op(Generic[P, R]):
    """A function with several backends. It is called like its reference; `backend=` forces one of them.

    The functions that the decorators below store are called with the op's arguments by name: they list the arguments
    that they use and accept the others as `**_`.
    """

    def __init__(self, reference: Callable[P, R], name: str | None = None) -> None:
        functools.update_wrapper(self, reference)
        self.reference: Callable[..., R] = reference
        self.name = name or reference.__name__.rstrip("_")  # adamw of adamw_: the stem of its files
        self.operators = [reference.__name__]  # in torch.ops.<library>: the forward pass, the backward pass if any
        self.on_host: tuple[str, ...] = ()  # arguments that may be on the CPU while the others are on a GPU
        self.parameters = Parameters(reference)

        self.checks: Callable[..., dict[str, Any] | None] | None = None
        self.unsupported: Callable[..., str | None] = by_dtype
        self.other_operands: Callable[..., dict[str, Any]] | None = None
        self.results_of: Callable[..., Any] = first_output
        self.shapes: dict[str, Callable[..., Any]] = {}  # operator → its shape function
        self.derivative: Derivative | None = None
        self.torch_kernel: Callable[..., Any] | None = None
        self.make_samples: Callable[[], Iterator[Sample]] = lambda: iter(())

        self.schemas: dict[str, Schema] = {}
        self.backends = {"reference": Backend(reference, lambda **_: None)}
        for backend in ("cpp", "triton", "cuda"):
            self.add_backend(backend)
        self.warned: set[str] = set()
        REGISTRY[self.name] = self

    # --- what an op file declares

    def check(self, function: F) -> F:
        """Decorates the first thing a call does: raise errors, return replacements for some of the arguments."""
        self.checks = function
        return function

    def supports(self, function: F) -> F:
        """Decorates function(backend, **arguments): None, or why the backend cannot run the call. The default is
        `native_float` of all tensors."""
        self.unsupported = function
        return function

    def operands(self, function: F) -> F:
        """Decorates what returns those arguments of the operator that are not the op's argument of the same name."""
        self.other_operands = function
        return function

    def results(self, function: F) -> F:
        """Decorates function(output, **arguments): what the op returns of the operator's output. The default is the
        first tensor of several."""
        self.results_of = function
        return function

    def fake(self, operator: str | None = None) -> Callable[[F], F]:
        """Decorates the shape function of an operator (that of the forward pass), called with the operator's arguments
        by name. `Schema.like_inputs` is the default."""

        def store(function: F) -> F:
            self.shapes[operator or self.operators[0]] = function
            return function

        return store

    def backward(self, **options: Any) -> Callable[[F], F]:
        """Decorates function(operators, ctx, *grads), the backward pass; options: those of `Derivative`."""

        def store(function: F) -> F:
            self.derivative = Derivative(function, **({"again": self.by_reference} | options))
            self.operators.append(f"{self.operators[0]}_backward")
            return function

        return store

    def fused(self, function: F) -> F:
        """Decorates torch's own fused form of the op. Like the reference it shows what accuracy torch achieves."""
        self.torch_kernel = lambda *args, **kwargs: function(**self.bind(args, kwargs))
        return function

    def sampled(self, function: Callable[[], Iterator[Sample]]) -> Callable[[], Iterator[Sample]]:
        """Decorates what yields the samples."""
        self.make_samples = function
        return function

    # --- a call

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        backend: Any = kwargs.pop("backend", None) or forced
        given = self.bind(args, kwargs)
        if backend:
            if reason := self.reason(backend, given):
                raise BackendUnavailable(f"{self.name}: backend {backend} cannot run this call: {reason}")
            return self.backends[backend].call(**given)
        for name in ORDER[device_of(given.values())]:
            if reason := self.reason(name, given):
                if reason not in self.warned:
                    self.warned.add(reason)
                    warnings.warn(f"{self.name}: {name} not used: {reason}", stacklevel=2)
                continue
            return self.backends[name].call(**given)
        raise AssertionError("the reference supports every call")

    def bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments of a call by name, checked."""
        bound = self.parameters.bind(args, kwargs)
        replaced = self.checks(**bound) if self.checks else None
        return bound | replaced if replaced else bound

    def reason(self, backend: str, given: dict[str, Any]) -> str | None:
        """None if `backend` can run the call, else why not."""
        if backend not in self.backends:
            raise ValueError(f"unknown backend {backend!r}: choose one of {', '.join(environment.BACKENDS)}")
        if backend != "reference" and (reason := differentiated_otherwise(given.values())):
            return reason
        return self.backends[backend].supports(**given)

    def run_operator(self, library: str, given: dict[str, Any]) -> Any:
        """The op by its torch operator; an empty list of tensors, which has no device, is left to the reference."""
        first = next(iter(given.values()))
        if isinstance(first, list) and not first:
            return self.reference(**given)
        operator, values = self.operands_of(given)
        call = getattr(getattr(torch.ops, library), operator).default
        recorded = torch.is_grad_enabled() or torch.compiler.is_compiling()
        with self.recorded() if recorded else below_autograd():
            output = call(*values)
            if changed := self.schemas[operator].written(values):  # a graph that saved one of them must notice
                torch.autograd.graph.increment_version(changed)
            return self.results_of(output, **given)

    def recorded(self) -> Any:
        """Context of a call whose derivative may be wanted."""
        return nullcontext() if self.derivative else torch.no_grad()

    def operands_of(self, given: dict[str, Any]) -> tuple[str, list[Any]]:
        """The operator that the call becomes, and its arguments."""
        operator = self.operator_of(given)
        own = given | self.other_operands(**given) if self.other_operands else given
        return operator, self.schemas[operator].ordered(own)

    def operator_of(self, given: dict[str, Any]) -> str:
        return self.operators[0]

    # --- for tests, benches and the libraries of operators

    def samples(self) -> Iterator[Sample]:
        return self.make_samples()

    def why_not(self, backend: str, *args: Any, **kwargs: Any) -> str | None:
        """None if `backend` can run this call, else the reason."""
        return self.reason(backend, self.bind(args, kwargs))

    def overload(self, library: str, *args: Any, **kwargs: Any) -> tuple[Any, tuple[Any, ...]]:
        """The torch operator that this call becomes, and its arguments."""
        operator, values = self.operands_of(self.bind(args, kwargs))
        return getattr(getattr(torch.ops, library), operator).default, tuple(values)

    def by_reference(self, **operands: Any) -> Any:
        """The reference, called with the operator's arguments."""
        return self.reference(**{name: operands[name] for name in self.parameters.names if name in operands})

    def add_backend(self, backend: str) -> None:
        """Makes the operators of `backend`'s library callable through this op."""
        absent = missing(self.name, backend) if backend != "triton" else None  # once, so that tracers need not ask

        def call(**given: Any) -> Any:
            return self.run_operator(LIBRARIES[backend], given)

        def supports(**given: Any) -> str | None:
            reason = load_triton(self) if backend == "triton" else absent
            return reason or self.unsupported(backend, **given)

        self.backends[backend] = Backend(call, supports)

    def register(self, library: str) -> None:
        """Shape functions and derivatives of the op's operators in torch.ops.<library>."""
        there = Library(library, self.on_host)
        for operator in self.operators:
            if known(f"{library}::{operator}"):
                self.schemas[operator] = schema = there.schema(operator)
                there.fake(operator, self.shapes.get(operator) or schema.like_inputs)
        if self.derivative:
            there.derivative(self.operators[0], self.derivative)


def op(reference: Callable[P, R]) -> Op[P, R]:
    """Decorates a reference: its name becomes the op, with the backends that exist."""
    return Op(reference)


def register_all() -> None:
    """Registers what the op files declare for the operators of the native library."""
    if NATIVE_PROBLEM:
        return
    for each in REGISTRY.values():
        try:
            each.register("finetune")
        except (RuntimeError, AttributeError) as error:
            raise UserError(
                f"{LIBRARY} is older than the sources ({error}): pip install -e . builds it again"
            ) from error


def by_dtype(backend: str, **given: Any) -> str | None:
    return native_float(backend, *(value for value in given.values() if isinstance(value, Tensor)))


def first_output(output: Any, **_: Any) -> Any:
    return output[0] if isinstance(output, (list, tuple)) else output


def load_triton(op: Op) -> str | None:
    """Why there are no Triton operators for this op, if so."""
    if NATIVE_PROBLEM:
        return NATIVE_PROBLEM  # they take their schemas from it
    from finetune.ops import _triton

    return _triton.load(op)


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Forces one backend for every op called inside."""
    global forced
    before, forced = forced, name
    try:
        yield
    finally:
        forced = before


def table() -> list[dict[str, Any]]:
    """op × backend × ok | reason, for small samples where each backend wants them (`python -m finetune ops`)."""
    rows = []
    for op in REGISTRY.values():
        sample = next(s for s in op.samples() if not s.bench)
        for backend in environment.BACKENDS:
            device = device_for(backend) if torch.cuda.is_available() else "cpu"
            reason = op.why_not(backend, *sample.cast(torch.float32, device), **sample.options(device))
            rows.append({"op": op.name, "backend": backend, "ok": reason is None, "reason": reason or ""})
    return rows
