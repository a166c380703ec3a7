"""Projection onto the vocabulary and cross-entropy in one op; the logits of all tokens never exist at once.

    logits = x · weightᵀ                       (N, V), a chunk of tokens at a time
    loss_i = logsumexp(logits_i) − logits_i[targets_i] + z_loss · logsumexp(logits_i)²
    loss   = Σ loss_i over the targets that are not ignore_index, divided by their number for "mean"

Chunked as in Liger-Kernel (Hsu et al. 2024, arXiv:2410.10989): each chunk's gradients are made in the forward pass,
while its logits are there, and scaled by the incoming gradient in the backward pass. z-loss: PaLM, arXiv:2204.02311.
A row whose target is ignored adds exactly 0 to loss and gradients, whatever it holds, NaN and infinity too, and gets
gradient 0. If every target is ignored, the loss is 0.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from finetune.ops._library import Library
from finetune.ops._op import Native, Op, Sample, native_float


def reference(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    counted = targets != ignore_index
    x = x.masked_fill(~counted[:, None], 0)
    logits = F.linear(x, weight).to(torch.promote_types(x.dtype, torch.float32))
    loss = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")
    if z_loss:
        loss = loss + z_loss * logits.logsumexp(-1).square().masked_fill(~counted, 0).sum()
    return loss / counted.sum().clamp(min=1) if reduction == "mean" else loss


def overload(x, weight, targets, *, ignore_index=-100, z_loss=0.0, reduction="mean"):
    grad = torch.is_grad_enabled()
    wanted = (grad and x.requires_grad, grad and weight.requires_grad)
    return "linear_cross_entropy", (x, weight, targets, ignore_index, z_loss, reduction == "mean", *wanted, None)


def native(operators, *args, **kwargs) -> Tensor:
    name, arguments = overload(*args, **kwargs)
    return getattr(operators, name)(*arguments)[0]


def supports(backend: str, x: Tensor, weight: Tensor, targets: Tensor, **_) -> str | None:
    return native_float(backend, x, weight)


def register(library: Library) -> None:
    operators = library.operators

    @library.fake("linear_cross_entropy")
    def _(x, weight, targets, ignore_index, z_loss, mean, x_grad, weight_grad, bf16_matmul):
        dim = x.shape[1]
        dx = x.new_empty(x.shape[0] if x_grad else 0, dim)
        dweight = weight.new_empty(weight.shape[0] if weight_grad else 0, dim)
        return x.new_empty((), dtype=torch.float32), dx, dweight

    def keep(ctx, inputs, output):
        ctx.grads = output[1:]
        ctx.mark_non_differentiable(*output[1:])
        return ()

    def backward(ctx, dloss, *_):
        # The gradients are handed out scaled in place, so that no second copy of dweight exists (only native() above
        # sees them otherwise, and it drops them; a tracer's tensors are left alone). A second backward through the same
        # graph (retain_graph) makes them anew.
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            grads = operators.linear_cross_entropy(*ctx.saved_tensors, *ctx.rest.values())[1:]
        scaled = (grad.mul_(dloss) if type(grad) is Tensor else grad * dloss for grad in grads)
        wanted = ctx.rest[6], ctx.rest[7]  # x_grad and weight_grad
        return *(grad if want else None for grad, want in zip(scaled, wanted, strict=True)), *(None,) * 7

    def again(x, weight, targets, ignore_index, z_loss, mean, *_):
        reduction = "mean" if mean else "sum"
        return reference(x, weight, targets, ignore_index=ignore_index, z_loss=z_loss, reduction=reduction), None, None

    library.derivative("linear_cross_entropy", backward, keep=keep, again=again)


def samples() -> Iterator[Sample]:
    g = torch.Generator().manual_seed(0)

    def make(name, n, dim, vocab, ignored=0.0, scale=1.0, grad=(0, 1), bench=False, **kwargs) -> Sample:
        def args():
            x = torch.randn(n, dim, generator=g, dtype=torch.float64) * scale
            weight = torch.randn(vocab, dim, generator=g, dtype=torch.float64) * dim**-0.5
            targets = torch.randint(vocab, (n,), generator=g)
            out = torch.rand(n, generator=g) < ignored
            targets[out] = kwargs.get("ignore_index", -100)
            if not bench:
                x[targets == kwargs.get("ignore_index", -100)] = torch.nan
            return x, weight, targets

        flops = 2.0 * n * dim * vocab * (1 + len(grad))
        traffic = 4.0 * (2 * n * dim + vocab * dim * (2 if 1 in grad else 1))
        given = args if bench else args()
        return Sample(name, given, kwargs, grad=grad, bench=bench, flops=flops, bytes=traffic)

    yield make("small", 5, 8, 11)
    yield make("sum", 7, 16, 33, reduction="sum")
    yield make("ignored", 13, 8, 37, ignored=0.5)
    yield make("all ignored", 4, 8, 11, ignored=2.0)
    yield make("ignore index", 9, 8, 10, ignored=0.5, ignore_index=3)
    yield make("z-loss", 6, 24, 129, ignored=0.3, z_loss=1e-2)
    yield make("frozen weight", 5, 16, 31, grad=(0,))
    yield make("one", 1, 1, 1)
    yield make("empty", 0, 8, 11)
    yield make("large logits", 6, 16, 2100, scale=1e4)
    yield make("aligned", 70, 72, 144, ignored=0.1)  # what cp.async takes
    yield make("wide", 3, 3, 8259)  # two tiles of the vocabulary on a GPU
    yield make("long", 1061, 2, 67, ignored=0.01, z_loss=1e-3)  # two chunks on a GPU
    yield from make("whole", 20, 64, 96).at_odd_addresses()
    yield make("bench frozen", 256, 576, 49152, grad=(0,), bench=True)
    yield make("bench trained", 256, 576, 49152, bench=True)


op = Op("linear_cross_entropy", reference, Native(native, overload, supports, register), samples)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """x (N, C) and weight (V, C) of one dtype, targets (N,) int64 in [0, V) or ignore_index → scalar float32.

    reduction: "mean" over the targets that count, or "sum". Rows with ignore_index cost no matrix product. Gradients
    for x and weight; a weight that needs none costs neither its product nor its memory.
    A target outside the vocabulary raises an error that names its position; on a GPU, where the host would have to wait
    for that, it makes the loss NaN.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    return op(x, weight, targets, ignore_index=ignore_index, z_loss=z_loss, reduction=reduction, backend=backend)
