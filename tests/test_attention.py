"""Attention by its meaning: packing, padding, decoding, heads, memory; its numbers are tested in test_ops.py."""

from itertools import pairwise

import pytest
import torch

from finetune.memory.meters import peak_allocated
from finetune.ops import attention

BACKENDS = pytest.mark.parametrize("backend", ["reference", "cpp"])


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
    assert close(packed, alone)
    assert all(map(close, gradients(packed, (q, k, v)), gradients(alone, (q, k, v))))


@BACKENDS
def test_a_document_does_not_see_another(backend):
    q, k, v = qkv(tq=50)
    cu_seqlens = torch.tensor([0, 20, 50], dtype=torch.int32)
    before = attention(q, k, v, cu_seqlens=cu_seqlens, backend=backend)
    k[:, :20], v[:, :20] = torch.nan, torch.nan
    after = attention(q, k, v, cu_seqlens=cu_seqlens, backend=backend)
    if backend == "cpp":
        assert torch.equal(after[:, 20:], before[:, 20:])
    else:  # 0 · NaN is NaN in a full product
        assert after[:, :20].isnan().all()


def test_padding_is_never_read():
    """NaN behind the lengths changes no bit of the result or the gradients, and gets the gradient 0."""
    lengths = torch.tensor([40, 7, 0])
    clean, dirty = qkv(b=3), qkv(b=3)
    for i, n in enumerate(lengths.tolist()):
        for x in dirty[1:]:
            x[i, n:] = torch.nan
    found = []
    for inputs in (clean, dirty):
        inputs = [x.requires_grad_() for x in inputs]
        out = attention(*inputs, lengths=lengths, backend="cpp")
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


def test_wrong_arguments_are_refused():
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
            attention(*inputs, backend="cpp", **options)
