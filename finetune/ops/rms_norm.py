"""RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467).

    y = x / sqrt(mean(x², over the last dimension) + eps) · weight

Statistics and arithmetic in fp32 whatever the dtype; the result is rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from finetune.ops._op import op
from finetune.ops._samples import Sample


@op
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5, *, backend: str | None = None) -> Tensor:
    """x (..., C), weight (C,) of one dtype → (..., C). Gradients for both."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x32 = x.to(wide)
    rstd = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (x32 * rstd * weight.to(wide)).to(x.dtype)


@rms_norm.fake()
def _(x: Tensor, **_) -> tuple[Tensor, Tensor]:
    n_rows = x.numel() // max(x.shape[-1], 1)
    return x.new_empty(x.shape), x.new_empty(n_rows, dtype=torch.float32)


@rms_norm.backward()
def _(operators, ctx, dy: Tensor, _):
    x, weight, rstd = ctx.saved_tensors
    weight_grad = ctx.needs_input_grad[1]
    dx, dweight = operators.rms_norm_backward(dy, x, weight, rstd, weight_grad)
    return dx, dweight if weight_grad else None, None


@rms_norm.sampled
def samples() -> Iterator[Sample]:
    g = torch.Generator().manual_seed(0)

    def make(name: str, *shape: int, scale: float = 1.0, bench: bool = False) -> Sample:
        x = torch.randn(*shape, generator=g, dtype=torch.float64) * scale
        weight = torch.randn(shape[-1], generator=g, dtype=torch.float64)
        n = x.numel()
        return Sample(name, (x, weight), grad=(0, 1), bench=bench, flops=14.0 * n, bytes=4.0 * 5 * n)

    yield make("small", 2, 3, 8)
    yield make("odd", 5, 37)
    yield make("one", 1, 1)
    yield make("empty", 0, 16)
    yield make("wide", 3, 1031)
    yield make("rows", 70, 5)  # more than the CPU backward has blocks
    yield make("blocks", 70, 300)  # several blocks, rows at once in each, and warps a row
    yield make("wider", 3, 4104)  # than a block's threads take at once; by 16 bytes
    yield make("large", 4, 64, scale=1e4)
    x = torch.randn(48, 6, generator=g, dtype=torch.float64).t()
    yield Sample("strided", (x, torch.randn(48, generator=g, dtype=torch.float64)), grad=(0, 1))
    yield from make("aligned", 3, 64).at_odd_addresses()
    yield make("bench", 2048, 576, bench=True)
