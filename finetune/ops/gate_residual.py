"""The end of an adaLN-Zero branch: its gate and the residual sum in one pass (Peebles & Xie 2023, arXiv:2212.09748).

    y = x + gate · branch

with a gate for each item of the batch. Arithmetic in fp32 whatever the dtype; the result is rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from finetune.ops._op import op
from finetune.ops._samples import OF_ITEMS, Sample


@op
def gate_residual(x: Tensor, gate: Tensor, branch: Tensor, *, backend: str | None = None) -> Tensor:
    """x, branch (B, …, C), gate (B, C) of one dtype, unit stride in C (else copied) → like x. Gradients for all."""
    wide = torch.promote_types(x.dtype, torch.float32)
    each = (gate.shape[0], *(1,) * (x.dim() - 2), gate.shape[1])
    return (x.to(wide) + gate.to(wide).reshape(each) * branch.to(wide)).to(x.dtype)


@gate_residual.check
def _(x: Tensor, gate: Tensor, branch: Tensor, **_) -> None:
    if x.dim() < 2 or branch.shape != x.shape or gate.shape != (x.shape[0], x.shape[-1]):
        raise RuntimeError(
            f"gate_residual: x and branch (B, …, C) need a gate (B, C), got {[*x.shape]}, {[*branch.shape]} "
            f"and {[*gate.shape]}"
        )


@gate_residual.fake()
def _(x: Tensor, **_) -> Tensor:
    return x.new_empty(x.shape)


@gate_residual.fake("gate_residual_backward")
def _(gate: Tensor, branch: Tensor, **_) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), branch.new_empty(branch.shape)


@gate_residual.backward()
def _(operators, ctx, dy: Tensor):
    _, gate, branch = ctx.saved_tensors
    if not any(ctx.needs_input_grad[1:]):
        return dy, None, None
    return dy, *operators.gate_residual_backward(dy, gate, branch)


@gate_residual.sampled
def samples() -> Iterator[Sample]:
    g = torch.Generator().manual_seed(0)

    def around(name: str, x: Tensor, branch: Tensor, bench: bool = False) -> Sample:
        gate = torch.randn(x.shape[0], x.shape[-1], generator=g, dtype=torch.float64)
        n = x.numel()
        return Sample(name, (x, gate, branch), grad=(0, 1, 2), bench=bench, flops=5.0 * n, bytes=24.0 * n)

    def make(name: str, *shape: int, size: float = 1.0, bench: bool = False) -> Sample:
        x, branch = (torch.randn(*shape, generator=g, dtype=torch.float64) * size for _ in range(2))
        return around(name, x, branch, bench)

    for name, shape in OF_ITEMS.items():
        yield make(name, *shape)
    yield make("large", 2, 4, 64, size=1e3)
    x, other = (torch.randn(2, 48, 6, generator=g, dtype=torch.float64) for _ in range(2))
    yield around("strided", x.transpose(1, 2), other.transpose(1, 2))
    x, branch = (torch.randn(3, 5, 37, generator=g, dtype=torch.float64) for _ in range(2))
    yield Sample("of one projection", (x, torch.randn(3, 222, generator=g).double()[:, 37:74], branch), grad=(0, 1, 2))
    yield from make("aligned", 2, 3, 64).at_odd_addresses()
    yield make("bench", 8, 256, 768, bench=True)
