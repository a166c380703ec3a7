"""Where an op registers its operators in one torch library: shape functions, and derivatives of any order.

First derivatives come from an operator of the library. When the backward pass itself is recorded (create_graph=True:
gradient penalties, Hessian-vector products, MAML), the op's plain-torch reference takes its place, with a warning the
first time: it can be differentiated as often as one likes, at a composition's time and memory. Forward-mode derivatives
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
class Library:
    """torch.ops.<name>, while an op registers what it has there."""

    name: str
    on_host: tuple[str, ...] = ()  # the op's arguments that may be on the CPU while the others are on a GPU

    @property
    def operators(self) -> Any:
        return getattr(torch.ops, self.name)

    def arguments(self, operator: str) -> Sequence[Any]:
        return getattr(self.operators, operator).default._schema.arguments

    def fake(self, operator: str) -> Callable[[Callable], Callable]:
        """Decorates an operator's shape function, which is called with the operator's arguments."""
        names = [argument.name for argument in self.arguments(operator)]

        def register(shapes: Callable) -> Callable:
            def checked(*arguments: Any, **kwargs: Any) -> Any:
                given = dict(zip(names, arguments, strict=False)) | kwargs
                check_devices(operator, [*given], [*given.values()], self.on_host)
                return shapes(*arguments, **kwargs)

            torch.library.register_fake(f"{self.name}::{operator}", checked)
            return shapes

        return register

    def derivative(
        self,
        operator: str,
        backward: Callable[..., Any],
        *,
        again: Callable[..., Any] | None,
        keep: Callable[..., Sequence[Tensor]] | None = None,
        without: Sequence[str] = (),
    ) -> None:
        """Makes an operator differentiable.

        backward(ctx, *grads): a gradient for each input, or None; not all of `grads` are None.
        again(*inputs): the operator's outputs by differentiable torch operations, None where an output has no
        gradient. None in its place promises that `backward` itself is made of differentiable operations.
        The inputs that are no tensors are in `ctx.rest`, by position.
        keep(ctx, inputs, output): the tensors that `backward` needs in addition to the operator's own tensor inputs,
        which `ctx.saved_tensors` holds first, in their order (None for an optional one that is not given).
        without: inputs whose values no derivative needs: they are not kept, and `ctx.saved_tensors` has None for them.
        """

        is_tensor = ["Tensor" in str(argument.type) for argument in self.arguments(operator)]
        count, tensors = len(is_tensor), [i for i, tensor in enumerate(is_tensor) if tensor]
        others = [i for i, tensor in enumerate(is_tensor) if not tensor]

        dropped = [i for i, argument in enumerate(self.arguments(operator)) if argument.name in without]

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.rest = {i: inputs[i] for i in others}
            ctx.set_materialize_grads(False)
            extra = keep(ctx, inputs, output) if keep else ()
            ctx.save_for_backward(*[None if i in dropped else inputs[i] for i in tensors], *extra)

        def first_or_again(ctx: Any, *grads: Tensor | None) -> Any:
            for g in grads:
                if g is not None:
                    recorded = again is not None and torch.is_grad_enabled()
                    return through(ctx, grads) if recorded else backward(ctx, *grads)
            return (None,) * count

        def through(ctx: Any, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
            """The backward pass by the reference, recorded."""
            warn_once(self.name, operator)
            saved = dict(zip(tensors, ctx.saved_tensors, strict=False))
            inputs = [saved[i] if i in saved else ctx.rest[i] for i in range(count)]
            wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
            for i in wanted:  # names of their own: two inputs may be one tensor
                inputs[i] = inputs[i].view_as(inputs[i])
            outputs = again(*inputs)  # type: ignore[misc]
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            pairs = [(y, g) for y, g in zip(outputs, grads, strict=True) if g is not None]
            found = torch.autograd.grad(
                [y for y, _ in pairs],
                [inputs[i] for i in wanted],
                [g for _, g in pairs],
                create_graph=True,
                allow_unused=True,
            )
            result: list[Tensor | None] = [None] * len(inputs)
            for i, gradient in zip(wanted, found, strict=True):
                result[i] = gradient
            return tuple(result)

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
