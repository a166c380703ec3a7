"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), rotate-half convention (as Hugging Face's Llama).

    y1 = x1 · cos − x2 · sin,   y2 = x2 · cos + x1 · sin,   x1 = x[..., :D/2], x2 = x[..., D/2:]

cos and sin are rows of two tables, chosen by each token's position. Arithmetic in fp32 whatever the dtype of x; the
result is rounded once. The rotation is orthogonal: its gradient is the rotation by the opposite angle.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from finetune.ops._backends import native_float
from finetune.ops._op import op
from finetune.ops._samples import Sample


@op
def rope(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, backend: str | None = None) -> Tensor:
    """x (B, T, H, D) with D even and unit stride in D (else copied), cos and sin (max_T, D/2) float32, positions (B, T)
    int64 → (B, T, H, D). Gradient for x. A position outside [0, max_T) raises RuntimeError; on a GPU, where the host
    would have to wait for that, it makes its token NaN."""
    if x.dim() != 4 or x.shape[-1] % 2:
        raise RuntimeError(f"rope: x must be (B, T, H, D) and the head dimension D must be even, got {[*x.shape]}")
    if positions.shape != x.shape[:2]:
        raise RuntimeError(f"rope: positions must be (B, T) = {[*x.shape[:2]]}, got {[*positions.shape]}")
    outside = positions[(positions < 0) | (positions >= len(cos))]
    if len(outside):
        raise RuntimeError(f"rope: position {outside[0].item()} is outside the tables of {len(cos)} positions")
    wide = torch.promote_types(x.dtype, torch.float32)
    c, s = (table.to(wide)[positions][:, :, None] for table in (cos, sin))  # (B, T, 1, D/2)
    x1, x2 = x.to(wide).chunk(2, dim=-1)  # (B, T, H, D/2)
    return torch.cat((x1 * c - x2 * s, x2 * c + x1 * s), dim=-1).to(x.dtype)


@rope.supports
def _(backend: str, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> str | None:
    if cos.requires_grad or sin.requires_grad:
        return "it has no gradient for cos and sin"
    if cos.dtype != torch.float32 or sin.dtype != torch.float32 or positions.dtype != torch.int64:
        return "it takes float32 tables and int64 positions"
    return native_float(backend, x) or native_float(backend, cos, sin)


@rope.backward(differentiable=True, without=("x",))  # linear: its backward is the operator itself
def _(operators, ctx, dy: Tensor):
    _, cos, sin, positions = ctx.saved_tensors
    return operators.rope(dy, cos, sin, positions, not ctx.rest["inverse"]), None, None, None, None


def tables(length: int, dim: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """cos and sin (length, dim/2) in fp32 of the angles position · theta^(−2i/dim), computed in fp64."""
    frequency = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return angle.cos().float(), angle.sin().float()


@rope.sampled
def samples() -> Iterator[Sample]:
    g = torch.Generator().manual_seed(0)

    def around(name: str, x: Tensor, bench: bool = False) -> Sample:
        b, t, _, d = x.shape
        cos, sin = tables(t + 3, d)
        positions = torch.randint(0, t + 3, (b, t), generator=g)
        n = x.numel()
        return Sample(name, (x, cos, sin, positions), grad=(0,), bench=bench, flops=6.0 * n, bytes=4.0 * 4 * n)

    def make(name: str, *shape: int, scale: float = 1.0, bench: bool = False) -> Sample:
        return around(name, torch.randn(*shape, generator=g, dtype=torch.float64) * scale, bench)

    yield make("small", 2, 3, 2, 8)
    yield make("odd", 3, 5, 1, 22)
    yield make("one", 1, 1, 1, 2)
    yield make("empty", 2, 0, 3, 4)
    yield make("prime", 1, 7, 5, 74)
    yield make("large", 1, 4, 2, 64, scale=1e4)
    fused = torch.randn(2, 5, (3 + 1 + 1) * 16, generator=g, dtype=torch.float64)  # q, k, v of one projection
    yield around("slice", fused[..., 48:64].unflatten(-1, (1, 16)))
    yield around("strided", torch.randn(2, 3, 5, 16, generator=g, dtype=torch.float64).transpose(1, 2))
    yield around("last", torch.randn(2, 16, 5, 3, generator=g, dtype=torch.float64).transpose(1, 3))
    yield from make("aligned", 1, 3, 2, 32).at_odd_addresses()
    yield from make("heads", 2, 3, 2, 16).far_apart((0, 0), (0, 1), (0, 2))
    yield make("bench", 4, 512, 9, 64, bench=True)
