"""Registration of an op's operators in one torch library: shape functions, and derivatives of any order.

First derivatives come from an operator of the library. When the backward pass itself is recorded (create_graph=True:
gradient penalties, Hessian-vector products, MAML), the op's plain-torch reference replaces it, with a warning the first
time: it can be differentiated any number of times, at a composition's time and memory. Forward-mode derivatives
and torch.func's transforms are the reference's from the start (`differentiated_otherwise`): torch would drop the
tangents of an operator that has no formula for them without a word.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def check_devices(operator: str, names: Sequence[str], arguments: Sequence[Any], on_host: Sequence[str] = ()) -> None:
    """RuntimeError in torch's words unless all tensors, also those in lists, are on one device. on_host: arguments
    that may also be on the CPU, wherever the others are."""
    first = None
    for name, argument in zip(names, arguments, strict=False):  # defaults at the end may be missing
        for t in argument if isinstance(argument, (list, tuple)) else [argument]:
            if not isinstance(t, Tensor) or (name in on_host and t.device.type == "cpu"):
                continue
            first = t.device if first is None else first
            if t.device != first:
                raise RuntimeError(
                    f"finetune::{operator}: Expected all tensors to be on the same device, but found at least two "
                    f"devices, {first} and {t.device}! ({name} is on {t.device})"
                )


def differentiated_otherwise(arguments: Iterable[Any]) -> str | None:
    """Why no operator can run this call, if it is inside of torch.func.grad, vjp, jvp or their like, or some argument
    has a forward-mode tangent. (vmap alone loops over an operator.)"""
    if torch.compiler.is_compiling():
        return None  # a tracer differentiates what it traced
    stack = torch._C._functorch.get_interpreter_stack()
    kinds = torch._C._functorch.TransformType
    if stack and any(each.key() in (kinds.Grad, kinds.Jvp) for each in stack):
        return "inside of torch.func's derivatives only the plain-torch reference can run"
    if forward_ad._current_level >= 0:
        leaves = (t for a in arguments for t in (a if isinstance(a, (list, tuple)) else [a]) if isinstance(t, Tensor))
        if any(forward_ad.unpack_dual(t).tangent is not None for t in leaves):
            return "only the plain-torch reference has forward-mode derivatives"
    return None


@dataclass(frozen=True)
class Schema:
    """The arguments and results of a torch operator, without their types."""

    operator: str
    arguments: tuple[tuple[str, Any], ...]  # name and default
    tensors: tuple[int, ...]  # positions of arguments that are tensors, optional ones included
    writes: tuple[int, ...]  # positions of arguments that are changed in place
    results: tuple[str, ...]  # names, "" without one

    @classmethod
    def of(cls, operator: Any) -> Schema:
        schema = operator.default._schema
        return cls(
            schema.name,
            tuple((a.name, a.default_value) for a in schema.arguments),
            tuple(i for i, a in enumerate(schema.arguments) if "Tensor" in str(a.type)),
            tuple(i for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write),
            tuple(r.name for r in schema.returns),
        )

    def ordered(self, given: dict[str, Any]) -> list[Any]:
        """The operator's arguments in its order, defaults where they are not given."""
        return [given.get(name, default) for name, default in self.arguments]

    def named(self, values: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The operator's arguments by name, defaults included; torch omits those at the end that have their default."""
        return dict(self.arguments) | dict(zip(dict(self.arguments), values, strict=False)) | kwargs

    def written(self, values: Sequence[Any]) -> list[Tensor]:
        """The tensors that the operator changes, of its arguments in its order."""
        changed = [t for i in self.writes for t in (values[i] if isinstance(values[i], list) else [values[i]])]
        return [t for t in changed if t is not None]

    def like_inputs(self, **given: Any) -> Any:
        """The shape function of most operators: a single result is like the first tensor; of several, `dx` is like x,
        or has 0 rows where the argument `x_grad` is false."""
        if not self.results:
            return None
        if len(self.results) == 1:
            first = given[self.arguments[self.tensors[0]][0]]
            return first.new_empty(first.shape)
        inputs = [(given[name.removeprefix("d")], given.get(f"{name[1:]}_grad", True)) for name in self.results]
        return tuple(t.new_empty(t.shape if wanted else (0, *t.shape[1:])) for t, wanted in inputs)


@dataclass(frozen=True)
class Derivative:
    """An operator's backward pass."""

    # (operators, ctx, *grads) → a gradient for each input, or None; not all of `grads` are None. ctx.saved_tensors has
    # the operator's tensors in their order (None for an optional one that is not given), then what `keep` returned;
    # ctx.rest its other inputs, by name.
    backward: Callable[..., Any]
    # (**inputs) → the operator's outputs by differentiable torch operations; the last ones may be missing
    again: Callable[..., Any]
    # (ctx, inputs by name, outputs) → more tensors that `backward` needs. Default: all outputs but the first, which get
    # no gradients.
    keep: Callable[..., Sequence[Tensor]] | None = None
    differentiable: bool = False  # `backward` consists of differentiable operations, so `again` is not needed
    without: Sequence[str] = ()  # inputs whose values no derivative needs: not kept, None in ctx.saved_tensors


@dataclass(frozen=True)
class Library:
    """torch.ops.<name>, while an op registers what it has there."""

    name: str
    on_host: tuple[str, ...] = ()  # the op's arguments that may be on the CPU while the others are on a GPU

    @property
    def operators(self) -> Any:
        return getattr(torch.ops, self.name)

    def schema(self, operator: str) -> Schema:
        return Schema.of(getattr(self.operators, operator))

    def fake(self, operator: str, shapes: Callable[..., Any]) -> None:
        """Registers an operator's shape function, which is called with the operator's arguments by name."""
        schema = self.schema(operator)

        def checked(*arguments: Any, **kwargs: Any) -> Any:
            given = schema.named(arguments, kwargs)
            check_devices(operator, [*given], [*given.values()], self.on_host)
            return shapes(**given)

        torch.library.register_fake(f"{self.name}::{operator}", checked)

    def derivative(self, operator: str, how: Derivative) -> None:
        """Makes an operator differentiable."""
        schema = self.schema(operator)
        names = [name for name, _ in schema.arguments]

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.rest = {names[i]: inputs[i] for i in range(len(names)) if i not in schema.tensors}
            ctx.set_materialize_grads(False)
            extra: Sequence[Tensor] = ()
            if how.keep:
                extra = how.keep(ctx, dict(zip(names, inputs, strict=True)), output)
            elif isinstance(output, tuple):
                extra = output[1:]
                ctx.mark_non_differentiable(*extra)
            kept = [None if names[i] in how.without else inputs[i] for i in schema.tensors]
            ctx.save_for_backward(*kept, *extra)

        def first_or_again(ctx: Any, *grads: Tensor | None) -> Any:
            if all(g is None for g in grads):
                return (None,) * len(names)
            if torch.is_grad_enabled() and not how.differentiable:
                return through(ctx, grads)
            return how.backward(self.operators, ctx, *grads)

        def through(ctx: Any, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
            """The backward pass by the reference, recorded."""
            warn_once(self.name, operator)
            inputs = ctx.rest | {names[i]: t for i, t in zip(schema.tensors, ctx.saved_tensors, strict=False)}
            needed = zip(names, ctx.needs_input_grad, strict=False)  # shorter where defaults at the end are omitted
            wanted = [name for name, is_needed in needed if is_needed]
            for name in wanted:  # a view of each: two inputs may be one tensor
                inputs[name] = inputs[name].view_as(inputs[name])
            outputs = how.again(**inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            pairs = [(y, g) for y, g in zip(outputs, grads, strict=False) if g is not None]
            found = torch.autograd.grad(
                [y for y, _ in pairs],
                [inputs[name] for name in wanted],
                [g for _, g in pairs],
                create_graph=True,
                allow_unused=True,
            )
            gradients = dict(zip(wanted, found, strict=True))
            return tuple(gradients.get(name) for name in names)

        torch.library.register_autograd(f"{self.name}::{operator}", first_or_again, setup_context=setup_context)


warned: set[str] = set()


def warn_once(library: str, operator: str) -> None:
    if operator not in warned:
        warned.add(operator)
        warnings.warn(
            f"{operator}: its backward pass is recorded (create_graph=True), so the plain-torch reference runs it and "
            f"not the kernels of {library}: differentiable, but slower and with a composition's memory",
            stacklevel=2,
        )
