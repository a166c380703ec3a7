"""SwiGLU (Shazeer 2020, arXiv:2002.05202), the gate of Llama's MLP, without its matrix products.

    y = silu(gate) · up,   silu(g) = g / (1 + exp(−g))

Arithmetic in fp32 whatever the dtype; the result is rounded once. Backward keeps gate and up only.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from finetune.ops._op import op
from finetune.ops._samples import Sample


@op
def swiglu(gate: Tensor, up: Tensor, *, backend: str | None = None) -> Tensor:
    """gate, up (..., C) of one shape and dtype, unit stride in C (else copied) → (..., C). Gradients for both."""
    if gate.shape != up.shape:
        raise RuntimeError(f"swiglu: gate and up must have one shape, got {[*gate.shape]} and {[*up.shape]}")
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (torch.nn.functional.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


@swiglu.backward()
def _(operators, ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
    return operators.swiglu_backward(dy, *ctx.saved_tensors)


@swiglu.sampled
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
