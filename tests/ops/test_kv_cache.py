"""The paged cache by its meaning: roundings to 8 bits, what is never read, what is refused. See also test_ops.py."""

import pytest
import torch

from finetune import ops
from finetune.kernels import emulator
from finetune.ops.kv_cache import LARGEST, dequantize, kv_cache_append_, kv_cache_copy_, kv_cache_gather, pool, quantize

EACH_8_BIT = pytest.mark.parametrize("dtype", LARGEST, ids=("int8", "fp8"))


def bits(x):
    return x.view(torch.uint8)


@EACH_8_BIT
def test_every_rounding_is_torchs(backend, dtype):
    """Numbers of all sizes, and those half way between two that the format has: bit for bit as torch rounds them."""
    grid = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    grid = grid[grid.isfinite() & (grid.abs() <= LARGEST[dtype])].sort().values
    ties = (grid[1:] + grid[:-1]) / 2
    near = torch.cat([grid, ties, torch.nextafter(ties, torch.tensor(0.0)), torch.nextafter(ties, ties.sign() * 1e9)])
    x = torch.cat([near, torch.randn(301, generator=torch.Generator().manual_seed(0))])
    rows = torch.stack([torch.cat([x * size, torch.tensor([LARGEST[dtype] * size])]) for size in (1, 2.0**-9, 3e-5)])
    (k, k_scale), (v, v_scale) = (pool(1, 3, 1, rows.shape[1], dtype) for _ in range(2))
    kv_cache_append_(rows[:, None], -rows[:, None], k, v, torch.tensor([2, 0, 1]), k_scale, v_scale, backend=backend)
    for x, cache, scale in ((rows, k, k_scale), (-rows, v, v_scale)):
        want, scales = quantize(x, dtype)
        assert torch.equal(bits(cache[0, [2, 0, 1], 0]), bits(want))
        assert torch.equal(scale[0, [2, 0, 1], 0], scales)
    everything = torch.arange(256, dtype=torch.uint8).view(dtype).reshape(1, 1, 1, 256)
    got = kv_cache_gather(
        everything, torch.tensor([[0]]), torch.tensor([1]), torch.full((1, 1, 1), 0.3), backend=backend
    )
    want = dequantize(everything[:, 0], torch.full((1, 1), 0.3), torch.float32)
    assert torch.equal(got[:, 0].nan_to_num(7), want.nan_to_num(7))


@EACH_8_BIT
def test_error_is_half_a_step(backend, dtype):
    """|x − stored · scale| <= scale / 2 in int8; in e4m3 half a unit of the last of 3 bits, or of 2^-9 · scale."""
    x = torch.randn(40, 2, 96, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 6, 40)[:, None, None]
    (k, k_scale), (v, v_scale) = (pool(10, 4, 2, 96, dtype) for _ in range(2))
    kv_cache_append_(x, x, k, v, torch.arange(40), k_scale, v_scale, backend=backend)
    back = kv_cache_gather(k, torch.arange(10)[None], torch.tensor([40]), k_scale, backend=backend)[0]
    scale = k_scale.flatten(0, 1)[..., None]
    assert torch.equal(scale[..., 0], x.abs().amax(-1) / LARGEST[dtype])
    step = scale if dtype == torch.int8 else torch.maximum(x.abs() / 8, scale * 2**-9)
    error = (back - x).abs()
    assert (error <= step / 2 * (1 + 1e-5)).all()
    assert (error > step / 8).any()  # it is a bound of this format, not of a finer one


@EACH_8_BIT
def test_a_token_that_is_not_finite_comes_back_as_nan(backend, dtype):
    x = torch.ones(4, 1, 33)
    x[1, 0, 32], x[2, 0, 5], x[3, 0, 0] = torch.inf, torch.nan, -torch.inf
    (k, k_scale), (v, v_scale) = (pool(1, 4, 1, 33, dtype) for _ in range(2))
    kv_cache_append_(x, x, k, v, torch.arange(4), k_scale, v_scale, backend=backend)
    back = kv_cache_gather(k, torch.tensor([[0]]), torch.tensor([4]), k_scale, backend=backend)[0]
    assert torch.allclose(back[0], x[0])
    assert back[1:].isnan().all()


@EACH_8_BIT
@pytest.mark.parametrize("dtype_out", [torch.float16, torch.bfloat16])
def test_gather_into_16_bits(dtype, dtype_out):
    emulator.load("emulated")
    cache, scale = quantize(torch.randn(3, 4, 2, 21, generator=torch.Generator().manual_seed(2)), dtype)
    args = (cache, torch.tensor([[2, 0], [1, 1]]), torch.tensor([6, 8]), scale, dtype_out)
    want = kv_cache_gather(*args, backend="reference")
    assert want.dtype == dtype_out
    assert torch.equal(kv_cache_gather(*args, backend="emulated"), want)


def test_what_lies_behind_a_sequence_is_not_looked_at(backend):
    """The rest of the table names no block, and the rest of the last block is NaN."""
    cache = torch.randn(4, 3, 2, 8)
    cache[2, 1:] = torch.nan
    table = torch.tensor([[1, 2, 1 << 30], [-9, 1 << 30, -1]], dtype=torch.int32)
    got = kv_cache_gather(cache, table, torch.tensor([4, 0]), backend=backend)
    assert torch.equal(got[0, :4], torch.cat([cache[1], cache[2, :1]]))
    assert not got[0, 4:].any()
    assert not got[1].any()


def test_appended_tokens_are_gathered(backend):
    """Tokens of three sequences, one at a time and in groups, in blocks dealt out in any order."""
    g = torch.Generator().manual_seed(3)
    lengths, block_size, heads, dim = [9, 4, 1], 4, 2, 10
    x = [torch.randn(n, heads, dim, generator=g) for n in lengths]
    table = torch.tensor([[5, 0, 3], [2, 7, 7], [6, 7, 7]])
    k, v = torch.full((8, block_size, heads, dim), torch.nan), torch.full((8, block_size, heads, dim), torch.nan)
    slots = [
        torch.tensor([table[b, j // block_size] * block_size + j % block_size for j in range(n)])
        for b, n in enumerate(lengths)
    ]
    first = [torch.cat([t[b][:1] for b in range(3)]) for t in (x, slots)]
    rest = [torch.cat([t[b][1:] for b in range(3)]) for t in (x, slots)]
    for tokens, at in (first, rest):
        kv_cache_append_(tokens, -tokens, k, v, at, backend=backend)
    got = kv_cache_gather(k, table, torch.tensor(lengths), backend=backend)
    values = kv_cache_gather(v, table, torch.tensor(lengths), backend=backend)
    for b, n in enumerate(lengths):
        assert torch.equal(got[b, :n], x[b])
    assert torch.equal(values, -got)


def test_copy_on_write(backend):
    """The copies are equal, the sources and all other blocks as they were; dtypes and sizes of a block differ."""
    caches = [torch.randn(6, 3, 2, 5), torch.randn(6, 3, 2, 5).bfloat16(), torch.randn(6, 3, 2)]
    caches.append(quantize(torch.randn(6, 3, 1, 7), torch.float8_e4m3fn)[0])
    caches.append(torch.randn(6, 2, 3, 4)[:, 1])  # blocks that lie apart
    before = [cache.clone() for cache in caches]
    kv_cache_copy_(caches, torch.tensor([[0, 5], [2, 1]]), backend=backend)
    for cache, old in zip(caches, before, strict=True):
        assert torch.equal(cache[[5, 1]], old[[0, 2]])
        assert torch.equal(cache[[0, 2, 3, 4]], old[[0, 2, 3, 4]])


def test_what_the_cpu_kernels_refuse():
    k = torch.randn(2, 1, 4)
    cache = torch.zeros(2, 3, 1, 4)
    with pytest.raises(RuntimeError, match="behind the end"):
        kv_cache_append_(k, k, cache, cache.clone(), torch.tensor([0, 6]), backend="cpp")
    with pytest.raises(RuntimeError, match="block outside"):
        kv_cache_gather(cache, torch.tensor([[0, 2]]), torch.tensor([4]), backend="cpp")
    with pytest.raises(RuntimeError, match="block outside"):
        kv_cache_copy_([cache], torch.tensor([[0, 2]]), backend="cpp")
    with pytest.raises(ValueError, match="has scales, another has none"):
        kv_cache_append_(k, k, cache.to(torch.int8), cache.to(torch.int8), torch.tensor([0, 1]), backend="cpp")
    with pytest.raises(ops.BackendUnavailable, match="whose blocks are contiguous"):
        kv_cache_gather(cache.transpose(1, 3), torch.tensor([[0]]), torch.tensor([1]), backend="cpp")
    assert not cache.any()


def test_where_a_gpu_would_have_to_be_waited_for_slots_outside_are_skipped(backend):
    if backend in ("reference", "cpp"):
        pytest.skip("these raise")
    k = torch.randn(3, 1, 4)
    caches = [torch.zeros(2, 3, 1, 4) for _ in range(2)]
    kv_cache_append_(k, k, *caches, torch.tensor([6, 5, 1 << 40]), backend=backend)
    for cache in caches:
        assert torch.equal(cache[1, 2], k[1])
        assert cache.count_nonzero() == 4


def test_a_graph_that_saved_the_cache_notices():
    cache, x = torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4, requires_grad=True)
    y = (cache * x).sum()
    kv_cache_append_(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4), cache, cache.clone(), torch.tensor([0]), backend="cpp")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
