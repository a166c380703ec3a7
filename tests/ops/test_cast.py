"""ops.cast against torch's conversions, bit for bit, and its stochastic rounding against probability theory."""

import pytest
import torch

from finetune import ops
from finetune.kernels import emulator
from finetune.ops.cast import FORMATS, LAYOUTS, philox, random_words

BACKENDS = ("reference", "cpp", "emulated")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
ALL_16_BITS = torch.arange(65536).to(torch.int16)


@pytest.fixture(scope="module", autouse=True)
def emulated():
    return emulator.load("emulated")


def bits(x):
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.dtype.itemsize])


def same(a, b):
    """The same bits, but for those of a NaN, which torch itself sets in two ways."""
    return a.dtype == b.dtype and bool(((bits(a) == bits(b)) | (a.float().isnan() & b.float().isnan())).all())


@each_backend
@pytest.mark.parametrize("to", FORMATS, ids=str)
@pytest.mark.parametrize("given", [torch.float16, torch.bfloat16], ids=str)
def test_nearest_equals_torch_on_all_16_bit_inputs(given, to, backend):
    x = ALL_16_BITS.view(given)
    mine = ops.cast(x, to, backend=backend)
    assert same(mine, x.to(to))
    if to.itemsize == 1:  # also NaN has torch's bits
        assert torch.equal(bits(mine), bits(x.to(to)))


@pytest.mark.parametrize("level", ["portable", "avx2"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_every_level_has_the_same_bits(level, rounding):
    inputs = [ALL_16_BITS.view(d) for d in (torch.float16, torch.bfloat16)]
    inputs += [torch.arange(256).to(torch.uint8).view(d) for d in FORMATS[3:]]
    cases = [(x, to) for x in inputs for to in FORMATS]
    want = [ops.cast(x, to, rounding=rounding, seed=5, backend="cpp") for x, to in cases]
    before = torch.ops.finetune.cpu_level()
    try:
        torch.ops.finetune.set_cpu_level(level)
        got = [ops.cast(x, to, rounding=rounding, seed=5, backend="cpp") for x, to in cases]
    finally:
        torch.ops.finetune.set_cpu_level(before)
    assert all(map(same, got, want))


@each_backend
@pytest.mark.parametrize("given", FORMATS[3:], ids=str)
def test_8_bit_inputs(given, backend):
    x = torch.arange(256).to(torch.uint8).view(given)
    for to in FORMATS:
        assert same(ops.cast(x, to, backend=backend), x.float().to(to))


@each_backend
@pytest.mark.parametrize("to", FORMATS[1:], ids=str)
def test_float32_inputs_near_every_boundary(to, backend):
    """Each number of the format, each middle between two, and their neighbors in fp32."""
    if to.itemsize == 2:
        every = ALL_16_BITS.view(to).float()
    else:
        every = torch.arange(256).to(torch.uint8).view(to).float()
    every = every[every.isfinite()].sort()[0]
    points = torch.cat([every, ((every[1:].double() + every[:-1].double()) / 2).float()])
    x = torch.cat([points, *(torch.nextafter(points, torch.tensor(end)) for end in (torch.inf, -torch.inf))])
    assert same(ops.cast(x, to, backend=backend), x.to(to))


@each_backend
def test_overflow(backend):
    """By default as torch: e4m3 saturates, infinity included; the others become infinite. NaN stays NaN."""
    x = torch.tensor([448.0, 464.0, 464.1, 1e6, -1e6, torch.inf, torch.nan])
    e4m3 = ops.cast(x, torch.float8_e4m3fn, backend=backend).float()
    assert e4m3[:6].tolist() == [448, 448, 448, 448, -448, 448]
    assert e4m3[6].isnan()
    plain = ops.cast(x, torch.float8_e4m3fn, saturate=False, backend=backend).float()
    assert plain[:2].tolist() == [448, 448]
    assert plain[2:].isnan().all()
    for to in (torch.float8_e5m2, torch.float16, torch.bfloat16):
        largest = torch.finfo(to).max
        big = torch.tensor([3.4e38, -3.4e38, torch.inf, torch.nan])
        assert ops.cast(big, to, backend=backend).float()[:3].tolist() == [torch.inf, -torch.inf, torch.inf]
        held = ops.cast(big, to, saturate=True, backend=backend).float()
        assert held[:3].tolist() == [largest, -largest, largest]
        assert held[3].isnan()


def test_philox_gives_its_published_answers():
    """Random123's kat_vectors for philox4x32-10."""
    counters = torch.tensor([[0] * 4, [0xFFFFFFFF] * 4, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]])
    seeds = (0, 2**64 - 1, 0x299F31D0_A4093822)
    want = [
        [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ]
    for counter, seed, words in zip(counters, seeds, want, strict=True):
        assert philox(counter[None], seed)[0].tolist() == words


@pytest.mark.parametrize("to", FORMATS[1:], ids=str)
def test_stochastic_bits_are_the_same_everywhere(to):
    g = torch.Generator().manual_seed(2)
    x = torch.randn(10007, generator=g) * (8 * torch.randn(10007, generator=g)).exp()
    for kwargs in ({}, {"saturate": True}, {"saturate": False, "scale": 0.7}):
        want = ops.cast(x, to, rounding="stochastic", seed=2**33 + 1, backend="reference", **kwargs)
        for backend in ("cpp", "emulated"):
            assert same(ops.cast(x, to, rounding="stochastic", seed=2**33 + 1, backend=backend, **kwargs), want)


@pytest.mark.parametrize("to", FORMATS[1:], ids=str)
def test_stochastic_is_unbiased_between_two_neighbors(to):
    """50 000 draws of each of 24 numbers: only the two neighbors occur, the mean within 4 standard errors."""
    tiny = torch.finfo(to).smallest_normal
    fractions = torch.tensor([1.0, 1.01, 1.37, 1.9, 1.999, 1.03125])
    values = torch.cat([fractions, -3 * fractions, fractions * tiny / 4, fractions * tiny * 2**-16])
    n = 50_000
    for i, value in enumerate(values.tolist()):
        x = torch.full((n,), value)
        y = ops.cast(x, to, rounding="stochastic", seed=i, backend="cpp").double()
        exact = x[0].double().item()
        found = y.unique()
        assert len(found) <= 2
        step = (found.max() - found.min()).item()
        assert found.min() <= exact <= found.max() or len(found) == 1
        if len(found) == 2:  # they are neighbors: nothing of the format is between them
            middle = torch.tensor((found.min() + found.max()).item() / 2)
            assert middle.to(to).double() in found
            share = (exact - found.min().item()) / step
            error = step * (share * (1 - share) / n) ** 0.5
            assert abs(y.mean().item() - exact) <= 4 * error
        else:  # a number of the format, or so near one that a draw in 50 000 is not expected
            nearest = x[0].to(to).double().item()
            gap = abs(exact - nearest)
            assert found.item() == nearest
            assert gap <= 1e-4 * max(abs(nearest) * torch.finfo(to).eps, tiny * torch.finfo(to).eps)


def test_seeds_and_places_differ():
    x = torch.full((4000,), 1.001)
    one, two = (ops.cast(x, torch.bfloat16, rounding="stochastic", seed=seed) for seed in (1, 2))
    assert not torch.equal(one, two)
    assert torch.equal(one, ops.cast(x, torch.bfloat16, rounding="stochastic", seed=1))
    words = random_words(100_000, 3, torch.device("cpu"))
    assert words.unique().numel() > 99_990
    assert (words.double().mean() / 2**32 - 0.5).abs() < 4 * (1 / 12 / 100_000) ** 0.5


def test_a_thousand_small_updates():
    """What stochastic rounding is for: 1000 additions of 1e-4 to 1 are lost to the nearest bfloat16, not to chance."""
    nearest, chance = (torch.ones(400, dtype=torch.bfloat16) for _ in range(2))
    for step in range(1000):
        nearest = ops.cast(nearest.float() + 1e-4, torch.bfloat16)
        chance = ops.cast(chance.float() + 1e-4, torch.bfloat16, rounding="stochastic", seed=step)
    assert torch.equal(nearest, torch.ones(400).bfloat16())
    assert chance.float().mean().item() == pytest.approx(1.1, abs=0.01)


@each_backend
def test_unaligned_and_scaled(backend):
    x = torch.randn(1000)[3:]
    scale = torch.tensor(17.0)
    for kwargs in ({}, {"rounding": "stochastic", "seed": 4}):
        want = ops.cast(x.clone() * 17.0, torch.float8_e5m2, backend="reference", **kwargs)
        for given in (17.0, scale):
            assert same(ops.cast(x, torch.float8_e5m2, scale=given, backend=backend, **kwargs), want)


def test_bad_arguments_are_refused():
    x = torch.ones(3)
    with pytest.raises(ValueError, match=r"torch\.int8 is not one of"):
        ops.cast(x, torch.int8)
    with pytest.raises(ValueError, match="neither 'nearest' nor 'stochastic'"):
        ops.cast(x, torch.float16, rounding="up")
    with pytest.raises(ValueError, match="seed=-1"):
        ops.cast(x, torch.float16, seed=-1)
    with pytest.raises(ops.BackendUnavailable, match="got float64"):
        ops.cast(x.double(), torch.float16, backend="cpp")
    assert set(LAYOUTS) == set(FORMATS[1:])
