"""The paged key–value cache (Kwon et al. 2023, arXiv:2309.06180, §4): a pool of blocks, (blocks, block_size, Hkv, D)
for the keys and again for the values of a layer, of which each sequence owns those that its block table names.

    append:  slot = block · block_size + offset;  cache[slot] = x[i] for every new token i with slot >= 0
    gather:  y[b, j] = cache[table[b, j // block_size], j % block_size] for j < lengths[b], else 0
    copy:    cache[destination] = cache[source] for pairs of blocks (copy-on-write of shared ones)

A cache has the dtype of its tokens, or 8 bits: int8 or float8_e4m3fn with one fp32 scale a token and head, so that a
new token never rescales an old one:

    scale = max|x| / largest (127 or 448),   stored = round(x / scale), ties to even; 0 where scale is 0 or not finite

in fp32 whatever the dtype. A token that is not finite comes back as NaN. Bytes of a token, all layers:
2 · layers · Hkv · D · bytes of the dtype, or with 8 bits 2 · layers · Hkv · (D + 4) (finetune/memory/activations.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from finetune.ops._backends import native_float, wrong_device
from finetune.ops._op import Op, Parameters
from finetune.ops._samples import Sample

P = ParamSpec("P")
R = TypeVar("R")

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def pool(
    blocks: int, block_size: int, kv_heads: int, dim: int, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> tuple[Tensor, Tensor | None]:
    """An empty cache (blocks, block_size, Hkv, D), and its scales (blocks, block_size, Hkv) if it has 8 bits."""
    cache = torch.zeros(blocks, block_size, kv_heads, dim, dtype=dtype, device=device)
    return cache, torch.zeros(cache.shape[:3], device=device) if dtype in LARGEST else None


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x (..., D) as `dtype` (one of `LARGEST`), and the fp32 scales (...)."""
    x = x.float()
    scale = x.abs().amax(-1) / LARGEST[dtype]
    usable = ((scale > 0) & scale.isfinite())[..., None]
    y = torch.where(usable, x / scale[..., None], 0).clamp(-LARGEST[dtype], LARGEST[dtype])
    return (y.round() if dtype == torch.int8 else y).to(dtype), scale


def dequantize(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if scale is None else x.to(dtype) * scale.to(dtype)[..., None]


def raw(cache: Tensor) -> Tensor:
    """float8_e4m3fn as uint8: torch moves it everywhere."""
    return cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache


def result_dtype(cache: Tensor) -> torch.dtype:
    return torch.float32 if cache.dtype in LARGEST else cache.dtype


class CacheOp(Op[..., Any]):
    """An op of several operators. Its first argument names the one that runs: "append", "gather" or "copy"."""

    def __init__(self) -> None:
        def reference(what: str, *args: Any, **kwargs: Any) -> Any:
            return self.definitions[what](*args, **kwargs)

        super().__init__(reference, "kv_cache")
        self.definitions: dict[str, Callable[..., Any]] = {}
        self.parts: dict[str, tuple[str, Parameters]] = {}  # operator, parameters
        self.operators = []

    def part(self, what: str, operator: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Decorates the definition of `what`: its name becomes the function that calls the op."""

        def store(definition: Callable[P, R]) -> Callable[P, R]:
            self.definitions[what], self.parts[what] = definition, (operator, Parameters(definition))
            self.operators.append(operator)

            @functools.wraps(definition)
            def call(*args: P.args, **kwargs: P.kwargs) -> R:
                return self(what, *args, **kwargs)

            return call

        return store

    def bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        what, *rest = args
        return {"what": what} | self.parts[what][1].bind(rest, kwargs)

    def operator_of(self, given: dict[str, Any]) -> str:
        return self.parts[given["what"]][0]


kv_cache = CacheOp()


@kv_cache.part("append", "kv_cache_")
def kv_cache_append_(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    backend: str | None = None,
) -> None:
    """Writes k, v (tokens, Hkv, D) into the pools (blocks, block_size, Hkv, D) at slots (tokens,), in place.

    A negative slot is skipped; the others must be distinct and inside the pool (the CPU kernels refuse those outside,
    the GPU kernels, which cannot wait for the answer, skip them). Caches of int8 or float8_e4m3fn need their scales.
    """
    kept = slots >= 0
    block, offset = slots[kept] // k_cache.shape[1], slots[kept] % k_cache.shape[1]
    for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        if scale is None:
            cache[block, offset] = x[kept].to(cache.dtype)
        else:
            stored, scales = quantize(x[kept], cache.dtype)
            raw(cache)[block, offset], scale[block, offset] = raw(stored), scales.to(scale.dtype)


@kv_cache.part("gather", "kv_cache_gather")
def kv_cache_gather(
    cache: Tensor,
    table: Tensor,
    lengths: Tensor,
    scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """cache (blocks, block_size, Hkv, D), table (B, max_blocks), lengths (B,) → (B, max_blocks · block_size, Hkv, D).

    Zeros from lengths[b] on; entries of the table behind the last token are never looked at. dtype: that of the result
    of a cache with 8 bits (float32).
    """
    block_size = cache.shape[1]
    j = torch.arange(table.shape[1] * block_size, device=table.device)
    seen = j < lengths[:, None]  # (B, T)
    block = torch.where(seen, table.repeat_interleave(block_size, 1), 0).long()
    if not cache.shape[0]:
        return cache.new_zeros(*seen.shape, *cache.shape[2:], dtype=dtype or result_dtype(cache))
    at = (block, (j % block_size).expand_as(block))
    wide = torch.promote_types(torch.float32 if scale is None else scale.dtype, torch.float32)
    x = raw(cache)[at].view(cache.dtype)  # (B, T, Hkv, D)
    x = x if scale is None else dequantize(x, scale[at], wide)
    return torch.where(seen[..., None, None], x, 0).to(dtype or result_dtype(cache))


@kv_cache.part("copy", "kv_cache_copy_")
def kv_cache_copy_(caches: Sequence[Tensor], pairs: Tensor, *, backend: str | None = None) -> None:
    """Copies block pairs[i, 0] to block pairs[i, 1] (pairs (n, 2) int64) in each of `caches`, which may be those of all
    layers, and scales. The destinations must be distinct, and no source among them."""
    for cache in caches:
        raw(cache)[pairs[:, 1]] = raw(cache)[pairs[:, 0]]


@kv_cache.supports
def _(backend: str, what: str, **given: Any) -> str | None:
    if torch.is_grad_enabled():
        tensors = [t for value in given.values() for t in (value if isinstance(value, (list, tuple)) else [value])]
        if any(isinstance(t, Tensor) and t.requires_grad for t in tensors):
            return "it has no backward pass"
    if what == "copy":
        return wrong_device(backend, *given["caches"]) or contiguous_blocks(*given["caches"])
    names = {"append": ("k_cache", "v_cache"), "gather": ("cache",)}[what]
    caches, tokens = [given[name] for name in names], [given[name] for name in ("k", "v") if name in given]
    if reason := native_float(backend, *tokens, *(c for c in caches if c.dtype not in LARGEST)):
        return reason
    if what == "gather" and caches[0].dtype in LARGEST:
        result = torch.empty(0, dtype=given["dtype"] or torch.float32, device=caches[0].device)
        if reason := native_float(backend, result):
            return f"of the result: {reason}"
    return wrong_device(backend, *caches) or contiguous_blocks(*caches)


def contiguous_blocks(*caches: Tensor) -> str | None:
    """A block's tokens must be adjacent; the blocks may lie apart."""
    if all(cache.is_contiguous() or cache[:1].is_contiguous() for cache in caches):
        return None
    return "it takes caches whose blocks are contiguous"


@kv_cache.operands
def _(what: str, **given: Any) -> dict[str, Any]:
    operands: dict[str, Callable[..., dict[str, Any]]]
    operands = {"append": append_operands, "gather": gather_operands, "copy": copy_operands}
    return operands[what](**given)


def append_operands(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, k_scale, v_scale):
    if k_cache.dim() != 4 or k.shape != v.shape or k_cache.shape != v_cache.shape or k.shape[1:] != k_cache.shape[2:]:
        raise ValueError(
            f"kv_cache: k and v must be (tokens, Hkv, D) and the caches (blocks, block_size, Hkv, D), got "
            f"{[*k.shape]}, {[*v.shape]} and {[*k_cache.shape]}, {[*v_cache.shape]}"
        )
    check_scale("kv_cache", k_cache, k_scale)
    check_scale("kv_cache", v_cache, v_scale)
    slots = as_integers("kv_cache: slots", slots, torch.int64)
    return {"k_cache": raw(k_cache), "v_cache": raw(v_cache), "slots": slots}


def gather_operands(cache: Tensor, table: Tensor, lengths: Tensor, scale: Tensor | None, dtype: torch.dtype | None):
    check_scale("kv_cache", cache, scale)
    return {
        "cache": raw(cache),
        "table": as_integers("kv_cache: table", table, torch.int32),
        "lengths": as_integers("kv_cache: lengths", lengths, torch.int32),
        "dtype": dtype or result_dtype(cache),
    }


def copy_operands(caches: Sequence[Tensor], pairs: Tensor):
    return {"caches": [raw(cache) for cache in caches], "pairs": as_integers("kv_cache: pairs", pairs, torch.int64)}


def check_scale(name: str, cache: Tensor, scale: Tensor | None) -> None:
    if (scale is not None) != (cache.dtype in LARGEST):
        raise ValueError(f"{name}: a cache of int8 or float8_e4m3fn has scales, another has none")
    if scale is not None and (scale.shape != cache.shape[:3] or scale.dtype != torch.float32):
        raise ValueError(f"{name}: scales must be float32 (blocks, block_size, Hkv) of the cache {[*cache.shape]}")


def as_integers(name: str, t: Tensor, dtype: torch.dtype) -> Tensor:
    """Indices in the kernels' dtype. A value that does not fit stays out of range; floats raise TypeError."""
    if t.is_floating_point() or t.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {str(t.dtype).removeprefix('torch.')}")
    limits = torch.iinfo(dtype)
    return t if t.dtype == dtype else t.clamp(limits.min, limits.max).to(dtype) if t.itemsize > 4 else t.to(dtype)


@kv_cache.fake("kv_cache_gather")
def _(cache: Tensor, table: Tensor, dtype: torch.dtype, **_) -> Tensor:
    return cache.new_empty(table.shape[0], table.shape[1] * cache.shape[1], *cache.shape[2:], dtype=dtype)


@kv_cache.sampled
def samples() -> Iterator[Sample]:
    g = torch.Generator().manual_seed(0)
    fp8 = torch.float8_e4m3fn

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def filled(blocks: int, block_size: int, heads: int, dim: int, dtype: torch.dtype | None):
        x = random(blocks, block_size, heads, dim)
        return (x, None) if dtype is None else quantize(x, dtype)

    def appended(name, tokens, blocks, block_size, heads, dim, dtype=None, size=1.0, skip=0, bench=False):
        (k_cache, k_scale), (v_cache, v_scale) = (filled(blocks, block_size, heads, dim, dtype) for _ in range(2))
        slots = torch.randperm(blocks * block_size, generator=g)[:tokens]
        slots[:skip] = -1
        k, v = random(tokens, heads, dim) * size, random(tokens, heads, dim)
        k[:skip], v[:skip] = torch.nan, torch.inf  # never read
        given = ("append", k, v, k_cache, v_cache, slots, k_scale, v_scale)
        moved = 4.0 * (2 * k.numel() + 2 * k.numel() * (1 if dtype is None else 0.25))
        return Sample(name, given, mutates=(3, 4) if dtype is None else (3, 4, 6, 7), bench=bench, bytes=moved)

    def gathered(name, lengths, blocks, block_size, heads, dim, dtype=None, to=None, bench=False):
        cache, scale = filled(blocks, block_size, heads, dim, dtype)
        wide = max(-(-n // block_size) for n in lengths)
        table = torch.randint(1, blocks, (len(lengths), wide), generator=g, dtype=torch.int32)  # blocks may be shared
        (cache if scale is None else scale)[0] = torch.nan  # of no sequence
        for b, n in enumerate(lengths):
            table[b, -(-n // block_size) :] = 0
        given = ("gather", cache, table, torch.tensor(lengths, dtype=torch.int32), scale, to)
        moved = 4.0 * heads * dim * (sum(lengths) * (1 if dtype is None else 0.25) + len(lengths) * wide * block_size)
        return Sample(name, given, bench=bench, bytes=moved)

    def copied(name, pairs, *caches, bench=False):
        n = sum(cache[0].numel() for cache in caches) * len(pairs)
        ids = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
        return Sample(name, ("copy", list(caches), ids), mutates=(1,), bench=bench, bytes=8.0 * n)

    yield appended("append", 5, 3, 4, 2, 8)
    yield gathered("gather", [5, 0, 1, 8], 4, 4, 2, 8)
    yield copied("copy", [(0, 2), (1, 3)], random(4, 2, 2, 4), random(4, 2, 2, 4))
    yield appended("append int8", 7, 3, 5, 3, 16, torch.int8, skip=2)
    yield appended("append fp8", 7, 3, 5, 3, 16, fp8, skip=2)
    yield appended("append odd", 11, 2, 7, 3, 37, skip=1)
    yield appended("append int8, odd, large", 6, 2, 7, 1, 41, torch.int8, size=1e4)
    yield appended("append fp8, wide", 3, 1, 3, 1, 521, fp8)
    yield appended("append none", 0, 2, 4, 2, 8)
    yield appended("append, all skipped", 3, 2, 4, 2, 8, skip=3)
    fused = random(6, 3 * 2 * 24).unflatten(1, (3, 2, 24))  # k and v of a fused projection
    pools = random(4, 2, 3, 2, 24)  # keys and values of a block side by side
    slots = torch.tensor([3, 0, 11, 7, 2, 5])
    given = ("append", fused[:, 1], fused[:, 2], pools[:, 0], pools[:, 1], slots)
    yield Sample("append, fused", given, mutates=(3, 4))
    zero = torch.zeros(2, 2, 16, dtype=torch.float64)
    zero[1, 1, 3] = 1e-3
    (q, s), (q2, s2) = filled(1, 4, 2, 16, torch.int8), filled(1, 4, 2, 16, torch.int8)
    yield Sample("append zeros", ("append", zero, zero, q, q2, torch.tensor([1, 2]), s, s2), mutates=(3, 4, 6, 7))
    yield gathered("gather odd", [13, 1, 26, 0], 5, 13, 3, 19)
    yield gathered("gather int8", [5, 0, 11], 6, 4, 2, 24, torch.int8)
    yield gathered("gather fp8", [9, 3], 6, 4, 3, 33, fp8, torch.bfloat16)
    yield gathered("gather nothing", [0], 2, 4, 1, 8)
    bits, scales = quantize(random(5, 3, 1, 7), torch.int8)
    yield copied("copy int8", [(4, 0)], bits, scales.double())
    yield copied("copy many", [(0, 2)], *(random(3, 1, 1, 3) for _ in range(70)))
    yield copied("copy none", [], random(2, 2, 1, 4))

    for dtype in (None, torch.int8):
        kind = "" if dtype is None else " int8"
        yield from appended("append aligned" + kind, 5, 3, 4, 2, 32, dtype).at_odd_addresses()
        yield from gathered("gather aligned" + kind, [5, 8], 4, 4, 2, 32, dtype).at_odd_addresses()
        scale_places = () if dtype is None else ((6, 0), (7, 0))
        tokens = [(1, 0), (1, 1), (2, 0), (2, 1)]
        yield from appended("append blocks" + kind, 5, 3, 4, 2, 16, dtype).far_apart(
            *tokens, (3, 0), (4, 0), *scale_places
        )
        scale_place = () if dtype is None else ((4, 0),)
        yield from gathered("gather blocks" + kind, [5, 8], 4, 4, 2, 16, dtype).far_apart((1, 0), *scale_place)
    yield from copied("copy aligned", [(0, 2)], random(4, 2, 2, 16), random(4, 2, 2, 16)).at_odd_addresses()
    yield from copied("copy blocks", [(0, 2), (1, 3)], random(4, 2, 2, 16)).far_apart((1, 0))

    yield appended("bench append", 512, 128, 16, 8, 64, bench=True)
    yield appended("bench append int8", 512, 128, 16, 8, 64, torch.int8, bench=True)
    yield appended("bench append fp8", 512, 128, 16, 8, 64, fp8, bench=True)
    yield gathered("bench gather", [512, 300, 64, 200], 128, 16, 8, 64, bench=True)
    yield gathered("bench gather int8", [512, 300, 64, 200], 128, 16, 8, 64, torch.int8, bench=True)
    yield copied("bench copy", [(i, 63 - i) for i in range(16)], *(random(64, 16, 8, 64) for _ in range(4)), bench=True)
