"""Attention by its meaning: packing, padding, decoding, heads, memory, accesses; its numbers are tested in test_ops.py
and test_cuda.py."""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch

from finetune import ops
from finetune.kernels import emulator
from finetune.memory.meters import peak_allocated
from finetune.ops import attention
from finetune.ops._check import check
from finetune.ops._samples import Sample

BACKENDS = pytest.mark.parametrize("backend", ["reference", "cpp", "emulated"])
KERNELS = pytest.mark.parametrize("backend", ["cpp", "emulated"])


@pytest.fixture(scope="module", autouse=True)
def emulated():
    return emulator.load("emulated")


def qkv(b=1, tq=40, tk=None, heads=4, kv_heads=2, dim=16, seed=0, grad=False):
    g = torch.Generator().manual_seed(seed)
    shapes = ((tq, heads), (tk or tq, kv_heads), (tk or tq, kv_heads))
    return [torch.randn(b, t, h, dim, generator=g).requires_grad_(grad) for t, h in shapes]


def gradients(out, inputs, seed=9):
    return torch.autograd.grad(out, inputs, torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)))


def close(a, b):
    return (a - b).abs().max() <= 2e-6 * b.abs().max().clamp(min=1)


@BACKENDS
@pytest.mark.parametrize("causal", [True, False])
def test_packed_documents_are_as_each_alone(backend, causal):
    q, k, v = qkv(tq=130, grad=True)
    ends = [0, 1, 1, 64, 65, 130]
    cu_seqlens = torch.tensor(ends, dtype=torch.int32)
    packed = attention(q, k, v, causal=causal, cu_seqlens=cu_seqlens, backend=backend)
    alone = torch.cat(
        [attention(*(x[:, a:b] for x in (q, k, v)), causal=causal, backend=backend) for a, b in pairwise(ends)],
        dim=1,
    )
    same = torch.equal if backend == "emulated" else close  # its tiles begin where documents do
    assert same(packed, alone)
    assert all(map(same, gradients(packed, (q, k, v)), gradients(alone, (q, k, v))))


@BACKENDS
def test_a_document_does_not_see_another(backend):
    q, k, v = qkv(tq=50)
    cu_seqlens = torch.tensor([0, 20, 50], dtype=torch.int32)
    before = attention(q, k, v, cu_seqlens=cu_seqlens, backend=backend)
    k[:, :20], v[:, :20] = torch.nan, torch.nan
    after = attention(q, k, v, cu_seqlens=cu_seqlens, backend=backend)
    if backend == "reference":  # 0 · NaN is NaN in a full product
        assert after[:, :20].isnan().all()
    else:
        assert torch.equal(after[:, 20:], before[:, 20:])


@KERNELS
def test_padding_is_never_read(backend):
    """NaN behind the lengths changes no bit of the result or the gradients, and gets the gradient 0."""
    lengths = torch.tensor([40, 7, 0])
    clean, dirty = qkv(b=3), qkv(b=3)
    for i, n in enumerate(lengths.tolist()):
        for x in dirty[1:]:
            x[i, n:] = torch.nan
    found = []
    for inputs in (clean, dirty):
        inputs = [x.requires_grad_() for x in inputs]
        out = attention(*inputs, lengths=lengths, backend=backend)
        found.append([out, *gradients(out, inputs)])
    assert all(map(torch.equal, *found))
    assert not found[0][0][2].any()
    for grad in found[0][2:]:
        assert not grad[1, 7:].any()
        assert not grad[2].any()


@BACKENDS
def test_lengths_beyond_the_keys_change_nothing(backend):
    q, k, v = qkv(b=2)
    got = attention(q, k, v, lengths=torch.tensor([10**9, -1]), backend=backend)
    assert torch.equal(got[:1], attention(q[:1], k[:1], v[:1], backend=backend))
    assert not got[1].any()


@BACKENDS
@pytest.mark.parametrize("tq", [1, 3, 17])
def test_decoding_gives_the_last_rows(backend, tq):
    q, k, v = qkv(tq=90)
    whole = attention(q, k, v, backend=backend)
    assert close(attention(q[:, -tq:], k, v, backend=backend), whole[:, -tq:])


@BACKENDS
def test_grouped_heads_are_repeated_ones(backend):
    q, k, v = qkv(heads=6, kv_heads=2, grad=True)
    got = attention(q, k, v, backend=backend)
    wide = [x.detach().repeat_interleave(3, dim=2).requires_grad_() for x in (k, v)]
    want = attention(q, *wide, backend=backend)
    assert close(got, want)
    theirs = gradients(want, (q, *wide))
    folded = [theirs[0], *(g.unflatten(2, (2, 3)).sum(3) for g in theirs[1:])]
    assert all(map(close, gradients(got, (q, k, v)), folded))


@BACKENDS
def test_the_future_is_not_seen(backend):
    q, k, v = qkv(tq=70)
    before = attention(q, k, v, backend=backend)
    k[:, 33:] += 1
    v[:, 33:] += 1
    after = attention(q, k, v, backend=backend)
    assert torch.equal(before[:, :33], after[:, :33])
    assert not torch.equal(before[:, 33], after[:, 33])


def test_memory_is_linear_in_the_length():
    """Never a T×T matrix: what a forward and backward pass allocates doubles with T, the reference's quadruples."""

    def peak(t, backend):
        q, k, v = qkv(tq=t, heads=2, kv_heads=1, grad=True)
        return peak_allocated(lambda: gradients(attention(q, k, v, backend=backend), (q, k, v)))

    peak(256, "cpp")
    assert peak(4096, "cpp") <= 2.2 * peak(2048, "cpp")
    assert peak(4096, "cpp") < 4096 * 4096
    assert peak(1024, "reference") > 3.5 * peak(512, "reference")


@KERNELS
def test_wrong_arguments_are_refused(backend):
    q, k, v = qkv()
    cases = [
        ((q[0], k, v), {}, "q must be .B, Tq, H, D."),
        ((q, k, v[:, :-1]), {}, "k and v"),
        ((q, k[..., :-1], v[..., :-1]), {}, "k and v"),
        ((q[:, :, :3], k, v), {}, "3 query heads are not a multiple of 2"),
        ((q, k, v), {"lengths": torch.tensor([1, 2])}, "lengths must be"),
        ((q, k, v), {"lengths": torch.tensor([1]), "cu_seqlens": torch.tensor([0, 40])}, "excludes cu_seqlens"),
        ((q[:, :9], k, v), {"cu_seqlens": torch.tensor([0, 9])}, "as many queries as keys"),
        ((q, k, v), {"cu_seqlens": torch.tensor([0, 30, 20, 40])}, "cu_seqlens"),
        ((q, k, v), {"cu_seqlens": torch.tensor([0, 39])}, "cu_seqlens"),
        ((q, k, v), {"cu_seqlens": torch.tensor([1, 40])}, "cu_seqlens"),
        ((q, k, v), {"lengths": torch.tensor([4.0])}, "int32 or int64"),
        ((q, k, v.bfloat16()), {}, "one dtype"),
    ]
    for inputs, options, message in cases:
        with pytest.raises((ValueError, RuntimeError), match=message):
            attention(*inputs, backend=backend, **options)


@KERNELS
@pytest.mark.parametrize("causal", [True, False])
def test_statistics_are_the_log_sum_exp_of_torch(backend, causal):
    q, k, v = qkv(b=2, tq=100, heads=3, kv_heads=3, dim=64)
    library = {"cpp": torch.ops.finetune, "emulated": torch.ops.finetune_emulated}[backend]
    _, top, total = library.attention(q, k, v, causal, 1 / 8, None, None)
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    _, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads_first, 0.0, causal)
    assert ((top + total.log2()) * math.log(2) - lse).abs().max() <= 1e-5


@KERNELS
def test_statistics_keep_what_large_logits_would_drown(backend):
    """Scores of 10^6: their log-sum-exp in one fp32 number could not tell one key from three."""
    q, k, v = qkv(tq=3, heads=1, kv_heads=1, dim=4)
    k[:] = k[:, :1]
    q *= 1e6 / (q * k).sum(-1, keepdim=True)
    library = {"cpp": torch.ops.finetune, "emulated": torch.ops.finetune_emulated}[backend]
    _, _, total = library.attention(q, k, v, True, 1.0, None, None)
    assert torch.equal(total.flatten(), torch.tensor([1.0, 2.0, 3.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=("f32", "bf16"))
@pytest.mark.parametrize("dim", [2, 31, 32, 56, 65, 128, 200, 255, 256])
def test_any_head_dim(dim, dtype):
    sample = Sample(f"dim {dim}", tuple(x.double() for x in qkv(tq=21, tk=45, dim=dim)), grad=(0, 1, 2))
    check("attention", sample, dtype, "emulated")


def test_head_dims_past_256_are_refused():
    with pytest.raises(ops.BackendUnavailable, match="up to 256, got 257"):
        attention(*qkv(tq=2, dim=257), backend="emulated")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=("f32", "f16"))
def test_any_alignment_and_stride(dtype):
    """Rows that begin anywhere give the bits that aligned ones give: only how they are copied differs."""
    aligned = [x.to(dtype).requires_grad_() for x in qkv(tq=70, dim=40)]
    whole = [torch.zeros(1, 70, x.shape[2] + 1, 43, dtype=dtype) for x in aligned]
    odd = [w[:, :, 1:, 3:].copy_(x.detach()).requires_grad_() for w, x in zip(whole, aligned, strict=True)]
    found = []
    for inputs in (aligned, odd):
        out = attention(*inputs, backend="emulated")
        found.append([out, *torch.autograd.grad(out, inputs, torch.ones_like(out))])
    assert all(map(torch.equal, *found))


def test_a_batch_gives_the_bits_of_its_parts():
    """The work is cut by shape alone and nothing is summed by atomics."""
    whole = [x.bfloat16().requires_grad_() for x in qkv(b=3, tq=90)]
    out = attention(*whole, backend="emulated")
    found = [out, *torch.autograd.grad(out, whole, torch.ones_like(out))]
    for i in range(3):
        part = [x[i : i + 1].detach().requires_grad_() for x in whole]
        out = attention(*part, backend="emulated")
        alone = [out, *torch.autograd.grad(out, part, torch.ones_like(out))]
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(found, alone, strict=True))


@pytest.mark.parametrize(
    ("dtype", "forward", "backward"), [(torch.bfloat16, 1e-2, 2e-2), (torch.float16, 1.5e-3, 3e-3)], ids=("bf16", "f16")
)
def test_error_of_tensor_cores(dtype, forward, backward):
    """Normal q, k, v and dO, 192 causal tokens: absolute errors against float64, of numbers up to 4.6."""
    inputs = [x.to(dtype).requires_grad_() for x in qkv(tq=192, heads=2, kv_heads=1, dim=64)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    out, exact = attention(*inputs, backend="emulated"), attention(*wide, backend="reference")
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    grads = torch.autograd.grad(out, inputs, grad), torch.autograd.grad(exact, wide, grad.double())
    assert (out - exact).abs().max() <= forward
    assert all((a - b).abs().max() <= backward for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=("f32", "bf16"))
def test_several_tiles_are_checked_in_every_order_and_copy_mode(dtype):
    """Three steps of each pipeline, so that both stages are overwritten: no race, the same bits."""
    checked = emulator.load("checked")
    first = None
    try:
        for order, eager in ((0, False), (1, True), (5, False), (6, True)):
            checked.set_order(order)
            checked.set_eager(eager)
            inputs = [x.to(dtype).requires_grad_() for x in qkv(tq=150, heads=2, kv_heads=1, dim=64)]
            out = attention(*inputs, backend="checked")
            got = [out, *torch.autograd.grad(out, inputs, torch.ones_like(out))]
            first = first or got
            assert all(map(torch.equal, got, first))
    finally:
        checked.set_order(0)
        checked.set_eager(False)


def accesses(dtype, dim, bug=""):
    inputs = [x.to(dtype) for x in qkv(tq=128, heads=2, kv_heads=1, dim=dim)]
    inputs = [x.as_strided(x.shape, (1, *x.stride()[1:])).requires_grad_() for x in inputs]  # of one batch

    def call():
        out = attention(*inputs, backend="checked")
        torch.autograd.grad(out, inputs, torch.ones_like(out))

    checked = emulator.load("checked")
    checked.set_bug(bug)
    try:
        return emulator.trace(call)
    finally:
        checked.set_bug("")


def units(rows, kind):
    return sum(row["units"] for row in rows if row["kind"] == kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=("f32", "bf16"))
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_no_access_takes_longer_than_it_must(dim, dtype):
    """No bank conflict, not a sector too many, and tensors move 16 bytes a lane; the statistics are the exception."""
    rows = accesses(dtype, dim)
    assert not emulator.excess(rows)
    assert {row["kind"] for row in rows} >= {"cp.async to shared", "cp.async from global", "global store"}
    assert ("ldmatrix" in {row["kind"] for row in rows}) == (dtype == torch.bfloat16)
    narrow = [row for row in rows if "global" in row["kind"] and row["width"] < 16]
    assert narrow
    assert all("a.m[" in row["source"] or "a.l[" in row["source"] for row in narrow)


def test_work_is_what_the_algorithm_asks_for():
    """128 causal tokens, two heads, D = 64: three of four 64×64 tiles of scores, each 4·4·8 mma a product."""
    rows = accesses(torch.bfloat16, 64)
    mma = sum(row["requests"] for row in rows if row["kind"] == "mma")
    tile, diagonal = 4 * 4 * 8, 4 * 4 * 2  # one product of 64×64×64; delta's
    assert mma == 2 * (3 * (2 + 7) * tile + 2 * diagonal)
    own, diagonal = 4 * 4, 2 * 4 * 4  # the left operands, read once for each warp and 16 columns; of two tiles' deltas
    assert units(rows, "ldmatrix") == 4 * (mma // 2 + 2 * (3 * (1 + 4) * own + diagonal))  # a right one makes two mma


def test_a_decoding_step_reads_keys_and_values_once():
    """8 query heads in groups of 4, 600 keys in 3 splits: a group is one tile, of which one warp's 16 rows multiply."""
    q, k, v = (x.to(torch.bfloat16) for x in qkv(tq=1, tk=600, heads=8, kv_heads=2, dim=64))
    rows = emulator.trace(lambda: attention(q, k, v, backend="checked"))
    assert not emulator.excess(rows, "ldmatrix")
    sector, splits, tiles = 32, 3, 10
    assert units(rows, "cp.async from global") == 2 * (k.numel() + v.numel() + splits * q.numel()) // sector
    mma = sum(row["requests"] for row in rows if row["kind"] == "mma")
    assert mma == 2 * tiles * 2 * (4 * 8)  # of two heads, 64 keys and two products of 16×64×64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=("f32", "bf16"))
def test_split_keys_are_checked_in_every_order_and_copy_mode(dtype):
    checked = emulator.load("checked")
    first = None
    try:
        for order, eager in ((0, False), (1, True), (5, False), (6, True)):
            checked.set_order(order)
            checked.set_eager(eager)
            inputs = [x.to(dtype) for x in qkv(tq=2, tk=520, heads=4, kv_heads=2, dim=32)]
            out = attention(*inputs, backend="checked")
            first = out if first is None else first
            assert torch.equal(out, first)
    finally:
        checked.set_order(0)
        checked.set_eager(False)


@pytest.mark.parametrize(("dim", "times"), [(32, 4), (64, 8), (128, 8)])
def test_without_the_swizzle_ldmatrix_takes_so_many_times_as_long(dim, times):
    plain, swizzled = accesses(torch.bfloat16, dim, "attention.no_swizzle"), accesses(torch.bfloat16, dim)
    assert units(plain, "ldmatrix") == times * units(swizzled, "ldmatrix")
    assert emulator.excess(plain, "shared store")
    assert units(plain, "cp.async to shared") == units(swizzled, "cp.async to shared")  # whole rows, either way


def hidden_by_hand(tq, tk, window, causal, length):
    """(Tq, Tk) bool, key by key from the words: a query sees the last `window` keys up to its own place."""
    rows = []
    for i in range(tq):
        place = i + tk - tq if causal else length - 1
        rows.append([not (place - window < j <= place and j < length) for j in range(tk)])
    return torch.tensor(rows)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("tq", "tk", "length"), [(12, 12, 12), (3, 12, 12), (12, 12, 7), (1, 12, 5)])
@pytest.mark.parametrize("window", [1, 4, 12, 30])
def test_a_window_is_a_mask_of_the_last_keys(window, tq, tk, length, causal, backend):
    q, k, v = (x.requires_grad_() for x in qkv(tq=tq, tk=tk))
    scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2)) / 4
    scores = 3 * (scores / 3).tanh()
    hidden = hidden_by_hand(tq, tk, window, causal, length)
    p = scores.masked_fill(hidden, -1e30).softmax(-1).masked_fill(hidden, 0)
    want = torch.einsum("bhij,bjhd->bihd", p, v.repeat_interleave(2, 2))
    rules = {"window": window, "softcap": 3.0, "causal": causal, "lengths": torch.tensor([length])}
    got = attention(q, k, v, backend=backend, **rules)
    assert close(got, want)
    assert all(map(close, gradients(got, (q, k, v)), gradients(want, (q, k, v))))


def test_rules_that_mean_nothing_are_refused():
    inputs = qkv()
    for rules, message in (
        ({"window": -1}, "window must be 0"),
        ({"softcap": -2.0}, "softcap must be 0"),
        ({"softcap": math.inf}, "softcap must be 0"),
        ({"softcap": math.nan}, "softcap must be 0"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(*inputs, **rules)


@KERNELS
@pytest.mark.parametrize("tq", [1, 20, 150])
def test_keys_before_every_window_cost_nothing(backend, tq):
    """Whole tiles of them are skipped: NaN in them changes no bit, and they get the gradient 0."""
    clean, dirty = qkv(tq=tq, tk=400), qkv(tq=tq, tk=400)
    first = 400 - tq + 1 - 30  # the first query's window begins there
    for x in dirty[1:]:
        x[:, :first] = torch.nan
    found = []
    for inputs in (clean, dirty):
        inputs = [x.requires_grad_() for x in inputs]
        out = attention(*inputs, window=30, backend=backend)
        found.append([out, *gradients(out, inputs)])
    assert all(map(torch.equal, *found))
    assert all((grad[:, :first] == 0).all() for grad in found[0][2:])


def test_a_window_costs_what_it_shows():
    """256 causal tokens, a window of 64, D = 64: a tile of 64 queries sees 127 keys, two tiles; the first sees one."""
    inputs = [x.to(torch.bfloat16).requires_grad_() for x in qkv(tq=256, heads=1, kv_heads=1, dim=64)]

    def call():
        torch.autograd.grad((out := attention(*inputs, window=64, backend="checked")), inputs, torch.ones_like(out))

    mma = sum(row["requests"] for row in emulator.trace(call) if row["kind"] == "mma")
    tile, diagonal = 4 * 4 * 8, 4 * 4 * 2
    assert mma == (1 + 2 + 2 + 2) * (2 + 7) * tile + 4 * diagonal


def test_a_decoding_step_reads_the_window_alone():
    """600 keys, of which 256 are seen: one split of four tiles for each of two groups of heads."""
    q, k, v = (x.to(torch.bfloat16) for x in qkv(tq=1, tk=600, heads=8, kv_heads=2, dim=64))
    rows = emulator.trace(lambda: attention(q, k, v, window=256, backend="checked"))
    mma = sum(row["requests"] for row in rows if row["kind"] == "mma")
    assert mma == 2 * 4 * 2 * (4 * 8)


@pytest.mark.parametrize("dim", [64, 128])
def test_a_softcap_far_above_the_scores_changes_little(dim):
    """c tanh(s / c) is s − s³ / 3c² + …: at c = 1000 the results of scores up to 4 move by 1e-5 at most."""
    inputs = qkv(tq=100, dim=dim, grad=True)
    for backend in ("reference", "cpp", "emulated"):
        plain = attention(*inputs, backend=backend)
        capped = attention(*inputs, softcap=1000.0, backend=backend)
        assert 0 < (plain - capped).abs().max() <= 3e-5
        for a, b in zip(gradients(plain, inputs), gradients(capped, inputs), strict=True):
            assert (a - b).abs().max() <= 1e-4


def test_a_library_that_is_older_than_a_rule_refuses_it(monkeypatch):
    """It must not drop what its operator does not know."""
    inputs, schema = qkv(), attention.schemas["attention"]
    known = [(name, default) for name, default in schema.arguments if name not in ("window", "softcap", "mask")]
    monkeypatch.setitem(attention.schemas, "attention", dataclasses.replace(schema, arguments=tuple(known)))
    for name, value in {"window": 3, "softcap": 2.0, "mask": torch.ones(1, 40, 40, dtype=torch.bool)}.items():
        with pytest.raises(ops.BackendUnavailable, match=f"older than its {name}"):
            attention(*inputs, backend="cpp", **{name: value})
    assert attention.why_not("cpp", *inputs) is None
