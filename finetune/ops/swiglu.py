"""SwiGLU (Shazeer 2020, arXiv:2002.05202), the gate of Llama's MLP, without its matrix products.

    y = silu(gate) · up,   silu(g) = g / (1 + exp(−g))

Arithmetic in fp32 whatever the dtype; the result is rounded once. Backward keeps gate and up only.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from finetune.ops._library import Library
from finetune.ops._op import Native, Op, Sample, native_float


def reference(gate: Tensor, up: Tensor) -> Tensor:
    if gate.shape != up.shape:
        raise RuntimeError(f"swiglu: gate and up must have one shape, got {[*gate.shape]} and {[*up.shape]}")
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (torch.nn.functional.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


def native(operators, gate: Tensor, up: Tensor) -> Tensor:
    return operators.swiglu(gate, up)


def overload(gate: Tensor, up: Tensor):
    return "swiglu", (gate, up)


def supports(backend: str, gate: Tensor, up: Tensor) -> str | None:
    return native_float(backend, gate, up)


def register(library: Library) -> None:
    operators = library.operators

    @library.fake("swiglu")
    def _(gate: Tensor, up: Tensor) -> Tensor:
        return gate.new_empty(gate.shape)

    @library.fake("swiglu_backward")
    def _(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        return gate.new_empty(gate.shape), up.new_empty(up.shape)

    def backward(ctx, dy):
        return operators.swiglu_backward(dy, *ctx.saved_tensors)

    library.derivative("swiglu", backward, again=reference)


def samples() -> Iterator[Sample]:
    g = torch.Generator().manual_seed(0)

    def make(name: str, *shape: int, scale: float = 1.0, bench: bool = False) -> Sample:
        gate, up = (torch.randn(*shape, generator=g, dtype=torch.float64) for _ in range(2))
        n = gate.numel()
        return Sample(name, (gate * scale, up), grad=(0, 1), bench=bench, flops=57.0 * n, bytes=4.0 * 8 * n)

    yield make("small", 2, 3, 8)
    yield make("odd", 5, 37)
    yield make("one", 1, 1)
    yield make("empty", 0, 16)
    yield make("no_columns", 3, 0)
    yield make("wide", 3, 4099)
    yield make("large", 4, 64, scale=1e4)
    fused = torch.randn(2, 5, 74, generator=g, dtype=torch.float64)
    yield Sample("halves", fused.chunk(2, dim=-1), grad=(0, 1))
    yield Sample("strided", (fused.transpose(0, 1), fused.transpose(1, 2).reshape(5, 2, 74)), grad=(0, 1))
    yield Sample("one half", (torch.randn(2, 5, 37, generator=g, dtype=torch.float64), fused[..., 37:]), grad=(0, 1))
    yield from make("aligned", 3, 64).at_odd_addresses()
    yield from make("rows", 3, 24).far_apart((0, 0), (1, 0))
    yield make("bench", 2048, 1536, bench=True)


op = Op("swiglu", reference, Native(native, overload, supports, register), samples)


def swiglu(gate: Tensor, up: Tensor, *, backend: str | None = None) -> Tensor:
    """gate, up (..., C) of one shape and dtype, unit stride in C (else copied) → (..., C). Gradients for both."""
    return op(gate, up, backend=backend)
