"""LayerNorm (Ba, Kiros & Hinton 2016, arXiv:1607.06450).

    y = (x − mean) / sqrt(variance + eps) · weight + bias

Mean and (biased) variance over the last dimension. Statistics and arithmetic in fp32 whatever the dtype; the result is
rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from finetune.ops._library import Library
from finetune.ops._op import Native, Op, Sample, native_float


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    centered = x.to(wide) - x.to(wide).mean(-1, keepdim=True)
    y = centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps) * weight.to(wide)
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


def native(operators, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    return operators.layer_norm(x, weight, bias, eps)[0]


def overload(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5):
    return "layer_norm", (x, weight, bias, eps)


def supports(backend: str, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5) -> str | None:
    return native_float(backend, x, weight, bias)


def register(library: Library) -> None:
    operators = library.operators

    @library.fake("layer_norm")
    def _(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        rows = x.numel() // max(x.shape[-1], 1)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        return y, x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.float32)

    @library.fake("layer_norm_backward")
    def _(
        dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, weight_grad: bool, bias_grad: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        dim = weight.shape[0]
        return dx, weight.new_empty(dim if weight_grad else 0), weight.new_empty(dim if bias_grad else 0)

    def keep(ctx, inputs, output):
        ctx.mark_non_differentiable(*output[1:])
        return output[1:]

    def backward(ctx, dy, *_):
        weight_grad, bias_grad = ctx.needs_input_grad[1:3]
        x, weight, _, mean, rstd = ctx.saved_tensors
        dx, dweight, dbias = operators.layer_norm_backward(dy, x, weight, mean, rstd, weight_grad, bias_grad)
        return dx, dweight if weight_grad else None, dbias if bias_grad else None, None

    def again(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float):
        return reference(x, weight, bias, eps), None, None

    library.derivative("layer_norm", backward, keep=keep, again=again)


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


op = Op("layer_norm", reference, Native(native, overload, supports, register), samples)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5, *, backend: str | None = None
) -> Tensor:
    """x (..., C), weight (C,) and bias (C,) or None, of one dtype → (..., C). Gradients for all three."""
    return op(x, weight, bias, eps, backend=backend)
