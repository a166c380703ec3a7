"""adaLN's modulation: LayerNorm without weights, then a scale and a shift for each item of the batch (Peebles & Xie
2023, arXiv:2212.09748, §3.2).

    y = x̂ · (1 + scale) + shift,   x̂ = (x − mean) / sqrt(variance + eps)

Mean and (biased) variance over the last dimension. Statistics and arithmetic in fp32 whatever the dtype; the result is
rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from finetune.ops._op import op
from finetune.ops._samples import OF_ITEMS, Sample


@op
def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, *, backend: str | None = None) -> Tensor:
    """x (B, …, C), shift and scale (B, C) of one dtype, unit stride in C (else copied) → like x. Gradients for all."""
    wide = torch.promote_types(x.dtype, torch.float32)
    centered = x.to(wide) - x.to(wide).mean(-1, keepdim=True)
    normal = centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps)
    each = (shift.shape[0], *(1,) * (x.dim() - 2), shift.shape[1])
    return (normal * (1 + scale.to(wide).reshape(each)) + shift.to(wide).reshape(each)).to(x.dtype)


@modulate.check
def _(x: Tensor, shift: Tensor, scale: Tensor, **_) -> None:
    if x.dim() < 2 or not shift.shape == scale.shape == (x.shape[0], x.shape[-1]):
        raise RuntimeError(
            f"modulate: x (B, …, C) needs shift and scale (B, C), got {[*x.shape]}, {[*shift.shape]} "
            f"and {[*scale.shape]}"
        )


@modulate.fake()
def _(x: Tensor, **_) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty(x.numel() // max(x.shape[-1], 1), dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), mean, rstd


@modulate.fake("modulate_backward")
def _(x: Tensor, scale: Tensor, **_) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), scale.new_empty(scale.shape), scale.new_empty(scale.shape)


@modulate.backward()
def _(operators, ctx, dy: Tensor, *_):
    x, _, scale, mean, rstd = ctx.saved_tensors
    return *operators.modulate_backward(dy, x, scale, mean, rstd), None


@modulate.sampled
def samples() -> Iterator[Sample]:
    g = torch.Generator().manual_seed(0)

    def around(name: str, x: Tensor, bench: bool = False) -> Sample:
        shift, scale = (torch.randn(x.shape[0], x.shape[-1], generator=g, dtype=torch.float64) for _ in range(2))
        n = x.numel()
        return Sample(name, (x, shift, scale), grad=(0, 1, 2), bench=bench, flops=20.0 * n, bytes=20.0 * n)

    def make(name: str, *shape: int, size: float = 1.0, mean: float = 0.0, bench: bool = False) -> Sample:
        return around(name, torch.randn(*shape, generator=g, dtype=torch.float64) * size + mean, bench)

    for name, shape in OF_ITEMS.items():
        yield make(name, *shape)
    yield make("large", 2, 4, 64, size=1e4)
    yield make("shifted", 2, 4, 65, mean=300.0)
    yield around("strided", torch.randn(2, 48, 6, generator=g, dtype=torch.float64).transpose(1, 2))
    x, six = torch.randn(3, 5, 37, generator=g, dtype=torch.float64), torch.randn(3, 222, generator=g).double()
    yield Sample("of one projection", (x, *six.chunk(6, -1)[:2]), grad=(0, 1, 2))
    yield from make("aligned", 2, 3, 64).at_odd_addresses()
    yield make("bench", 8, 256, 768, bench=True)
