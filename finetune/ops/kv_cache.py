"""The paged key–value cache (Kwon et al. 2023, arXiv:2309.06180, §4): a pool of blocks, (blocks, block_size, Hkv, D)
for the keys and again for the values of a layer, of which each sequence owns those that its block table names.

    append:  slot = block · block_size + offset;  cache[slot] = x[i] for every new token i with slot >= 0
    gather:  y[b, j] = cache[table[b, j // block_size], j % block_size] for j < lengths[b], else 0
    copy:    cache[destination] = cache[source] for pairs of blocks (copy-on-write of shared ones)

A cache has the dtype of its tokens, or 8 bits: int8 or float8_e4m3fn with one fp32 scale a token and head, so that a
new token never rescales an old one:

    scale = max|x| / largest (127 or 448),   stored = round(x / scale), ties to even; 0 where scale is 0 or not finite

in fp32 whatever the dtype. A token that is not finite comes back as NaN. Bytes of a token, all layers:
2 · layers · Hkv · D · bytes of the dtype, or with 8 bits 2 · layers · Hkv · (D + 4) (finetune/memory/formulas.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from finetune.ops._library import Library
from finetune.ops._op import Native, Op, Sample, native_float, wrong_device

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


def as_integers(name: str, t: Tensor, dtype: torch.dtype) -> Tensor:
    """Indices in the dtype that the kernels take. What does not fit stays out of every range; TypeError for floats."""
    if t.is_floating_point() or t.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {str(t.dtype).removeprefix('torch.')}")
    limits = torch.iinfo(dtype)
    return t if t.dtype == dtype else t.clamp(limits.min, limits.max).to(dtype) if t.itemsize > 4 else t.to(dtype)


# --- the definitions


def append(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    kept = slots >= 0
    block, offset = slots[kept] // k_cache.shape[1], slots[kept] % k_cache.shape[1]
    for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        if scale is None:
            cache[block, offset] = x[kept].to(cache.dtype)
        else:
            stored, scales = quantize(x[kept], cache.dtype)
            raw(cache)[block, offset], scale[block, offset] = raw(stored), scales.to(scale.dtype)


def gather(
    cache: Tensor, table: Tensor, lengths: Tensor, scale: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
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


def copy(caches: Sequence[Tensor], pairs: Tensor) -> None:
    for cache in caches:
        raw(cache)[pairs[:, 1]] = raw(cache)[pairs[:, 0]]


def result_dtype(cache: Tensor) -> torch.dtype:
    return torch.float32 if cache.dtype in LARGEST else cache.dtype


def reference(what: str, *args: Any, **kwargs: Any) -> Tensor | None:
    definitions: dict[str, Callable[..., Tensor | None]] = {"append": append, "gather": gather, "copy": copy}
    return definitions[what](*args, **kwargs)


# --- the operators. They see float8_e4m3fn as uint8.


def check_scale(name: str, cache: Tensor, scale: Tensor | None) -> None:
    if (scale is not None) != (cache.dtype in LARGEST):
        raise ValueError(f"{name}: a cache of int8 or float8_e4m3fn has scales, another has none")
    if scale is not None and (scale.shape != cache.shape[:3] or scale.dtype != torch.float32):
        raise ValueError(f"{name}: scales must be float32 (blocks, block_size, Hkv) of the cache {[*cache.shape]}")


def overload(what: str, *args: Any, **kwargs: Any) -> tuple[str, tuple[Any, ...]]:
    calls: dict[str, Callable[..., tuple[str, tuple[Any, ...]]]]
    calls = {"append": append_call, "gather": gather_call, "copy": copy_call}
    return calls[what](*args, **kwargs)


def append_call(k, v, k_cache, v_cache, slots, k_scale=None, v_scale=None):
    if k_cache.dim() != 4 or k.shape != v.shape or k_cache.shape != v_cache.shape or k.shape[1:] != k_cache.shape[2:]:
        raise ValueError(
            f"kv_cache: k and v must be (tokens, Hkv, D) and the caches (blocks, block_size, Hkv, D), got "
            f"{[*k.shape]}, {[*v.shape]} and {[*k_cache.shape]}, {[*v_cache.shape]}"
        )
    check_scale("kv_cache", k_cache, k_scale)
    check_scale("kv_cache", v_cache, v_scale)
    return "kv_cache_", (
        k,
        v,
        raw(k_cache),
        raw(v_cache),
        as_integers("kv_cache: slots", slots, torch.int64),
        k_scale,
        v_scale,
    )


def gather_call(cache, table, lengths, scale=None, dtype=None):
    check_scale("kv_cache", cache, scale)
    table, lengths = (
        as_integers(f"kv_cache: {n}", t, torch.int32) for n, t in (("table", table), ("lengths", lengths))
    )
    return "kv_cache_gather", (raw(cache), table, lengths, scale, dtype or result_dtype(cache))


def copy_call(caches, pairs):
    return "kv_cache_copy_", ([raw(cache) for cache in caches], as_integers("kv_cache: pairs", pairs, torch.int64))


@torch.no_grad()
def native(operators, what: str, *args: Any, **kwargs: Any) -> Tensor | None:
    name, arguments = overload(what, *args, **kwargs)
    result = getattr(operators, name)(*arguments)
    if what != "gather":  # a graph that saved a cache must notice
        changed = arguments[0] if what == "copy" else [arguments[i] for i in (2, 3, 5, 6) if arguments[i] is not None]
        torch.autograd.graph.increment_version(changed)
    return result


def supports(backend: str, what: str, *args: Any, **kwargs: Any) -> str | None:
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in (*args, *kwargs.values())):
        return "it has no backward pass"
    if what == "copy":
        caches = args[0]
        return wrong_device(backend, *caches) or contiguous_blocks(*caches)
    caches = args[2:4] if what == "append" else args[:1]
    tokens = [*args[:2]] if what == "append" else []
    if reason := native_float(backend, *tokens, *(c for c in caches if c.dtype not in LARGEST)):
        return reason
    if what == "gather" and args[0].dtype in LARGEST:
        dtype = kwargs.get("dtype") or (args[4] if len(args) > 4 else None) or torch.float32
        if reason := native_float(backend, torch.empty(0, dtype=dtype, device=args[0].device)):
            return f"of the result: {reason}"
    return wrong_device(backend, *caches) or contiguous_blocks(*caches)


def contiguous_blocks(*caches: Tensor) -> str | None:
    """A block's tokens must be adjacent; the blocks may lie apart."""
    if all(cache[:1].is_contiguous() for cache in caches):
        return None
    return "it takes caches whose blocks are contiguous"


def register(library: Library) -> None:

    @library.fake("kv_cache_")
    def _(k, v, k_cache, v_cache, slots, k_scale, v_scale):
        return None

    @library.fake("kv_cache_gather")
    def _(cache, table, lengths, scale, dtype):
        return cache.new_empty(table.shape[0], table.shape[1] * cache.shape[1], *cache.shape[2:], dtype=dtype)

    @library.fake("kv_cache_copy_")
    def _(caches, pairs):
        return None


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


op = Op("kv_cache", reference, Native(native, overload, supports, register), samples)


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
    op("append", k, v, k_cache, v_cache, slots, k_scale, v_scale, backend=backend)


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
    return op("gather", cache, table, lengths, scale, dtype, backend=backend)


def kv_cache_copy_(caches: Sequence[Tensor], pairs: Tensor, *, backend: str | None = None) -> None:
    """Copies block pairs[i, 0] to block pairs[i, 1] (pairs (n, 2) int64) in each of `caches`, which may be those of all
    layers, and scales. The destinations must be distinct, and no source among them."""
    op("copy", list(caches), pairs, backend=backend)
