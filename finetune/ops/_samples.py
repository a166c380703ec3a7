"""Samples of an op: the calls that its tests, benches and learning pages make, at any place in memory."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

SMOLLM2_BLOCK = [*[(576, 576)] * 2, *[(192, 576)] * 2, *[(1536, 576)] * 3, *[(576,)] * 2]  # shapes of its weights


@dataclass(frozen=True)
class Sample:
    """The arguments of one call of an op. Tensors are float64; `cast` converts them to any dtype."""

    name: str
    given: tuple[Any, ...] | Callable[[], tuple[Any, ...]]  # the arguments, or a function that makes large ones
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
        """Whether it is another sample at other addresses: tests in which addresses play no part omit it."""
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
            if hasattr(arg, "packed"):  # a QuantizedWeight: once, as at load, where it is timed
                return arg.packed(device) if self.bench else arg.to(device)
            if not isinstance(arg, torch.Tensor):  # a weight in few bits is packed for a GPU; on the CPU it stays
                return arg.packed(device) if device != "cpu" and hasattr(arg, "packed") else arg
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
            copy = place(arg.shape, arg.stride(), arg.dtype, device, name in self.odd, None)
            distinct(copy).copy_(distinct(arg))
            return copy

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


# Shapes (B, …, C) of ops that have a row of numbers for each of B items.
OF_ITEMS = {
    "small": (2, 3, 8),
    "odd": (3, 5, 37),
    "a row an item": (5, 37),
    "planes": (2, 3, 5, 24),
    "empty": (0, 4, 16),
    "no rows": (2, 0, 16),
    "wide": (2, 3, 1031),
    "many rows": (1, 67, 19),
    "many items": (40, 2, 19),
    "blocks": (2, 70, 300),  # several blocks an item, rows at once in each, and warps a row
    "wider": (2, 3, 4104),  # than a block's threads take at once; by 16 bytes
}


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


def distinct(t: torch.Tensor) -> torch.Tensor:
    """Each element of an expanded tensor once."""
    for dimension, stride in enumerate(t.stride()):
        if stride == 0 and t.shape[dimension] > 1:
            t = t.narrow(dimension, 0, 1)
    return t


def sparse(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros; only the pages that are touched occupy memory."""
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)  # from Python 3.13 on
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize, flags=flags), dtype=dtype)
