"""Attention over a paged cache by its meaning: what it equals, what cannot change it, what 8 bits cost."""

import dataclasses

import pytest
import torch

from finetune import ops
from finetune.memory.meters import peak_allocated
from finetune.ops.kv_cache import LARGEST, kv_cache_append_, kv_cache_gather, pool, quantize
from finetune.ops.paged_attention import paged_attention

BLOCK = 16


def case(lengths, heads=4, kv_heads=2, dim=24, queries=None, seed=0, block_size=BLOCK):
    """q, k_cache, v_cache, table, lengths: blocks in random order, block 0 unused."""
    g = torch.Generator().manual_seed(seed)
    needed = [-(-n // block_size) for n in lengths]
    ids = iter((torch.randperm(sum(needed), generator=g) + 1).tolist())
    table = torch.zeros(len(lengths), max(needed), dtype=torch.int32)
    for b, n in enumerate(needed):
        table[b, :n] = torch.tensor([next(ids) for _ in range(n)])
    k, v = (torch.randn(sum(needed) + 1, block_size, kv_heads, dim, generator=g) for _ in range(2))
    q = torch.randn(len(lengths), *([queries] if queries else []), heads, dim, generator=g)
    return q, k, v, table, torch.tensor(lengths)


def close(a, b):
    return (a - b).abs().max() <= 2e-6 * b.abs().max().clamp(min=1)


@pytest.mark.parametrize(("heads", "block_size"), [(2, 16), (6, 7), (16, 32)])
@pytest.mark.parametrize("rules", [{}, {"softcap": 1.5}, {"softcap": 1.5, "window": 9}], ids=str)
def test_equals_attention_of_the_gathered_cache(backend, heads, block_size, rules):
    q, k, v, table, lengths = case([70, 0, 1], heads, 2, 20, block_size=block_size)
    dense = [kv_cache_gather(cache, table, lengths, backend=backend) for cache in (k, v)]
    want = ops.attention.reference(q[:, None], *dense, causal=False, lengths=lengths, **rules)[:, 0]
    got = paged_attention(q, k, v, table, lengths, **rules, backend=backend)
    assert close(got, want)
    assert not got[1].any()


def test_decoding_is_causal_attention(backend):
    """A prompt, then tokens one by one and three at a time, each appended before it is attended to."""
    g = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(1, 22, h, 16, generator=g) for h in (4, 2, 2))
    want = ops.attention.reference(q, k, v)[0]
    (k_cache, _), (v_cache, _) = (pool(4, 8, 2, 16, torch.float32) for _ in range(2))
    table, done = torch.tensor([[2, 0, 3]]), 0
    for new in (7, 1, 1, 3, 1, 3, 3, 3):
        at = torch.arange(done, done + new)
        slots = table[0, at // 8] * 8 + at % 8
        kv_cache_append_(k[0, at], v[0, at], k_cache, v_cache, slots, backend=backend)
        done += new
        got = paged_attention(q[:, at], k_cache, v_cache, table, torch.tensor([done]), backend=backend)
        assert close(got[0], want[at])
    assert done == 22


def test_the_order_of_blocks_does_not_matter(backend):
    q, k, v, table, lengths = case([270, 40, 3], queries=2)
    want = paged_attention(q, k, v, table, lengths, lse=True, backend=backend)
    order = torch.randperm(len(k), generator=torch.Generator().manual_seed(1))
    got = paged_attention(q, k[order], v[order], order.argsort()[table], lengths, lse=True, backend=backend)
    assert all(map(torch.equal, got, want))


def test_a_sequence_depends_on_itself_only(backend):
    """Alone, in a batch, in a table that names no block behind its end, in a wider one: the same bits."""
    if backend == "reference":
        pytest.skip("torch's products depend on the batch")
    q, k, v, table, lengths = case([513, 256, 20])
    want = paged_attention(q, k, v, table, lengths, lse=True, backend=backend)
    for b, n in enumerate(lengths.tolist()):
        wide = torch.full((1, table.shape[1] + 17), 1 << 30, dtype=torch.int32)
        used = -(-n // BLOCK)
        wide[0, :used] = table[b, :used]
        for t in (wide, wide[:, :used]):
            got = paged_attention(q[b : b + 1], k, v, t, lengths[b : b + 1], lse=True, backend=backend)
            assert torch.equal(got[0][0], want[0][b])
            assert torch.equal(got[1][0], want[1][b])


def test_what_a_row_does_not_see_is_not_read(backend):
    """NaN before the window, behind the last token and in other blocks changes no bit."""
    q, k, v, table, lengths = case([300, 47, 5])
    want = paged_attention(q, k, v, table, lengths, window=40, backend=backend)
    seen = torch.zeros(k.shape[:2], dtype=torch.bool)
    for b, n in enumerate(lengths.tolist()):
        j = torch.arange(max(0, n - 40), n)
        seen[table[b, j // BLOCK].long(), j % BLOCK] = True
    k[~seen], v[~seen] = torch.nan, torch.nan
    got = paged_attention(q, k, v, table, lengths, window=40, backend=backend)
    if backend == "reference":  # 0 · NaN is NaN in a full product
        assert got[0].isnan().all()
    else:
        assert torch.equal(got, want)


def test_parts_join_by_their_log_sum_exps(backend):
    q, k, v, table, lengths = case([48, 70])
    whole, lse = paged_attention(q, k, v, table, lengths, lse=True, backend=backend)
    parts = [(table[:, :2], torch.full((2,), 32)), (table[:, 2:], lengths - 32)]
    outs, sums = zip(*(paged_attention(q, k, v, *part, lse=True, backend=backend) for part in parts), strict=True)
    weights = torch.stack(sums).softmax(0)[..., None]
    assert close((torch.stack(outs) * weights).sum(0), whole)
    assert close(torch.stack(sums).logsumexp(0), lse)


@pytest.mark.parametrize("dtype", LARGEST, ids=("int8", "fp8"))
def test_what_8_bits_cost(backend, dtype):
    """With steps of at most dk, dv (int8: the scale; e4m3: the larger of |x| / 8 and scale · 2^-9) keys move a score by
    at most d = scale · Σ |q| · dk / 2, so probabilities by a factor within e^±2d, and
    |error| <= (e^2d − 1) Σ p |v| + max dv / 2."""
    q, k, v, table, lengths = case([90, 31, 300], heads=6, dim=64)
    (k8, k_scale), (v8, v_scale) = (quantize(x, dtype) for x in (k, v))
    got = paged_attention(q, k8, v8, table, lengths, k_scale, v_scale, backend=backend)
    exact = paged_attention(q, k, v, table, lengths, backend="reference")
    sizes = paged_attention(q, k, v.abs(), table, lengths, backend="reference")  # Σ p |v|

    def step(x, scale):
        return (
            scale[..., None].expand_as(x) if dtype == torch.int8 else torch.maximum(x.abs() / 8, scale[..., None] / 512)
        )

    dk, dv = (kv_cache_gather(step(x, s).contiguous(), table, lengths) for x, s in ((k, k_scale), (v, v_scale)))
    dk, dv = (x.repeat_interleave(3, dim=2) for x in (dk, dv))  # (B, T, H, D)
    d = torch.einsum("bhd,bthd->bth", q.abs(), dk).amax(1) / 2 / 8  # scale is 1 / 8
    bound = torch.expm1(2 * d)[..., None] * sizes + dv.amax(1) / 2
    error = (got - exact).abs()
    assert (error <= bound).all()
    assert error.max() > bound.max() / 1000  # 8 bits were read
    assert error.max() < 0.1 * exact.abs().max()


def test_nothing_of_the_cache_is_copied():
    """What a call allocates is a small part of the tokens it attends to."""
    q, k, v, table, lengths = case([2000, 2000, 1000], heads=4, kv_heads=4, dim=64)
    tokens = 2 * 5000 * 4 * 64 * 4
    peak = peak_allocated(lambda: paged_attention(q, k, v, table, lengths, backend="cpp"))
    assert 0 < peak < tokens / 10


def test_a_softcap_far_above_the_scores_changes_little(backend):
    """c tanh(s / c) is s − s³ / 3c² + …: at c = 1000 the results of scores up to 4 move by 1e-5 at most."""
    q, k, v, table, lengths = case([300, 31])
    plain, lse = paged_attention(q, k, v, table, lengths, lse=True, backend=backend)
    capped, capped_lse = paged_attention(q, k, v, table, lengths, softcap=1000.0, lse=True, backend=backend)
    assert 0 < (plain - capped).abs().max() <= 3e-5
    assert 0 < (lse - capped_lse).abs().max() <= 3e-5


def test_a_library_that_is_older_than_the_softcap_refuses_it(monkeypatch):
    """It must not drop what its operator does not know."""
    inputs, schema = case([20, 3]), paged_attention.schemas["paged_attention"]
    known = tuple((name, default) for name, default in schema.arguments if name != "softcap")
    monkeypatch.setitem(paged_attention.schemas, "paged_attention", dataclasses.replace(schema, arguments=known))
    with pytest.raises(ops.BackendUnavailable, match="older than its softcap"):
        paged_attention(*inputs, softcap=2.0, backend="cpp")
    assert paged_attention.why_not("cpp", *inputs) is None


def test_what_is_refused():
    q, k, v, table, lengths = case([20, 3])
    with pytest.raises(RuntimeError, match="names a block outside"):
        paged_attention(q, k, v, table + 1000, lengths, backend="cpp")
    with pytest.raises(ValueError, match="not a multiple"):
        paged_attention(q[:, :3], k, v, table, lengths)
    for rules, message in (
        ({"window": -1}, "window must be 0"),
        ({"softcap": -2.0}, "softcap must be 0"),
        ({"softcap": torch.inf}, "softcap must be 0"),
        ({"softcap": torch.nan}, "softcap must be 0"),
    ):
        with pytest.raises(ValueError, match=message):
            paged_attention(q, k, v, table, lengths, **rules)
    with pytest.raises(ValueError, match="has scales, another has none"):
        paged_attention(q, k.to(torch.int8), v.to(torch.int8), table, lengths)
    with pytest.raises(ops.BackendUnavailable, match="no backward pass"):
        paged_attention(q.requires_grad_(), k, v, table, lengths, backend="cpp")
