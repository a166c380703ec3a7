"""GELU (Hendrycks & Gimpel 2016, arXiv:1606.08415), in the tanh form of GPT-2.

    y = x / 2 · (1 + tanh(u)) = x · σ(2u),   u = √(2/π) · (x + 0.044715 x³)

Arithmetic in fp32 whatever the dtype; the result is rounded once. Backward keeps x only.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from finetune.ops._op import op
from finetune.ops._samples import Sample


@op
def gelu(x: Tensor, *, backend: str | None = None) -> Tensor:
    """x of any shape → its shape, contiguous (x with gaps is copied first). Gradient for x."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.nn.functional.gelu(x.to(wide), approximate="tanh").to(x.dtype)


@gelu.backward()
def _(operators, ctx, dy: Tensor) -> Tensor:
    return operators.gelu_backward(dy, *ctx.saved_tensors)


@gelu.sampled
def samples() -> Iterator[Sample]:
    g = torch.Generator().manual_seed(0)

    def make(name: str, *shape: int, scale: float = 1.0, bench: bool = False) -> Sample:
        x = torch.randn(*shape, generator=g, dtype=torch.float64) * scale
        return Sample(name, (x,), grad=(0,), bench=bench, flops=65.0 * x.numel(), bytes=4.0 * 5 * x.numel())

    yield make("small", 2, 3, 8)
    yield make("odd", 5, 37)
    yield make("one", 1, 1)
    yield make("empty", 0, 16)
    yield make("wide", 3, 4099)
    yield make("large", 4, 64, scale=1e4)
    yield make("tails", 8, 64, scale=4.0)
    fused = torch.randn(2, 5, 74, generator=g, dtype=torch.float64)
    yield Sample("half", (fused[..., 37:],), grad=(0,))
    yield Sample("strided", (fused.transpose(0, 1),), grad=(0,))
    yield from make("aligned", 3, 64).at_odd_addresses()
    yield make("bench", 2048, 3072, bench=True)
