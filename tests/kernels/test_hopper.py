"""The attention kernel of sm_90 (TMA, wgmma, mbarriers), run by the emulator, and the rules that the emulator holds it
to. Layouts are checked with data whose place is told by its value, after the PTX manual's tables."""

import itertools
import re

import pytest
import torch

from finetune import ops
from finetune.kernels import cuda_toolkit, emulator, faults, static_table
from finetune.ops._samples import Sample

SOURCE = (emulator.ROOT / "csrc/cuda/attention_hopper.cu").read_text()
FAULTS = faults.listed("attention_hopper")
DTYPES = (torch.bfloat16, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=("bf16", "f16"))


@pytest.fixture(scope="module")
def controls():
    return emulator.load("emulated")


@pytest.fixture(scope="module")
def checker():
    return emulator.load("checked")


@pytest.fixture(autouse=True)
def reset(controls, checker):
    yield
    for build in (controls, checker):
        build.set_bug("")
        build.set_eager(False)
        build.set_order(0)


def hopper(q, k, v, build="emulated", **kwargs):
    _, args = ops.attention.overload("finetune", q, k, v, **kwargs)
    return getattr(torch.ops, f"finetune_{build}").attention_hopper(*args)


def sample(name, b, tq, tk, heads, kv_heads, dim, size=1.0, **kwargs):
    g = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(b, t, h, dim, generator=g, dtype=torch.float64) * s
        for t, h, s in ((tq, heads, size), (tk, kv_heads, size), (tk, kv_heads, 1.0))
    )
    return Sample(name, (q, k, v), kwargs)


SAMPLES = [
    sample("tile", 1, 128, 128, 1, 1, 64),
    sample("tails", 1, 133, 300, 2, 1, 64, causal=False),  # both stages twice
    sample("wide", 1, 130, 130, 1, 1, 128),
    sample("one", 1, 1, 1, 1, 1, 64),
    sample("grouped", 2, 70, 270, 4, 2, 64),
    sample("more queries", 1, 200, 129, 1, 1, 64),  # the first 71 rows see nothing
    sample("lengths", 3, 60, 260, 2, 1, 64, causal=False, lengths=torch.tensor([260, 129, 0])),
    sample("large logits", 1, 150, 150, 1, 1, 64, size=30.0),
    sample("no queries", 1, 0, 5, 2, 1, 64),
    sample("window", 1, 310, 310, 1, 1, 64, window=100),
    sample("window, lengths", 2, 70, 300, 2, 1, 64, window=150, causal=False, lengths=torch.tensor([300, 40])),
    sample("window, more queries", 1, 200, 180, 1, 1, 64, window=30, lengths=torch.tensor([100])),
    sample("softcap", 1, 150, 150, 1, 1, 64, size=2.0, softcap=3.0),
    sample("softcap, window, wide", 1, 270, 270, 2, 1, 128, scale=-0.3, softcap=2.0, window=140),
]
# What is behind `lengths` is NaN: it counts for nothing.
PADDED = sample("padding", 2, 130, 260, 1, 1, 64, causal=False, lengths=torch.tensor([200, 5]))
BLIND = sample("blind queries", 1, 200, 129, 1, 1, 64)  # the first 71 see nothing, and are NaN
APART = sample("v apart", 2, 5, 130, 2, 1, 64)
APART.args[2].resize_(0).set_(torch.randn(2, 130, 3, 72, dtype=torch.float64)[:, :, 1:2, :64])  # other strides than k
each_sample = pytest.mark.parametrize("given", SAMPLES, ids=lambda s: s.name)


def poison(args, lengths):
    """k and v with NaN and infinity behind the lengths."""
    for x, bad in zip(args[1:], (torch.inf, torch.nan), strict=True):
        for b, length in enumerate(lengths.tolist()):
            x[b, length:] = bad


def verify(given, dtype, build="emulated"):
    args = given.cast(dtype)
    exact = ops.attention.reference(*(x.double() for x in args), **given.kwargs)
    mine = given.cast(dtype)
    if given is PADDED:
        poison(mine, given.kwargs["lengths"])
    if given is BLIND:
        mine[0][:, :71] = torch.nan
    ours, top, total = hopper(*mine, build=build, **given.kwargs)
    bound = 2 * (ops.attention.reference(*args, **given.kwargs).double() - exact).abs().max() if exact.numel() else 0
    unit = torch.finfo(dtype).eps * exact.abs().max() if exact.numel() else 0
    assert torch.isfinite(ours).all()
    assert not ours.numel() or (ours.double() - exact).abs().max() <= bound + unit
    return args, ours, top, total


@each_dtype
@each_sample
@pytest.mark.parametrize("eager", [False, True], ids=("late", "eager"))
def test_values(controls, given, dtype, eager):
    controls.set_eager(eager)
    verify(given, dtype)


@pytest.mark.parametrize("given", [PADDED, BLIND, APART], ids=lambda s: s.name)
@pytest.mark.parametrize("eager", [False, True], ids=("late", "eager"))
def test_padding_and_strides(controls, given, eager):
    controls.set_eager(eager)
    verify(given, torch.bfloat16)


@pytest.mark.parametrize(("order", "eager"), [(0, False), (1, True), (5, False)])
@pytest.mark.parametrize("given", [SAMPLES[0], SAMPLES[3], APART, PADDED, SAMPLES[-1]], ids=lambda s: s.name)
def test_no_wrong_access_and_no_race(checker, given, order, eager):
    checker.set_order(order)
    checker.set_eager(eager)
    verify(given, torch.float16, "checked")


@each_sample
def test_statistics_are_those_of_the_generic_kernel(given):
    args, _, top, total = verify(given, torch.float16)
    _, all_args = ops.attention.overload("finetune", *args, **given.kwargs)
    _, want_top, want_total = torch.ops.finetune_emulated.attention(*all_args)
    assert torch.equal(torch.isinf(top), torch.isinf(want_top))
    seen = ~torch.isinf(top)
    torch.testing.assert_close(top[seen], want_top[seen], rtol=1e-5, atol=1e-4)
    logs, want = top[seen] + total[seen].log2(), want_top[seen] + want_total[seen].log2()
    torch.testing.assert_close(logs, want, rtol=1e-5, atol=1e-4)
    assert (total[~seen] == 0).all()


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_order_of_threads_does_not_matter(controls, order):
    given = SAMPLES[1]
    first = hopper(*given.cast(torch.bfloat16), **given.kwargs)
    controls.set_order(order)
    assert all(map(torch.equal, hopper(*given.cast(torch.bfloat16), **given.kwargs), first))


def test_strided_inputs_are_read_in_place():
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in SAMPLES[4].cast(torch.float16))
    assert torch.equal(hopper(q, k, v)[0], hopper(q.contiguous(), k.contiguous(), v.contiguous())[0])


def test_there_are_faults():
    assert len(FAULTS) >= 6


# What the emulator itself must say; the others are told by their numbers.
TOLD = {
    "no_init_fence": "no fence has made visible",
    "no_wgmma_fence": r"without a wgmma\.fence",
    "no_wait_for_empty": "more arrivals at an mbarrier than its phase takes",
    "early_release": "that a wgmma under way reads",
    "wrong_parity": "wgmma reads shared memory that a copy under way writes|deadlock",
    "wrong_parity_of_v": "wgmma reads shared memory that a copy under way writes",
    "no_wait_for_result": "that a wgmma under way reads|the block ends while a wgmma is under way|wrong numbers",
    "no_expect": "wgmma reads shared memory that a copy under way writes",
    "no_wait_for_q": "wgmma reads shared memory that a copy under way writes",
    "no_wait_for_k": "wgmma reads shared memory that a copy under way writes",
    "no_wait_for_v": "wgmma reads shared memory that a copy under way writes",
    "no_release_of_k": "deadlock: .* an mbarrier",
    "no_release_of_v": "deadlock: .* an mbarrier",
    "no_wait_for_scores": r"a register of a wgmma was written before this wgmma\.wait_group",
    "steps_a_row": "a matrix descriptor of a row that is not the first of the swizzle's eight",
    "probabilities_after_the_fence": r"without a wgmma\.fence",
}
# What the checker must say, of the small samples.
CHECKED = {
    "no_proxy_fence": "asynchronously, which thread .* wrote at .* with no fence.proxy.async in between",
    "no_barrier_after_clearing": "race: (reads|writes) byte",
    "no_wait_for_q": "wgmma reads shared memory that a copy under way writes|race: reads byte",
    "no_wait_for_k": "wgmma reads shared memory that a copy under way writes|race: reads byte",
    "no_wait_for_empty": "race: writes byte|more arrivals|that a wgmma under way reads",
    "no_release_of_k": "deadlock: .* an mbarrier",
    "v_strides_of_k": "bytes past the end of|wrong numbers",
}
SAMPLES_OF = {"padding_counts": [PADDED], "v_strides_of_k": [APART], "no_proxy_fence": [PADDED]}
SAMPLES_OF["no_barrier_after_clearing"] = [PADDED]
WINDOWS = [given for given in SAMPLES if given.kwargs.get("window")]
SAMPLES_OF |= dict.fromkeys(("no_window_mask", "window_of_the_first_row"), WINDOWS)
SAMPLES_OF |= {f"{what}_from_the_start": WINDOWS for what in ("keys", "values")}
CHECKED_ONLY = {"no_proxy_fence", "no_barrier_after_clearing"}


def catch(build, fault, told, samples):
    """Runs the samples with this fault until the build notices; it must say so in these words."""
    controls = emulator.load(build)
    controls.set_bug(f"attention_hopper.{fault}")
    caught = []
    for eager, order, given in itertools.product((False, True), (0, 2, 3), samples):
        controls.set_eager(eager)
        controls.set_order(order)
        try:
            verify(given, torch.float16, build)
        except AssertionError:
            caught.append("wrong numbers")
        except RuntimeError as error:
            caught.append(str(error))
        if caught and re.search(told, caught[-1]):
            break
    assert controls.bug_reached(), "no sample comes by it"
    assert caught, "survives"
    assert re.search(told, caught[-1]), caught


@pytest.mark.parametrize("fault", [name for fault in FAULTS if (name := fault.partition(".")[2]) not in CHECKED_ONLY])
def test_every_fault_is_caught(controls, fault):
    catch("emulated", fault, TOLD.get(fault, "wrong numbers"), SAMPLES_OF.get(fault, SAMPLES[:3]))


@pytest.mark.parametrize("fault", CHECKED)
def test_the_checker_catches_it(checker, fault):
    catch("checked", fault, CHECKED[fault], SAMPLES_OF.get(fault, SAMPLES[1:2]))


def kernel_of(q, k, v, **kwargs):
    _, args = ops.attention.overload("finetune", q, k, v, **kwargs)
    return torch.ops.finetune_emulated.attention_kernel(*args)


def test_the_choice_between_the_kernels():
    def half(*shape):
        return torch.zeros(*shape, dtype=torch.float16)

    q = half(2, 4, 2, 64)
    assert kernel_of(q, q, q) == "attention_hopper"
    few = "attention: few queries: their heads are packed and their keys split"
    assert kernel_of(half(1, 1, 2, 64), half(1, 600, 2, 64), half(1, 600, 2, 64)) == few
    assert kernel_of(half(1, 9, 4, 64), half(1, 9, 2, 64), half(1, 9, 2, 64)) == few
    odd = half(2, 4, 2, 65)[..., :64]
    for reason, args, kwargs in (
        ("it takes head dims 64 and 128", (half(1, 4, 1, 32),) * 3, {}),
        ("it takes bfloat16 and float16", (q.float(),) * 3, {}),
        ("it takes no cu_seqlens", (q[:1],) * 3, {"cu_seqlens": torch.tensor([0, 4])}),
        ("it takes no mask", (q,) * 3, {"mask": torch.ones(1, 4, 4, dtype=torch.bool)}),
        ("there are no keys", (q, q[:, :0], q[:, :0]), {}),
        ("it takes addresses and strides of multiples of 16 bytes", (odd, q, q), {}),
        ("it takes addresses and strides of multiples of 16 bytes", (q, half(1025)[1:].view_as(q), q), {}),
    ):
        assert kernel_of(*args, **kwargs) == f"attention: {reason}"
        with pytest.raises(RuntimeError, match="does not support these arguments"):
            hopper(*args, **kwargs)


@pytest.mark.skipif(not cuda_toolkit.tool("nvcc"), reason="no nvcc: pip install -e '.[test]'")
def test_machine_code():
    """Tensor cores by warpgroups, copies by TMA, registers moved to the consumers, no spills."""
    for name, row in static_table.table(["attention_hopper"], ("90a",))["attention_hopper"]["90a"].items():
        assert row["spills"] == row["stack"] == 0, name
        assert row["code"].get("HGMMA", 0) >= 12, name
        assert not row["code"].get("HMMA"), name
        assert row["code"].get("UTMALDG", 0) >= 3, name
        assert row["code"].get("USETMAXREG") == 2, name
        entry = int(re.search(r"kRegisters = (\d+)", SOURCE)[1])  # setmaxnreg gives and takes from these
        assert row["registers"] == entry, (
            f"{name}: ptxas gives {row['registers']} registers, the kernel counts on {entry}"
        )
