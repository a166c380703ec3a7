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

from finetune.errors import UserError
from finetune.ops._backends import LIBRARY, NATIVE_PROBLEM, known, native_float
from finetune.ops._op import op
from finetune.ops._samples import Sample


@op
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
    counted = targets != ignore_index
    x = x.masked_fill(~counted[:, None], 0)
    logits = F.linear(x, weight).to(torch.promote_types(x.dtype, torch.float32))
    loss = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")
    if z_loss:
        loss = loss + z_loss * logits.logsumexp(-1).square().masked_fill(~counted, 0).sum()
    return loss / counted.sum().clamp(min=1) if reduction == "mean" else loss


@linear_cross_entropy.check
def _(reduction: str, **_) -> None:
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")


@linear_cross_entropy.supports
def _(backend: str, x: Tensor, weight: Tensor, **_) -> str | None:
    return native_float(backend, x, weight)


@linear_cross_entropy.operands
def _(x: Tensor, weight: Tensor, reduction: str, **_) -> dict[str, bool | None]:
    grad = torch.is_grad_enabled()
    wanted = {"x_grad": grad and x.requires_grad, "weight_grad": grad and weight.requires_grad}
    return wanted | {"mean": reduction == "mean", "bf16_matmul": None}


@linear_cross_entropy.fake()
def _(x: Tensor, weight: Tensor, x_grad: bool, weight_grad: bool, **_) -> tuple[Tensor, Tensor, Tensor]:
    (n_rows, n_cols), vocab = x.shape, weight.shape[0]
    dx, dweight = x.new_empty(n_rows if x_grad else 0, n_cols), weight.new_empty(vocab if weight_grad else 0, n_cols)
    return x.new_empty((), dtype=torch.float32), dx, dweight


def keep(ctx, inputs, output) -> tuple[Tensor, ...]:
    ctx.grads = output[1:]
    ctx.mark_non_differentiable(*output[1:])
    return ()


def again(mean: bool, **operands) -> Tensor:
    return linear_cross_entropy.by_reference(**operands, reduction="mean" if mean else "sum")


@linear_cross_entropy.backward(keep=keep, again=again)
def _(operators, ctx, dloss: Tensor, *_):
    # The gradients are handed out scaled in place, so that no second copy of dweight exists (nobody else has them: the
    # op drops them; a tracer's tensors are left alone). A second backward through the same graph (retain_graph)
    # computes them again.
    grads, ctx.grads = ctx.grads, None
    if grads is None:
        grads = operators.linear_cross_entropy(*ctx.saved_tensors, *ctx.rest.values())[1:]
    scaled = (grad.mul_(dloss) if type(grad) is Tensor else grad * dloss for grad in grads)
    wanted = ctx.rest["x_grad"], ctx.rest["weight_grad"]
    return *(grad if want else None for grad, want in zip(scaled, wanted, strict=True)), *(None,) * 7


def plan(n_rows: int, vocab: int) -> tuple[int, int, int]:
    """(rows of a chunk, tiles of the vocabulary, blocks of a chunk's rows) of the CPU kernel with fp32 products:
    LossPlan of csrc/include/finetune/linear_cross_entropy.h."""
    if NATIVE_PROBLEM:
        raise UserError(NATIVE_PROBLEM)
    if not known("finetune::linear_cross_entropy_plan"):
        raise UserError(f"{LIBRARY} is older than the sources: pip install -e . builds it again")
    return torch.ops.finetune.linear_cross_entropy_plan(n_rows, vocab, False)


@linear_cross_entropy.sampled
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
    yield make("aligned", 140, 136, 144, ignored=0.1)  # what cp.async takes; every stage of its pipeline twice
    yield make("wide", 3, 3, 8259)  # three tiles of the vocabulary on a GPU
    yield make("long", 4133, 2, 67, ignored=0.01, z_loss=1e-3)  # two chunks on a GPU
    yield from make("whole", 20, 64, 96).at_odd_addresses()
    yield make("bench frozen", 256, 576, 49152, grad=(0,), bench=True)
    yield make("bench trained", 256, 576, 49152, bench=True)
