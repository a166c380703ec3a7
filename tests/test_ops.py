"""Every op × backend × CPU level × sample × dtype against its float64 reference: values and gradients.

Bound: the error may be twice that of the plain-torch reference in the same dtype, plus one unit of that dtype at the
largest magnitude of the result (both errors against float64 on the same, already rounded, inputs).
"""

import pytest
import torch

from finetune import ops

DTYPES = (torch.float32, torch.bfloat16)
LEVELS = ("portable", "avx2", "avx512", "amx")


def here(level: str) -> bool:
    return LEVELS.index(level) <= LEVELS.index(torch.ops.finetune.cpu_level_supported())


SAMPLES = {op: [s for s in ops.REGISTRY[op].samples() if not s.bench] for op in ops.REGISTRY}
NATIVE = [
    pytest.param(op, level, sample, id=f"{op}-{level}-{sample.name}")
    for op in ops.REGISTRY
    for level in LEVELS
    if here(level)
    for sample in SAMPLES[op]
]
each_native = pytest.mark.parametrize(("op", "level", "sample"), NATIVE)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=("f32", "bf16"))


@pytest.fixture(autouse=True)
def restore_level():
    before = torch.ops.finetune.cpu_level()
    yield
    torch.ops.finetune.set_cpu_level(before)


def flat(value):
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in flat(item)]
    return [value] if isinstance(value, torch.Tensor) else []


def run(op, sample, dtype, backend, wide=False):
    """Results, then mutated arguments, then gradients, as one list. `wide`: float64 arithmetic on inputs of `dtype`."""
    args = sample.cast(dtype)
    if wide:
        args = tuple(
            [x.double() if x.is_floating_point() else x for x in arg]
            if isinstance(arg, list) and all(isinstance(x, torch.Tensor) for x in arg)
            else arg.detach().double().requires_grad_(arg.requires_grad)
            if isinstance(arg, torch.Tensor) and arg.is_floating_point()
            else arg
            for arg in args
        )
    before = [leaf.detach().clone() for leaf in flat(args)]
    result = ops.REGISTRY[op](*args, backend=backend, **sample.kwargs)
    out = flat(result) + [leaf for i in sample.mutates for leaf in flat(args[i])]
    changed = {id(leaf) for i in sample.mutates for leaf in flat(args[i])}
    for leaf, old in zip(flat(args), before, strict=True):
        assert id(leaf) in changed or torch.equal(leaf, old), "an input changed"
    if sample.grad:
        g = torch.Generator().manual_seed(1)
        dy = [torch.randn(y.shape, generator=g).to(dtype).to(y.dtype) for y in flat(result)]
        out += torch.autograd.grad(flat(result), [args[i] for i in sample.grad], dy)
    return [leaf.detach() for leaf in out]


def assert_close(got, torch_like, exact, dtype):
    assert len(got) == len(exact)
    for mine, theirs, want in zip(got, torch_like, exact, strict=True):
        assert mine.shape == want.shape
        assert mine.dtype == theirs.dtype
        if not want.numel():
            continue
        assert bool(torch.isfinite(mine).all()) == bool(torch.isfinite(want).all())
        unit = torch.finfo(mine.dtype if mine.is_floating_point() else dtype).eps
        floor = unit * want.abs().max().item() + torch.finfo(torch.float32).eps  # arithmetic is fp32
        error = (mine.double() - want).abs().max().item()
        bound = 2 * (theirs.double() - want).abs().max().item() + floor
        assert error <= bound, f"error {error:.3g} > bound {bound:.3g}"


@each_dtype
@each_native
def test_values_and_gradients(op, level, sample, dtype):
    torch.ops.finetune.set_cpu_level(level)
    exact = run(op, sample, dtype, "reference", wide=True)
    assert_close(run(op, sample, dtype, "cpp"), run(op, sample, dtype, "reference"), exact, dtype)


@each_dtype
@each_native
def test_uninitialised_memory_is_never_read(op, level, sample, dtype, monkeypatch):
    """torch fills every new tensor with NaN in deterministic mode: the result must not change by a bit."""
    torch.ops.finetune.set_cpu_level(level)
    plain = run(op, sample, dtype, "cpp")
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert all(map(torch.equal, run(op, sample, dtype, "cpp"), plain))
    finally:
        torch.use_deterministic_algorithms(False)


@each_native
def test_same_bits_for_any_number_of_threads(op, level, sample):
    torch.ops.finetune.set_cpu_level(level)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(op, sample, torch.float32, "cpp"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("op", ops.REGISTRY)
def test_opcheck(op):
    backend = ops.REGISTRY[op].backends["cpp"]
    assert backend.overload, "the page names no torch operator"
    for sample in SAMPLES[op]:
        for dtype in DTYPES:
            overload, args = backend.overload(*sample.cast(dtype), **sample.kwargs)
            torch.library.opcheck(overload, args)


@pytest.mark.parametrize("op", ops.REGISTRY)
def test_a_forced_backend_raises_its_reason(op):
    sample = SAMPLES[op][0]
    with pytest.raises(ops.BackendUnavailable, match=f"{op}.*triton"):
        ops.REGISTRY[op](*sample.cast(torch.float32), backend="triton", **sample.kwargs)
    with pytest.raises(ops.BackendUnavailable, match=r"float32 and bfloat16, got float16"):
        ops.REGISTRY[op](*sample.cast(torch.float16), backend="cpp", **sample.kwargs)


def test_table_lists_every_op_and_backend():
    rows = ops.table()
    assert {(r["op"], r["backend"]) for r in rows} == {(op, b) for op in ops.REGISTRY for b in ops.BACKENDS}
    assert all(r["ok"] or r["reason"] for r in rows)
    assert all(r["ok"] for r in rows if r["backend"] in ("reference", "cpp"))


def test_native_kernels_refuse_an_unknown_or_missing_level():
    with pytest.raises(RuntimeError, match="levels are"):
        torch.ops.finetune.set_cpu_level("sse9")
