"""Conversion between floating-point formats: float32, bfloat16, float16 and the 8-bit float8_e4m3fn and float8_e5m2.

    y = round(x · scale), in fp32 until the rounding

To nearest, ties to even, or stochastically (Gupta et al. 2015, arXiv:1502.02551, section 3.2): to one of the two
numbers of the format that enclose x·scale, the upper one with probability (x·scale − lower) / (upper − lower), which
keeps the mean. A number that is too large becomes infinity, or with `saturate` the largest finite number; float8_e4m3fn
has no infinity and saturates unless told otherwise (NaN then): in both as torch's own conversions do.

Random words come from Philox-4x32-10 (Salmon et al. 2011, SC'11): element i of the flattened x takes word i mod 4 of
the counter (i // 4, 0) under the key `seed`. So every backend gives the same bits, for any number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from finetune.ops._backends import wrong_device
from finetune.ops._op import op
from finetune.ops._samples import Sample

FORMATS = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)
# Exponent bits, mantissa bits, the bits of infinity (or of what replaces it) and of NaN.
LAYOUTS = {
    torch.bfloat16: (8, 7, 0x7F80, 0x7FC0),
    torch.float16: (5, 10, 0x7C00, 0x7E00),
    torch.float8_e4m3fn: (4, 3, 0x7F, 0x7F),
    torch.float8_e5m2: (5, 2, 0x7C, 0x7F),
}
WORD = 0xFFFFFFFF


@op
@torch.no_grad()
def cast(
    x: Tensor,
    dtype: torch.dtype,
    *,
    rounding: str = "nearest",
    seed: int = 0,
    scale: float | Tensor = 1.0,
    saturate: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """x of any shape and format → a contiguous tensor of `dtype`. It has no gradient.

    rounding: "nearest" or "stochastic", whose random words depend on `seed` only: give each call another one.
    scale: a number or a 0-d float32 tensor that multiplies x first. saturate: see above; None is torch's way.
    """
    saturate = dtype == torch.float8_e4m3fn if saturate is None else saturate
    wide = x.to(torch.float32) * (scale.float() if isinstance(scale, Tensor) else scale)
    if rounding == "nearest" or dtype == torch.float32:
        return round_nearest(wide, dtype, saturate)
    return round_stochastic(wide, dtype, seed, saturate)


def round_nearest(x: Tensor, dtype: torch.dtype, saturate: bool) -> Tensor:
    """fp32 x by torch's own conversion, which saturates for float8_e4m3fn and for nothing else."""
    largest = torch.finfo(dtype).max
    if saturate:
        return x.clamp(-largest, largest).to(dtype)
    if dtype == torch.float8_e4m3fn:
        x = torch.where(x.abs() > 464, torch.nan * x.sign(), x)  # 464 is between 448 and what would be 480
    return x.to(dtype)


def round_stochastic(x: Tensor, dtype: torch.dtype, seed: int, saturate: bool) -> Tensor:
    """fp32 x rounded to `dtype` on its bits: up where a random word / 2^32 is below what truncation loses."""
    exponent_bits, mantissa_bits, beyond, nan = LAYOUTS[dtype]
    bias, drop = 2 ** (exponent_bits - 1) - 1, 23 - mantissa_bits
    bits = x.contiguous().view(torch.int32).flatten().long() & WORD
    sign, size = (bits >> 31) << (exponent_bits + mantissa_bits), bits & 0x7FFFFFFF
    field = size >> 23
    exponent = torch.where(field > 0, field - 127, -126)
    normal = exponent >= 1 - bias
    mantissa = (size & 0x7FFFFF) + torch.where(field > 0, 0x800000, 0)
    value = torch.where(normal, size - (127 - bias << 23), mantissa)
    drops = torch.where(normal, drop, drop + 1 - bias - exponent).clamp(max=63)  # below 2^24, all is lost
    lost = value & (1 << drops.clamp(max=32)) - 1
    lost = torch.where(drops <= 32, lost << (32 - drops).clamp(min=0), lost >> (drops - 32).clamp(min=0))
    out = (value >> drops) + (random_words(x.numel(), seed, x.device) < lost)
    over = beyond - 1 if saturate else beyond
    out = torch.where((out >= beyond) | (size == 0x7F800000), over, out)
    out = sign | torch.where(size > 0x7F800000, nan, out)
    whole = torch.int16 if dtype.itemsize == 2 else torch.uint8
    return out.to(whole).view(dtype).view(x.shape)


def random_words(n: int, seed: int, device: torch.device) -> Tensor:
    """(n,) the words of elements 0 … n − 1."""
    groups = torch.arange(-(-n // 4), device=device)
    counter = torch.stack([groups & WORD, groups >> 32, groups * 0, groups * 0], 1)
    return philox(counter, seed).flatten()[:n]


def philox(counter: Tensor, seed: int, rounds: int = 10) -> Tensor:
    """counter (N, 4), words as int64 → (N, 4), the random words under the 64-bit key `seed`."""
    a, b, c, d = counter.unbind(1)
    keys = [seed & WORD, seed >> 32 & WORD]
    for _ in range(rounds):
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c  # of 64 bits: a sign does no harm to them
        a, b = (second >> 32 & WORD) ^ b ^ keys[0], second & WORD
        c, d = (first >> 32 & WORD) ^ d ^ keys[1], first & WORD
        keys = [keys[0] + 0x9E3779B9 & WORD, keys[1] + 0xBB67AE85 & WORD]
    return torch.stack([a, b, c, d], 1)


@cast.check
def _(dtype: torch.dtype, rounding: str, seed: int, **_) -> None:
    if dtype not in FORMATS:
        raise ValueError(f"cast: {dtype} is not one of {', '.join(map(str, FORMATS))}")
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"cast: rounding={rounding!r} is neither 'nearest' nor 'stochastic'")
    if not 0 <= seed < 2**63:
        raise ValueError(f"cast: seed={seed} is not within [0, 2^63)")


@cast.supports
def _(backend: str, x: Tensor, scale: float | Tensor, **_) -> str | None:
    if x.dtype not in FORMATS:
        return f"it takes float32, bfloat16, float16 and 8-bit floats, got {str(x.dtype).removeprefix('torch.')}"
    if isinstance(scale, Tensor) and scale.dtype != torch.float32:
        return "it takes a float32 scale"
    return wrong_device(backend, x, *([scale] if isinstance(scale, Tensor) else []))


@cast.operands
def _(x: Tensor, dtype: torch.dtype, rounding: str, scale: float | Tensor, saturate: bool | None, **_):
    number, tensor = (1.0, scale) if isinstance(scale, Tensor) else (float(scale), None)
    return {
        "x": x.view(torch.uint8) if x.dtype.itemsize == 1 else x,  # the operator sees 8-bit floats as uint8
        "given": FORMATS.index(x.dtype),
        "wanted": FORMATS.index(dtype),
        "scale": number,
        "scale_tensor": tensor,
        "stochastic": rounding == "stochastic" and dtype != torch.float32,
        "saturate": dtype == torch.float8_e4m3fn if saturate is None else saturate,
    }


@cast.results
def _(output: Tensor, dtype: torch.dtype, **_) -> Tensor:
    return output if output.dtype == dtype else output.view(dtype)


@cast.fake()
def _(x: Tensor, wanted: int, **_) -> Tensor:
    dtype = FORMATS[wanted]
    return x.new_empty(x.shape, dtype=torch.uint8 if dtype.itemsize == 1 else dtype)


@cast.sampled
def samples() -> Iterator[Sample]:
    g = torch.Generator().manual_seed(0)
    names = {dtype: str(dtype).removeprefix("torch.") for dtype in FORMATS}

    def make(name: str, *shape: int, to: torch.dtype, spread: float = 1.0, bench: bool = False, **kwargs) -> Sample:
        def given():
            x = torch.randn(*shape, generator=g, dtype=torch.float64)
            return x * (spread * torch.randn(*shape, generator=g, dtype=torch.float64)).exp(), to

        n = torch.Size(shape).numel()
        moved = (4.0 + to.itemsize) * n
        return Sample(name, given if bench else given(), kwargs, bench=bench, flops=15.0 * n, bytes=moved)

    for dtype in FORMATS:
        yield make(names[dtype], 7, 11, to=dtype, spread=4.0)
    for dtype in FORMATS[1:]:
        yield make(f"{names[dtype]} stochastic", 3, 301, to=dtype, spread=4.0, rounding="stochastic", seed=2**40 + 7)
    yield make("scaled", 33, to=torch.float8_e4m3fn, spread=3.0, scale=37.5)
    yield make("scaled by a tensor", 33, to=torch.float8_e5m2, spread=3.0, scale=torch.tensor(0.3))
    yield make("not saturating", 65, to=torch.float8_e4m3fn, spread=0.1, saturate=False)
    yield make("saturating", 65, to=torch.float8_e5m2, spread=9.0, saturate=True)
    yield make("saturating, stochastic", 65, to=torch.float16, spread=9.0, saturate=True, rounding="stochastic")
    yield make("one", 1, to=torch.float8_e5m2)
    yield make("empty", 0, 5, to=torch.float8_e4m3fn)
    yield make("many", 20001, to=torch.float8_e4m3fn, rounding="stochastic", seed=1)
    x = torch.randn(9, 6, generator=g, dtype=torch.float64)
    yield Sample("strided", (x.t(), torch.float8_e4m3fn), {"rounding": "stochastic"})
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-7, -1e-30, 464.0, 465.0, 61440.0, 3e38])
    for dtype in FORMATS[1:]:
        yield Sample(f"special to {names[dtype]}", (special.double(), dtype))
    wide = torch.randn(50, generator=g, dtype=torch.float64)
    for dtype in FORMATS[3:]:
        yield Sample(f"from {names[dtype]}", (wide.float().to(dtype), torch.float32), {"scale": 0.5})
    for dtype in FORMATS[1:]:
        yield from make(f"aligned to {names[dtype]}", 64, to=dtype).at_odd_addresses()
    yield from Sample("aligned", (wide[:48].float().to(FORMATS[3]), torch.float32)).at_odd_addresses()
    number = make("scaled", 64, to=torch.float16, scale=torch.tensor(0.3))
    yield from number.at_odd_addresses()
    yield make("bench e4m3", 2048, 2048, to=torch.float8_e4m3fn, bench=True)
    yield make("bench e5m2", 2048, 2048, to=torch.float8_e5m2, bench=True)
    yield make("bench float16", 2048, 2048, to=torch.float16, bench=True)
    yield make("bench stochastic", 1024, 1024, to=torch.bfloat16, rounding="stochastic", bench=True)
