"""The L2 norm of many tensors together:  sqrt(Σ over all tensors of x²), without changing them.

As torch.nn.utils.get_total_norm. For clipping in the optimizer's own sweep: adamw_(…, grad_scale=(max_norm /
(norm + 1e-6)).clamp(max=1)).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from finetune.ops._backends import wrong_device
from finetune.ops._lists import tensors_of
from finetune.ops._op import op
from finetune.ops._samples import SMOLLM2_BLOCK, Sample

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@op
@torch.no_grad()
def global_norm(tensors: Tensor | Iterable[Tensor], *, backend: str | None = None) -> Tensor:
    """The L2 norm of float32, bfloat16 and float16 tensors as if they were one: 0-d float32, on their device. Of
    parameters it is the norm of the weights, as torch.nn.utils.get_total_norm's.

    The same bits at every call, and for any number of threads. The host waits for nothing.
    """
    norms = [t.to(torch.promote_types(t.dtype, torch.float32)).norm() for t in tensors]
    return torch.stack(norms).norm() if norms else torch.zeros(())


@global_norm.check
def _(tensors: Tensor | Iterable[Tensor]) -> dict[str, list[Tensor]]:
    return {"tensors": tensors_of("global_norm", "tensors", tensors)}


def takes_floats(backend: str, tensors: Sequence[Tensor]) -> str | None:
    if wrong := {t.dtype for t in tensors} - {*FLOATS}:
        return f"it takes float32, bfloat16 and float16, got {str(wrong.pop()).removeprefix('torch.')}"
    return wrong_device(backend, *tensors)


global_norm.supports(takes_floats)


@global_norm.fake()
def _(tensors: list[Tensor]) -> Tensor:
    return tensors[0].new_empty((), dtype=torch.float32)


@global_norm.sampled
def samples() -> Iterator[Sample]:
    g = torch.Generator().manual_seed(0)

    def make(name: str, shapes, scale: float = 1.0, bench: bool = False) -> Sample:
        def args():
            return ([torch.randn(*shape, generator=g, dtype=torch.float64) * scale for shape in shapes],)

        n = sum(math.prod(shape) for shape in shapes)
        return Sample(name, args if bench else args(), bench=bench, flops=2.0 * n, bytes=4.0 * n)

    yield make("small", [(3, 4), (5,), (2, 3, 5)])
    yield make("odd", [(1031,), (1,)])
    yield make("pieces", [(3, 16384), (40003,), (17,)])
    yield make("many", [(3,)] * 170)
    yield make("large", [(101,)], scale=1e4)
    yield make("zero", [(9,), (2, 2)], scale=0.0)
    yield make("empty", [(0, 3), (7,)])
    yield Sample("strided", ([torch.randn(7, 9, generator=g, dtype=torch.float64).t()],))
    yield from make("aligned", [(64,), (4, 32)]).at_odd_addresses()
    yield make("bench", SMOLLM2_BLOCK * 16, bench=True)
