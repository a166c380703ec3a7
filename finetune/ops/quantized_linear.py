"""Products with frozen weights in few bits: y = x Wᵀ + bias, where a weight is a code and what its group shares.

    fp32, bf16   W itself
    int8         W = scale · code                code −128 … 127
    int4         W = scale · code + minimum      code 0 … 15; without minima scale · (code − 8)
    nf4          W = scale · NF4[code]           Dettmers et al. 2023, arXiv:2305.14314

A group is `group` elements of a row of W (N, K) that follow each other; a group of K means one scale a row. What GGUF
files hold has the same form and the same values, without rounding: Q8_0 is int8 in groups of 32, Q6_K int8 in groups of
16 (its two scales multiplied), Q4_0 int4 without minima, Q4_1 int4, Q4_K int4 with fp32 scales.

Bytes: all of the weight once, whatever the number of rows of x; 2 · rows · N · K FLOPs. Up to about 16 rows of x memory
is the roof, so few bits are speed; above it the products are.

Accumulation is fp32. The CPU kernels use x as it is if it has fp32, and in bf16 too, but where there is AVX-512 with
VNNI int8 (with AMX int4 also) takes integers: a row of x becomes 16-bit ones of its largest magnitude / 32639, and the
sums over a group are then exact. NF4's values are rounded to bf16. Each row of the result depends on its own row of x
alone, to the bit: not on how many rows there are, nor on the threads.

On a GPU integers become x's type of 16 bits exactly, NF4's values are rounded to it, and scales multiply the fp32 sums
of groups. There, too, a row's bits are its own: up to 8, up to 32 and more rows have different tiles, but add in one
order (csrc/cuda/quantized_linear.cu). Only Triton's kernel has two regimes, up to 16 rows and more.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from finetune.ops import _fragments
from finetune.ops._backends import missing, native_float, wrong_device
from finetune.ops._op import Op
from finetune.ops._samples import Sample

FORMATS = {
    "fp32": "the weight itself in fp32",
    "bf16": "the weight itself in bf16",
    "int8": "8-bit integers with a scale a row or a group",
    "int4": "4-bit integers with a scale and a minimum a group of 32",
    "nf4": "4-bit quantiles of a normal distribution with a scale a group of 64",
}
NUMBER = {name: i for i, name in enumerate(FORMATS)}  # csrc/include/finetune/packed.h
GROUPS = {"int8": (16, 32), "int4": (32,), "nf4": (64,)}  # in addition to int8's whole row
PANEL, DEPTH = 16, 64  # rows of W that are interleaved; what K is padded to in the CPU's layout

# The 16 quantiles of N(0, 1), scaled to [-1, 1] and with an exact 0 (QLoRA, appendix E).
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight (N, K) in one of `FORMATS`. `rows` is the layout to make one in; `packed` makes that of a kernel.

    In rows: codes is (N, K) of float32, bfloat16 or int8, or (N, ⌈K / 2⌉) uint8, element 2i in the low half of byte i;
    scale and minimum (only int4's) are (N, ⌈K / group⌉) of float16 or float32.
    """

    format: str
    codes: Tensor
    scale: Tensor | None
    minimum: Tensor | None
    group: int  # elements of a row that share a scale; K: one scale a row (and where there is none)
    shape: tuple[int, int]  # (N, K)
    layout: str = "rows"  # or "cpu" (panels of 16 interleaved rows), "cuda"

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"quantized_linear: format {self.format!r} is not one of {', '.join(FORMATS)}")
        if self.layout == "rows":
            check_rows(self)

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in (self.codes, self.scale, self.minimum) if t is not None]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def to(self, device: str | torch.device) -> QuantizedWeight:
        """The same, elsewhere, in the layout that it has; itself if it is there."""
        return self if self.codes.to(device) is self.codes else self.mapped(lambda t: t.to(device))

    def mapped(self, function: Callable[[Tensor], Tensor], shape: tuple[int, int] | None = None) -> QuantizedWeight:
        """With `function` of each of its tensors, which may change the shape."""
        codes = function(self.codes)
        scale, minimum = (None if t is None else function(t) for t in (self.scale, self.minimum))
        return dataclasses.replace(self, codes=codes, scale=scale, minimum=minimum, shape=shape or self.shape)

    def packed(self, device: str | torch.device) -> QuantizedWeight:
        """On `device`, in the layout that the native kernels of such a device read."""
        kind = torch.device(device).type
        without = kind == "cuda" and missing("quantized_linear", "cuda")  # Triton's kernel reads rows
        return self.laid_out("rows" if without else kind).to(device)

    def laid_out(self, layout: str) -> QuantizedWeight:
        """The same weight in another of `LAYOUTS`."""
        if layout not in LAYOUTS:
            raise ValueError(f"quantized_linear: layout {layout!r} is not one of {', '.join(LAYOUTS)}")
        if layout == self.layout:
            return self
        return LAYOUTS[layout][0](LAYOUTS[self.layout][1](self))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(N, K). The products and sums are those of fp32, and rounded to `dtype` afterwards."""
        self = self.laid_out("rows")
        codes = codes_of(self)
        if self.scale is None:
            return codes.to(dtype)
        values = NF4.to(codes.device)[codes.int()] if self.format == "nf4" else codes.float()
        if self.format == "int4" and self.minimum is None:
            values = values - 8
        w = values * self.spread(self.scale)
        return (w if self.minimum is None else w + self.spread(self.minimum)).to(dtype)

    def rows(self, indices: Tensor) -> Tensor:
        """Some of the rows, (M,) → (M, K) fp32, bit for bit those of `dequantize`: the look-up of an embedding."""
        some = (len(indices), self.shape[1])
        if self.layout == "cpu":  # as panels of one row
            picked = self.mapped(lambda t: t[indices // PANEL, :, indices % PANEL].unsqueeze(2), some)
            return from_panels(picked).dequantize()
        return self.laid_out("rows").mapped(lambda t: t[indices], some).dequantize()

    def spread(self, of_groups: Tensor) -> Tensor:
        """(N, groups) → (N, K) fp32, or (N, 1) for one a row."""
        if of_groups.shape[1] == 1:
            return of_groups.float()
        return of_groups.float().repeat_interleave(self.group, 1)[:, : self.shape[1]]


def check_rows(weight: QuantizedWeight) -> None:
    """ValueError unless the tensors are what the format wants."""
    (n, k), name = weight.shape, weight.format
    integer = {"int8": torch.int8, "int4": torch.uint8, "nf4": torch.uint8}
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16} | integer
    columns = -(-k // 2) if name in ("int4", "nf4") else k
    if weight.codes.shape != (n, columns) or weight.codes.dtype != wanted[name]:
        raise ValueError(
            f"quantized_linear: the codes of {name} weights ({n}, {k}) are {[n, columns]} "
            f"{str(wanted[name]).removeprefix('torch.')}, got {[*weight.codes.shape]} {weight.codes.dtype}"
        )
    if (weight.scale is not None) != (name in integer) or (weight.minimum is not None and name != "int4"):
        raise ValueError(f"quantized_linear: int8, int4 and nf4 have scales and only int4 has minima, not {name}")
    if name not in integer:
        return
    if weight.group not in GROUPS[name] and not (name == "int8" and weight.group == k):
        raise ValueError(f"quantized_linear: {name} has groups of {GROUPS[name]}, got {weight.group}")
    shape = (n, -(-k // weight.group) if k else 0)
    for each in (t for t in (weight.scale, weight.minimum) if t is not None):
        if each.shape != shape or each.dtype not in (torch.float16, torch.float32):
            raise ValueError(
                f"quantized_linear: scales and minima of ({n}, {k}) in groups of {weight.group} are {[*shape]} float16 "
                f"or float32, got {[*each.shape]} {each.dtype}"
            )
    if weight.minimum is not None and weight.scale is not None and weight.minimum.dtype != weight.scale.dtype:
        raise ValueError("quantized_linear: scales and minima need one dtype")


def codes_of(weight: QuantizedWeight) -> Tensor:
    """(N, K) codes of a weight in rows, one an element."""
    if weight.format not in ("int4", "nf4"):
        return weight.codes
    return torch.stack([weight.codes & 15, weight.codes >> 4], -1).flatten(1)[:, : weight.shape[1]]


def halves(codes: Tensor) -> Tensor:
    """(N, K) codes of 4 bits → (N, ⌈K / 2⌉), two in a byte as `QuantizedWeight` wants them."""
    codes = F.pad(codes, (0, codes.shape[1] % 2))
    return codes[:, ::2] | codes[:, 1::2] << 4


def dense(weight: Tensor) -> QuantizedWeight:
    """A weight (N, K) in fp32 or bf16 as it is."""
    name = {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(weight.dtype)
    if name is None or weight.dim() != 2:
        raise ValueError(f"quantized_linear: expected (N, K) float32 or bfloat16, got {weight.dtype}")
    return QuantizedWeight(name, weight, None, None, weight.shape[1], (weight.shape[0], weight.shape[1]))


def nf4(codes: Tensor, absmax: Tensor, shape: tuple[int, int]) -> QuantizedWeight:
    """The NF4 of bitsandbytes and finetune/peft/quantize.py: codes (N · K / 2,) with the first element in the high
    half, absmax (N · K / 64,). K must be a multiple of 64, for a block may not end in another row."""
    n, k = shape
    if k % 64:
        raise ValueError(f"quantized_linear: blocks of 64 do not fit into rows of {k}")
    swapped = (codes << 4 | codes >> 4).view(n, k // 2)
    return QuantizedWeight("nf4", swapped, absmax.float().view(n, k // 64), None, 64, shape)


def scale_group(weight: QuantizedWeight) -> int:
    """Elements that share a scale; 0 of a scale a row, or none. A 4-bit row as long as its group has a group."""
    whole = weight.group == weight.shape[1] and weight.format not in ("int4", "nf4")
    return 0 if whole else weight.group


# --- the CPU's layout: panels of 16 rows, K padded to a multiple of 64. A panel holds, for each step along K, one
# 32-bit word a row: 1 element of fp32, 2 of bf16, 4 of int8 (+ 128), 8 of 4 bits (elements 0 … 3 in the low halves of
# the four bytes, 4 … 7 in the high ones). Scales are (panels, groups, 16).


def to_panels(weight: QuantizedWeight) -> QuantizedWeight:
    n, k = weight.shape
    rows, depth = -n % PANEL, -k % DEPTH
    codes = F.pad(codes_of(weight), (0, depth, 0, rows))
    if weight.format in ("int4", "nf4"):
        words = codes.view(-1, PANEL, (k + depth) // 8, 2, 4)
        codes = (words[..., 0, :] | words[..., 1, :] << 4).transpose(1, 2)  # (panels, steps, 16, 4)
    else:
        each = {"fp32": 1, "bf16": 2, "int8": 4}[weight.format]
        codes = codes.view(torch.uint8) ^ 128 if weight.format == "int8" else codes
        codes = codes.view(-1, PANEL, (k + depth) // each, each).transpose(1, 2)
    groups = (k + depth) // group if (group := scale_group(weight)) else 1

    def scales(of_groups: Tensor | None) -> Tensor | None:
        if of_groups is None:
            return None
        padded = F.pad(of_groups, (0, groups - of_groups.shape[1], 0, rows))
        return padded.view(-1, PANEL, groups).transpose(1, 2).contiguous()

    packed = (codes.contiguous(), scales(weight.scale), scales(weight.minimum))
    return dataclasses.replace(weight, codes=packed[0], scale=packed[1], minimum=packed[2], layout="cpu")


def from_panels(weight: QuantizedWeight) -> QuantizedWeight:
    n, k = weight.shape
    words = weight.codes.transpose(1, 2)  # (panels, 16, steps, elements a word)
    if weight.format in ("int4", "nf4"):
        codes = halves(torch.stack([words & 15, words >> 4], 3).flatten(0, 1).flatten(1)[:n, :k])
    else:
        codes = words.flatten(0, 1).flatten(1)[:n, :k]
        codes = (codes ^ 128).view(torch.int8) if weight.format == "int8" else codes
    groups = -(-k // weight.group) if k else 0

    def scales(of_groups: Tensor | None) -> Tensor | None:
        return None if of_groups is None else of_groups.transpose(1, 2).flatten(0, 1)[:n, :groups].contiguous()

    return QuantizedWeight(
        weight.format, codes.contiguous(), scales(weight.scale), scales(weight.minimum), weight.group, weight.shape
    )


# --- the layout of GPUs: _fragments.py


def to_fragments(weight: QuantizedWeight) -> QuantizedWeight:
    codes, scale = _fragments.pack(codes_of(weight), weight.format), None
    if weight.scale is not None:
        scale = _fragments.pack_scales(weight.scale, weight.minimum, weight.shape[1], scale_group(weight))
    return dataclasses.replace(weight, codes=codes, scale=scale, minimum=None, layout="cuda")


def from_fragments(weight: QuantizedWeight) -> QuantizedWeight:
    codes, scale, minimum = _fragments.unpack(weight.codes, weight.format, *weight.shape), None, None
    if weight.scale is not None:
        scale, minimum = _fragments.unpack_scales(weight.scale, *weight.shape, scale_group(weight))
    codes = halves(codes) if weight.format in ("int4", "nf4") else codes
    return dataclasses.replace(weight, codes=codes, scale=scale, minimum=minimum, layout="rows")


# layout → (from rows, to rows)
LAYOUTS: dict[str, tuple[Callable[[QuantizedWeight], QuantizedWeight], Callable[[QuantizedWeight], QuantizedWeight]]]
LAYOUTS = {
    "rows": (lambda w: w, lambda w: w),
    "cpu": (to_panels, from_panels),
    "cuda": (to_fragments, from_fragments),
}


def huge(size: int) -> Tensor:
    """(size,) uint8 zeros in memory that begins at a multiple of 2 MB, in huge pages where the system gives them.

    Packed weights are read fastest from one such piece, in the order of use: a page of 4 KB takes a look-up and ends
    the hardware's prefetching.
    """
    page = 1 << 21
    memory = mmap.mmap(-1, size + page)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    flat = torch.frombuffer(memory, dtype=torch.uint8)
    start = -flat.data_ptr() % page
    return flat[start : start + size]


# --- the op


class PackedOp(Op[..., Tensor]):
    """An op whose weight is brought into the layout that the library's kernels read, if it is not: a weight that is
    used more than once should be `packed` once."""

    def run_operator(self, library: str, given: dict[str, Any]) -> Any:
        return super().run_operator(library, given | {"weight": fitting(library, **given)})

    def overload(self, library: str, *args: Any, **kwargs: Any) -> tuple[Any, tuple[Any, ...]]:
        given = self.bind(args, kwargs)
        operator, values = self.operands_of(given | {"weight": fitting(library, **given)})
        return getattr(getattr(torch.ops, library), operator).default, tuple(values)


def fitting(library: str, x: Tensor, weight: QuantizedWeight, **_: Any) -> QuantizedWeight:
    """The weight in the layout that the kernels of a library read."""
    if library == "finetune_triton":
        return weight.laid_out("rows")
    return weight.laid_out("cpu" if library == "finetune" and not x.is_cuda else "cuda")


def reference(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """x (..., K) float32 or bfloat16, weight (N, K), bias (N,) of x's dtype → (..., N) like x. No gradients."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = F.linear(x.to(wide), weight.dequantize(wide), None if bias is None else bias.to(wide))
    return y.to(x.dtype)


reference.__name__ = "quantized_linear"
quantized_linear = PackedOp(reference)


@quantized_linear.check
def _(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, **_) -> None:
    n, k = weight.shape
    if x.dim() < 1 or x.shape[-1] != k or (bias is not None and bias.shape != (n,)):
        raise ValueError(
            f"quantized_linear: x must be (..., {k}) and bias ({n},) for a weight ({n}, {k}), got {[*x.shape]}"
            + ("" if bias is None else f" and {[*bias.shape]}")
        )


@quantized_linear.supports
def _(backend: str, x: Tensor, weight: QuantizedWeight, bias: Tensor | None, **_) -> str | None:
    if reason := native_float(backend, x, bias):
        return reason
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias)):
        return "it has no backward pass"
    return wrong_device(backend, x, *weight.tensors)


@quantized_linear.operands
def _(weight: QuantizedWeight, **_) -> dict[str, Any]:
    n = weight.shape[0]
    return {
        "codes": weight.codes,
        "scale": weight.scale,
        "minimum": weight.minimum,
        "format": NUMBER[weight.format],
        "rows": n,
        "group": scale_group(weight),
    }


@quantized_linear.fake()
def _(x: Tensor, rows: int, **_) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


# --- samples


def random_weight(
    name: str, n: int, k: int, g: torch.Generator, group: int | None = None, minima: bool = True, half: bool = True
) -> QuantizedWeight:
    """Random codes with scales that make weights of about 1 / √K."""
    size = 1 / math.sqrt(max(k, 1))
    if name in ("fp32", "bf16"):
        return dense((torch.randn(n, k, generator=g) * size).to(torch.float32 if name == "fp32" else torch.bfloat16))
    group = group or {"int8": k, "int4": 32, "nf4": 64}[name]
    groups, dtype = (-(-k // group) if k else 0), torch.float16 if half else torch.float32
    scale = (0.5 + torch.rand(n, groups, generator=g)) * size / {"int8": 64, "int4": 4, "nf4": 0.5}[name]
    minimum = (-7.5 * scale + 0.1 * size * torch.randn(n, groups, generator=g)).to(dtype)
    if name == "int8":
        codes = torch.randint(-128, 128, (n, k), generator=g, dtype=torch.int8)
        return QuantizedWeight(name, codes, scale.to(dtype), None, group, (n, k))
    codes = halves(torch.randint(0, 16, (n, k), generator=g, dtype=torch.uint8))
    least = minimum if name == "int4" and minima else None
    return QuantizedWeight(name, codes, scale.to(dtype), least, group, (n, k))


@quantized_linear.sampled
def samples() -> Iterator[Sample]:
    g = torch.Generator().manual_seed(0)

    def make(
        name: str, format: str, n: int, k: int, *rows: int, bias: bool = False, size: float = 1.0,
        dtype: torch.dtype = torch.float64, **how: Any,
    ) -> Sample:  # fmt: skip
        weight = random_weight(format, n, k, g, **how)
        x = (torch.randn(*rows, k, generator=g, dtype=torch.float64) * size).to(dtype)
        return Sample(name, (x, weight, torch.randn(n, generator=g, dtype=torch.float64)) if bias else (x, weight))

    def bench(format: str, n: int, k: int, rows: int) -> Sample:
        """Made when it is asked for: the weights of a head are large."""

        def given() -> tuple[Tensor, QuantizedWeight]:
            fresh = torch.Generator().manual_seed(0)
            return torch.randn(rows, k, generator=fresh, dtype=torch.float64), random_weight(format, n, k, fresh)

        bits = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 5, "nf4": 4.25}[format]
        moved = n * k * bits / 8 + 4.0 * rows * (n + k)
        what = "head" if n > 10000 else "mlp"
        return Sample(f"bench {format}, {what}, {rows}", given, bench=True, flops=2.0 * n * k * rows, bytes=moved)

    yield make("fp32", "fp32", 24, 40, 3)
    yield make("bf16", "bf16", 24, 40, 3, bias=True)
    yield make("int8", "int8", 33, 70, 2, 2, bias=True, half=False)
    yield make("int8 in groups of 32", "int8", 33, 96, 5, group=32)
    yield make("int8 in groups of 16", "int8", 16, 72, 3, group=16, half=False)
    yield make("int4", "int4", 40, 128, 4)
    yield make("int4 without minima", "int4", 17, 64, 3, minima=False)
    yield make("int4, fp32 scales", "int4", 17, 64, 1, half=False)
    yield make("nf4", "nf4", 20, 192, 3, half=False)
    yield make("one", "int8", 1, 1, 1)
    yield make("odd fp32", "fp32", 37, 37, 19, bias=True)
    yield make("odd bf16", "bf16", 37, 37, 19)
    yield make("odd int8", "int8", 37, 37, 19)
    yield make("odd int4", "int4", 37, 37, 19, bias=True)
    yield make("odd nf4", "nf4", 37, 37, 19)
    yield make("many rows", "bf16", 50, 64, 67)
    yield make("many rows int4", "int4", 50, 96, 67)
    yield make("many rows int8", "int8", 50, 96, 67, half=False, group=16)
    yield make("many rows nf4", "nf4", 50, 96, 67)
    yield make("deep", "int4", 40, 1400, 3, dtype=torch.bfloat16)  # all stages of a GPU's copies several times
    yield make("deep int8", "int8", 33, 1400, 2, group=16, dtype=torch.bfloat16)
    yield make("deep, some rows", "int4", 70, 552, 21, half=False)
    yield make("deep, many rows", "int4", 140, 552, 70, bias=True, minima=False)  # several blocks either way
    yield make("large", "int8", 20, 64, 4, size=1e4, group=32)
    yield make("tiny", "int4", 20, 64, 4, size=1e-20)
    yield make("no rows", "int4", 16, 64, 0)
    yield make("no output", "bf16", 0, 64, 3)
    x = torch.randn(64, 5, generator=g, dtype=torch.float64).t()
    yield Sample("strided", (x, random_weight("int8", 32, 64, g)))
    uneven = torch.tensor([1e-30, 0.0, 1.0, 1e3], dtype=torch.float64)[:, None]
    yield Sample("uneven rows", (torch.randn(4, 64, generator=g, dtype=torch.float64) * uneven,
                                 random_weight("int4", 32, 64, g)))  # fmt: skip
    yield from make("aligned bf16", "bf16", 32, 64, 3, bias=True).at_odd_addresses()
    yield from make("aligned int4", "int4", 32, 64, 3, bias=True).at_odd_addresses()
    yield from make("far int8", "int8", 32, 64, 3).far_apart((0, 0))
    yield from make("far int4", "int4", 32, 64, 3).far_apart((0, 0))

    for format in FORMATS:
        yield bench(format, 49152, 576, 1)
    for format in ("bf16", "int8", "int4"):
        yield bench(format, 49152, 576, 8)
        yield bench(format, 1536, 576, 512)
