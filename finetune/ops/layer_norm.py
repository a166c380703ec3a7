"""LayerNorm (Ba, Kiros & Hinton 2016, arXiv:1607.06450).

    y = (x − mean) / sqrt(variance + eps) · weight + bias

Mean and (biased) variance over the last dimension. Statistics and arithmetic in fp32 whatever the dtype; the result is
rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from finetune.ops._op import op
from finetune.ops._samples import Sample


@op
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5, *, backend: str | None = None
) -> Tensor:
    """x (..., C), weight (C,) and bias (C,) or None, of one dtype → (..., C). Gradients for all three."""
    wide = torch.promote_types(x.dtype, torch.float32)
    centered = x.to(wide) - x.to(wide).mean(-1, keepdim=True)
    y = centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps) * weight.to(wide)
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


@layer_norm.fake()
def _(x: Tensor, **_) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty(x.numel() // max(x.shape[-1], 1), dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), mean, rstd


@layer_norm.fake("layer_norm_backward")
def _(x: Tensor, weight: Tensor, weight_grad: bool, bias_grad: bool, **_) -> tuple[Tensor, Tensor, Tensor]:
    dweight, dbias = (weight.new_empty(weight.shape[0] if wanted else 0) for wanted in (weight_grad, bias_grad))
    return x.new_empty(x.shape), dweight, dbias


@layer_norm.backward()
def _(operators, ctx, dy: Tensor, *_):
    weight_grad, bias_grad = ctx.needs_input_grad[1:3]
    x, weight, _, mean, rstd = ctx.saved_tensors
    dx, dweight, dbias = operators.layer_norm_backward(dy, x, weight, mean, rstd, weight_grad, bias_grad)
    return dx, dweight if weight_grad else None, dbias if bias_grad else None, None


@layer_norm.sampled
def samples() -> Iterator[Sample]:
    g = torch.Generator().manual_seed(0)

    def around(name: str, x: Tensor, bias: bool = True, bench: bool = False) -> Sample:
        weight, b = (torch.randn(x.shape[-1], generator=g, dtype=torch.float64) for _ in range(2))
        grad = (0, 1, 2) if bias else (0, 1)
        n = x.numel()
        return Sample(name, (x, weight, b if bias else None), grad=grad, bench=bench, flops=20.0 * n, bytes=20.0 * n)

    def make(name: str, *shape: int, scale: float = 1.0, shift: float = 0.0, **kwargs: bool) -> Sample:
        return around(name, torch.randn(*shape, generator=g, dtype=torch.float64) * scale + shift, **kwargs)

    yield make("small", 2, 3, 8)
    yield make("odd", 5, 37)
    one = torch.ones(1, dtype=torch.float64)  # weight 1: the gradient is 0 = (g − g) · rstd only if g is exact
    yield Sample("one", (one[None] * 0.3, one, one * 0.7), grad=(0, 1, 2))
    yield make("empty", 0, 16)
    yield make("no_bias", 3, 24, bias=False)
    yield make("wide", 3, 1031)
    yield make("many_rows", 67, 19)
    yield make("blocks", 70, 300)  # several blocks, rows at once in each, and warps a row
    yield make("wider", 3, 4104)  # than a block's threads take at once; by 16 bytes
    yield make("large", 4, 64, scale=1e4)
    yield make("shifted", 4, 65, shift=300.0)
    yield around("strided", torch.randn(48, 6, generator=g, dtype=torch.float64).t())
    yield from make("aligned", 3, 64).at_odd_addresses()
    yield make("bench", 2048, 768, bench=True)
