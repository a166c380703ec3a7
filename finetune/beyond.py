"""What the samples of an op cannot ask of its CUDA kernel, each for one deliberate fault: tensors that reach over 2^32
elements (of which a few rows exist: sparse memory), and what the reference refuses. `finetune.faults` tries a fault's
case here before the samples; tests run every case without a fault, too.

A case is called with a backend and returns pairs of tensors that must agree to the bit, NaN with NaN.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable

import torch
from torch import Tensor

from finetune import ops
from finetune.ops.rope import tables

FAR = 1 << 32  # elements: an offset of 32 bits, signed or not, comes back to where it began
Case = Callable[[str], list[tuple[Tensor, Tensor]]]


def sparse(
    size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype = torch.float16, first: int = 0
) -> Tensor:
    """Zeros with these strides, from element `first` of new memory on; only the pages that are written take any."""
    elements = first + 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    memory = mmap.mmap(-1, elements * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=dtype).as_strided(size, stride, first)


def seen_as(values: Tensor, stride: tuple[int, ...], first: int = 0) -> Tensor:
    """The same values with other strides, in sparse memory."""
    return sparse(tuple(values.shape), stride, values.dtype, first).copy_(values)


def random(*size: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*size, generator=torch.Generator().manual_seed(sum(size))) * scale).half()


def far_attention(backend: str) -> list[tuple[Tensor, Tensor]]:
    q, k, v = random(2, 3, 1, 16), random(2, 5, 1, 16), random(2, 5, 1, 16, scale=2.0)
    far_q, far_k, far_v = (seen_as(x, (FAR, 16, 16, 1)) for x in (q, k, v))
    return [(ops.attention(far_q, far_k, far_v, backend=backend), ops.attention(q, k, v, backend=backend))]


def paged(k: Tensor, v: Tensor, backend: str) -> Tensor:
    """Two sequences of 7 tokens in blocks 1 and 0 of a cache (2, 7, 1, dim)."""
    table, lengths = torch.tensor([[1], [0]], dtype=torch.int32), torch.tensor([7, 7], dtype=torch.int32)
    out = ops.paged_attention(random(2, 1, k.shape[3]), k, v, table, lengths, backend=backend)
    assert isinstance(out, Tensor)
    return out


def far_paged_attention(backend: str) -> list[tuple[Tensor, Tensor]]:
    k, v = random(2, 7, 1, 16), random(2, 7, 1, 16, scale=2.0)
    far_k, far_v = (seen_as(x, (FAR, 16, 16, 1)) for x in (k, v))
    return [(paged(far_k, far_v, backend), paged(k, v, backend))]


def other_strides_of_v(backend: str) -> list[tuple[Tensor, Tensor]]:
    k, v = random(2, 7, 1, 16), random(2, 7, 1, 16, scale=2.0)
    return [(paged(k, seen_as(v, (7 * 16 + 48, 16, 16, 1)), backend), paged(k, v, backend))]


def odd_block_strides(backend: str) -> list[tuple[Tensor, Tensor]]:
    k, v = (seen_as(random(2, 7, 1, 16, scale=s), (7 * 16 + 8, 16, 16, 1)) for s in (1.0, 2.0))
    odd_k, odd_v = (seen_as(x, (7 * 16 + 3, 16, 16, 1)) for x in (k, v))
    return [(paged(odd_k, odd_v, backend), paged(k, v, backend))]


def far_linear_cross_entropy(backend: str) -> list[tuple[Tensor, Tensor]]:
    """The first and the last row count, which are 2^32 elements apart."""
    dim = 1 << 14
    rows, weight = random(2, dim), random(3, dim, scale=dim**-0.5)
    x = sparse((FAR // dim + 1, dim), (dim, 1))
    x[0], x[-1] = rows
    targets = torch.full((len(x),), -100)
    targets[0], targets[-1] = 1, 2
    want = ops.linear_cross_entropy(rows, weight, torch.tensor([1, 2]), reduction="sum", backend=backend)
    return [(ops.linear_cross_entropy(x, weight, targets, reduction="sum", backend=backend), want)]


def weight_from_an_odd_element(backend: str) -> list[tuple[Tensor, Tensor]]:
    x, weight, targets = random(5, 16), random(11, 16), torch.arange(5)
    got, want = (
        ops.linear_cross_entropy(x, w, targets, backend=backend) for w in (seen_as(weight, (16, 1), first=3), weight)
    )
    return [(got, want)]


def targets_outside_of_the_vocabulary(backend: str) -> list[tuple[Tensor, Tensor]]:
    x, weight, targets = random(5, 8), random(11, 8), torch.arange(5)
    bad = (targets.index_fill(0, torch.tensor(2), word) for word in (11, -1, 1 << 40))
    return [(ops.linear_cross_entropy(x, weight, t, backend=backend), torch.tensor(torch.nan)) for t in bad]


def tables_from_an_odd_element(backend: str) -> list[tuple[Tensor, Tensor]]:
    x, (cos, sin), positions = random(1, 5, 2, 16), tables(5, 16), torch.arange(5)[None]
    odd_cos, odd_sin = (seen_as(t, t.stride(), first=1) for t in (cos, sin))
    got = ops.rope(x, odd_cos, odd_sin, positions, backend=backend)
    return [(got, ops.rope(x, cos, sin, positions, backend=backend))]


CASES: dict[str, Case] = {
    "attention.offsets_of_32_bits": far_attention,
    "linear_cross_entropy.offsets_of_32_bits": far_linear_cross_entropy,
    "linear_cross_entropy.odd_base": weight_from_an_odd_element,
    "linear_cross_entropy.no_nan": targets_outside_of_the_vocabulary,
    "paged_attention.offsets_of_32_bits": far_paged_attention,
    "paged_attention.v_strides_of_k": other_strides_of_v,
    "paged_attention.odd_block_stride": odd_block_strides,
    "rope.odd_tables": tables_from_an_odd_element,
}
