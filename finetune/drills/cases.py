"""What a drill is tried on. Its check.py has

def cases(draw)      yields Cases, the smallest inputs first, so that the first that fails is the smallest
def drive(code, *args, **kwargs)    optional: calls the learner's code; default: the function of `write`
def reference(*args, **kwargs)      optional: what is right, in float64; default: `drive` of the solution
LIMITS                              optional, of CUDA: the most `sectors` (times the fewest possible), `requests` of
                                    warps and bank `conflicts` on the last case
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass
class Case:
    """One input.

    name: what is special about it, shown when it fails
    args, kwargs: given to the code; none may be changed by it unless `changes` says so
    grad: gradients of the floating-point tensors in args are compared too
    length: how many terms the longest sum of the result has; the largest side of an argument by default
    """

    name: str
    args: Sequence[Any] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    grad: bool = False
    length: int = 0
    changes: bool = False


def gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    """Gradients of a loss, zeros where none flows; for a `drive` whose answer gives more than one tensor."""
    found = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else [None] * len(leaves)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


class Draw:
    """Random inputs, the same in every process."""

    def __init__(self, name: str) -> None:
        self.generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        return (torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale).to(dtype)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return (torch.rand(shape, generator=self.generator, dtype=torch.float64) * (high - low) + low).float()

    def integers(self, high: int, *shape: int, low: int = 0) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    def flags(self, *shape: int, share: float = 0.5) -> Tensor:
        """bool, True with this probability."""
        return torch.rand(shape, generator=self.generator) < share

    def strided(self, *shape: int) -> Tensor:
        """Normal numbers of this shape that do not lie next to each other in memory."""
        return self.normal(*shape[:-1], 2 * shape[-1])[..., ::2]


class Largest(TorchDispatchMode):
    """Within `with Largest() as most:`, most.elements is the size of the largest tensor that was made; views of tensors
    that were there before count as those, by their storage."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = op(*args, **(kwargs or {}))
        for each in found if isinstance(found, list | tuple) else [found]:
            if isinstance(each, Tensor):
                self.elements = max(self.elements, each.untyped_storage().nbytes() // each.element_size())
        return found
