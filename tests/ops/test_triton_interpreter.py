"""The interpreter of Triton kernels, with finetune.ops._interpreter's repair, against torch: bfloat16 above all."""

import os

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

from finetune.ops import _interpreter

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled here")
_interpreter.repair()
SPECIAL = torch.tensor([0.0, -0.0, 1.0, -3.5, float("inf"), -float("inf"), float("nan"), 3.39e38, 1e-40, -1e-45])


@triton.jit
def cast_kernel(x, y, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n), mask=at < n)


@triton.jit
def arithmetic_kernel(a, b, out, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x, y = tl.load(a + at, mask=at < n, other=1.0), tl.load(b + at, mask=at < n, other=1.0)
    tl.store(out + at, x + y, mask=at < n)
    tl.store(out + n + at, x - y, mask=at < n)
    tl.store(out + 2 * n + at, x * y, mask=at < n)
    tl.store(out + 3 * n + at, -x, mask=at < n)
    tl.store(out + 4 * n + at, tl.abs(x), mask=at < n)
    tl.store(out + 5 * n + at, tl.where(x < y, x, y), mask=at < n)
    tl.store(out + 6 * n + at, tl.maximum(x, y), mask=at < n)
    tl.store(out + 7 * n + at, tl.clamp(x, -0.5, 0.5), mask=at < n)
    tl.store(out + 8 * n, tl.sum(x, 0))
    tl.store(out + 8 * n + 1, tl.max(x, 0))


@triton.jit
def dot_kernel(a, b, out, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    i, j, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    tl.store(out + i * N + j, tl.dot(tl.load(a + i * K + k[None, :]), tl.load(b + k[:, None] * N + j)))


@triton.jit
def atomic_kernel(x, out, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.atomic_add(out + at % 3, tl.load(x + at, mask=at < n, other=0.0), mask=at < n)


def cast(x, dtype):
    y = torch.empty(len(x), dtype=dtype)
    cast_kernel[(1,)](x, y, len(x), BLOCK=triton.next_power_of_2(len(x)))
    return y


def same_bits(a, b):
    """Equal bit for bit, any NaN as good as another."""
    whole = {2: torch.int16, 4: torch.int32}[a.itemsize]
    return bool(((a.view(whole) == b.view(whole)) | (a.isnan() & b.isnan())).all())


def test_casts_of_every_bfloat16():
    x = torch.arange(65536).to(torch.uint16).view(torch.bfloat16)
    for dtype in (torch.float32, torch.float16):
        assert same_bits(cast(x, dtype), x.to(dtype))


def test_casts_to_bfloat16_round_to_nearest_even():
    g = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1 << 16,), generator=g, dtype=torch.int32)
    halves = (bits & ~0xFFFF) | 0x8000  # halfway between two bfloat16
    x = torch.cat((bits.view(torch.float32), halves.view(torch.float32), SPECIAL))
    assert same_bits(cast(x, torch.bfloat16), x.to(torch.bfloat16))
    assert same_bits(cast(x.half(), torch.bfloat16), x.half().to(torch.bfloat16))
    whole = torch.randint(-10000, 10000, (999,), generator=g, dtype=torch.int32)
    assert same_bits(cast(whole, torch.bfloat16), whole.to(torch.bfloat16))


def test_arithmetic_of_bfloat16():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 1000, generator=g).bfloat16()
    out = torch.empty(8 * 1000 + 2, dtype=torch.bfloat16)
    arithmetic_kernel[(1,)](a, b, out, 1000, BLOCK=1024)
    want = (a + b, a - b, a * b, -a, a.abs(), a.minimum(b), a.maximum(b), a.clamp(-0.5, 0.5))
    assert all(same_bits(mine, theirs) for mine, theirs in zip(out[:8000].chunk(8), want, strict=True))
    total = a.double().sum() + 24  # the 24 ones beyond n
    assert abs(out[8000].double() - total) <= total.abs() * 2**-8
    assert out[8001] == a.max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_matrix_product(dtype):
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(16, 64, generator=g).to(dtype), torch.randn(64, 32, generator=g).to(dtype)
    out = torch.empty(16, 32)
    dot_kernel[(1,)](a, b, out, M=16, K=64, N=32)
    assert (out - a.double() @ b.double()).abs().max() <= 1e-5


def test_atomic_additions_of_bfloat16_to_one_address_all_count():
    x = torch.arange(1, 31).bfloat16()
    out = torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)
    atomic_kernel[(1,)](x, out, 30, BLOCK=32)
    assert torch.equal(out, torch.stack([x[i::3].sum() + i + 1 for i in range(3)]))
