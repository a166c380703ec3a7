"""Gradient checkpointing: a function whose inner results are computed again in the backward pass.

checkpoint(f, *args) → f(*args), one tensor. args are tensors, of which any may require a gradient. In the forward pass
nothing that f computes is kept for the backward pass, only the args; in the backward pass f is called again, once, and
gradients go to the args that require one. f may draw from torch's default generator (dropout): the second call must see
the same numbers as the first, and afterwards the generator must be as if there had been no second call. Do not call
torch.utils.checkpoint.

    >>> x = torch.tensor([2.0], requires_grad=True)
    >>> torch.autograd.grad(checkpoint(lambda x: x * x.sin(), x).sum(), x)
    (tensor([0.0770]),)
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def checkpoint(f: Callable[..., Tensor], *args: Tensor) -> Tensor:
    class Again(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Tensor) -> Tensor:  # gradients are off in here
            ctx.save_for_backward(*inputs)
            ctx.random = torch.get_rng_state()
            return f(*inputs)

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Any:
            inputs = [
                x.detach().requires_grad_(need) for x, need in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=True)
            ]
            after = torch.get_rng_state()
            torch.set_rng_state(ctx.random)
            with torch.enable_grad():
                y = f(*inputs)
            torch.set_rng_state(after)
            wanted = [x for x in inputs if x.requires_grad]
            found = iter(torch.autograd.grad(y, wanted, dy, allow_unused=True))
            return tuple(next(found) if x.requires_grad else None for x in inputs)

    return Again.apply(*args)
