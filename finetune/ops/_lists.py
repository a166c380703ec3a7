"""Checks of the lists of tensors that ops change in place: a generator is read once, and a parameter is refused where a
gradient is expected."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def tensors_of(op: str, name: str, given: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """A list of `given`, which may be one tensor or any iterable of them. TypeError names an item of another type."""
    if isinstance(given, Tensor):
        return [given]
    items: list[Any] = list(given)
    for i, item in enumerate(items):
        if not isinstance(item, Tensor):
            fix = ": omit parameters without a gradient" if item is None else ""
            raise TypeError(f"{op}: {name}[{i}] is {type(item).__name__}, not a tensor{fix}")
    return items


def is_parameter(t: Tensor) -> bool:
    """Is it trained, and so no gradient? A frozen nn.Parameter is one too; a gradient that itself requires a gradient
    (create_graph=True) is not."""
    return isinstance(t, torch.nn.Parameter) or (t.is_leaf and (t.requires_grad or t.grad is not None))


def gradients_of(op: str, given: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """The gradients to change in place: those given, or, as torch's functions of these names do it, the `.grad` of the
    parameters given that have one. ValueError for a mixture: it would scale weights."""
    items = tensors_of(op, "grads", given)
    of_parameters = [is_parameter(t) for t in items]
    if any(of_parameters):
        if not all(of_parameters):
            a, b = of_parameters.index(True), of_parameters.index(False)
            raise ValueError(
                f"{op}: item {a} is a parameter and item {b} is not: give parameters, whose .grad is changed, or "
                "gradients, but not both"
            )
        items = [t.grad for t in items if t.grad is not None]
    for i, g in enumerate(items):
        if g.layout != torch.strided:
            raise ValueError(f"{op}: gradient {i} is {str(g.layout).removeprefix('torch.')}; it takes dense gradients")
    return items


def refuse_capture(op: str, tensors: list[Tensor]) -> None:
    """RuntimeError if a CUDA graph is being captured. An optimizer's step has its learning rate and bias corrections by
    value: every replay would take the captured step's."""
    if any(t.is_cuda for t in tensors) and torch.cuda.is_current_stream_capturing():
        what = "every replay of the CUDA graph would take this step's lr and bias corrections"
        raise RuntimeError(f"{op}: {what}: end the capture before the optimizer's step")


def optimizer_lists(
    op: str, params: Iterable[Tensor], masters: Iterable[Tensor] | None, **others: Iterable[Tensor]
) -> dict[str, list[Tensor] | None]:
    """params, the others (gradients and states) and masters as lists of equal lengths, by name. ValueError if one is
    shorter, or if a gradient or state is a parameter; RuntimeError in the capture of a CUDA graph."""
    lists = {name: tensors_of(op, name, given) for name, given in {"params": params, **others}.items()}
    masters = None if masters is None else tensors_of(op, "masters", masters)
    refuse_capture(op, lists["params"])
    for name, tensors in {**lists, **({"masters": masters} if masters else {})}.items():
        if len(tensors) != len(lists["params"]):
            raise ValueError(f"{op}: {name} has {len(tensors)} tensors for {len(lists['params'])} params")
        if name != "params" and (wrong := [i for i, t in enumerate(tensors) if is_parameter(t)]):
            what = "its .grad" if name == "grads" else "its state"
            raise ValueError(f"{op}: {name}[{wrong[0]}] is a parameter: give {what} in its place")
    return {**lists, "masters": masters}


def norm_bound(op: str, max_norm: float) -> float:
    """max_norm as a number under which every gradient keeps its sign: not negative, not NaN; infinity only measures."""
    value = float(max_norm)
    if math.isnan(value) or value < 0:
        raise ValueError(f"{op}: max_norm={value} must be 0 or more; infinity only measures")
    return value
