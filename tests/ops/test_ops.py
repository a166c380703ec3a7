"""Every op × backend × CPU level × sample × dtype against its float64 reference: values and gradients."""

import inspect
import os
import re
import subprocess
import sys

import pytest
import torch

from finetune import ops
from finetune.environment import CPU_LEVELS as LEVELS
from finetune.kernels import emulator
from finetune.ops import _triton
from finetune.ops._check import GPU_ULPS, WrongResult, check, check_close, flat, run, unchanged
from finetune.ops._op import load_triton

DTYPES = (torch.float32, torch.bfloat16)
TAKES_FLOAT16 = ("cast", "clip_grad_norm", "global_norm", "loss_scale_update", "unscale_check_finite")  # on the CPU


def here(level: str) -> bool:
    return LEVELS.index(level) <= LEVELS.index(torch.ops.finetune.cpu_level_supported())


# What each op's kernel is compiled for: on a level between two of them it is the lower one's.
COMPILED = {
    op: levels
    for line in (emulator.ROOT / "csrc/sources.txt").read_text().splitlines()
    if line and not line.startswith("#")
    for op, *levels in [line.split()]
}
SAMPLES = {op: [s for s in ops.REGISTRY[op].samples() if not s.bench] for op in ops.REGISTRY}
NATIVE = [
    pytest.param(op, level, sample, id=f"{op}-{level}-{sample.name}")
    for op in ops.REGISTRY
    for level in LEVELS
    if here(level) and level in COMPILED[op]
    for sample in SAMPLES[op]
]
each_native = pytest.mark.parametrize(("op", "level", "sample"), NATIVE)
each_at_home = pytest.mark.parametrize(("op", "level", "sample"), [p for p in NATIVE if not p.values[2].placed])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=("f32", "bf16"))


@pytest.fixture(autouse=True)
def restore_level():
    before = torch.ops.finetune.cpu_level()
    yield
    torch.ops.finetune.set_cpu_level(before)


@each_dtype
@each_native
def test_values_and_gradients(op, level, sample, dtype):
    torch.ops.finetune.set_cpu_level(level)
    check(op, sample, dtype, "cpp")


@each_dtype
@each_at_home
def test_uninitialized_memory_is_never_read(op, level, sample, dtype, monkeypatch):
    """torch fills every new tensor with NaN in deterministic mode: the result must not change by a bit."""
    torch.ops.finetune.set_cpu_level(level)
    plain = run(op, sample, dtype, "cpp")
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert all(map(unchanged, run(op, sample, dtype, "cpp"), plain))
    finally:
        torch.use_deterministic_algorithms(False)


@each_at_home
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
    assert all(unchanged(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


class Approximate(torch.autograd.Function):
    """rms_norm as the CUDA kernel computes it, with a reciprocal square root that is `units` off in the last place."""

    @staticmethod
    def forward(ctx, x, weight, units):
        x32 = x.float()
        exact = torch.rsqrt((x32.double().square().mean(-1, keepdim=True) + 1e-5).float())
        rstd = exact + units * (exact.nextafter(torch.tensor(torch.inf)) - exact)
        ctx.save_for_backward(x32, weight.float(), rstd)
        return (x32 * rstd * weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        g = dy.float() * weight
        dx = rstd * g - x * ((g * x).mean(-1, keepdim=True) * rstd * rstd * rstd)
        dw = (dy.float() * x * rstd).flatten(0, -2).sum(0)
        return dx.to(dy.dtype), dw.to(dy.dtype), None


@each_dtype
@pytest.mark.parametrize("sample", SAMPLES["rms_norm"], ids=lambda s: s.name)
def test_a_gpu_may_be_as_wrong_as_its_functions_are_documented_to_be(sample, dtype):
    exact = run("rms_norm", sample, dtype, "reference", wide=True)
    by_torch = [run("rms_norm", sample, dtype, "reference")]
    for units in (-2, 2):
        got = run("rms_norm", sample, dtype, lambda x, weight, off=units: Approximate.apply(x, weight, off))
        check_close(got, by_torch, exact, dtype, "cuda")
        if sample.name == "one":  # dx is all cancellation there
            with pytest.raises(WrongResult, match="error"):
                check_close(got, by_torch, exact, dtype, "cpu")
    far = run("rms_norm", sample, dtype, lambda x, weight: Approximate.apply(x, weight, 2**18))  # 3 %
    if sample.args[0].numel():
        with pytest.raises(WrongResult, match="error"):
            check_close(far, by_torch, exact, dtype, "cuda")


def test_kernels_call_no_function_whose_error_is_unknown():
    words = "r?sqrt|exp(?:2|10|m1)?|log(?:2|10|1p)?|tanh|erfc?|sinh?|cosh?|pow|fdivide|div|rcp"
    in_cuda = re.compile(rf"(?<![\w.])(?:ptx::)?((?:__)?(?:{words})f?)\(")
    in_triton = re.compile(rf"\b((?:tl|libdevice|tl\.math)\.(?:{words}|sigmoid|softmax)(?:_rn)?)\(")
    called = set()
    for path in [*(emulator.ROOT / "csrc/cuda").rglob("*.cu*"), *_triton.KERNELS.glob("*.py")]:
        code = re.sub(r"//.*|#.*|\"\"\"[\s\S]*?\"\"\"", "", path.read_text())
        called |= set((in_triton if path.suffix == ".py" else in_cuda).findall(code))
    assert called >= {"rsqrtf", "exp2", "tl.exp"}
    assert called <= set(GPU_ULPS)
    assert called >= set(GPU_ULPS), "no longer called"


@pytest.mark.parametrize("op", ops.REGISTRY)
def test_opcheck(op):
    """Every sample in one dtype, the first two in each."""
    for i, sample in enumerate(SAMPLES[op]):
        if sample.placed or any(t.is_floating_point() and t.float().isnan().any() for t in flat(sample.args)):
            continue  # it takes two NaN for different results
        for dtype in DTYPES if i < 2 else DTYPES[:1]:
            overload, args = ops.REGISTRY[op].overload("finetune", *sample.cast(dtype), **sample.kwargs)
            torch.library.opcheck(overload, args)


@pytest.mark.parametrize("op", ops.REGISTRY)
def test_a_forced_backend_raises_its_reason(op, monkeypatch):
    sample = SAMPLES[op][0]
    load_triton(ops.REGISTRY[op])  # now: kernels are made for the interpreter, or not, when they are imported
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    reason = f"{op} has no triton kernel yet|it takes CUDA tensors.*; TRITON_INTERPRET=1|triton is not installed"
    with pytest.raises(ops.BackendUnavailable, match=f"{op}: backend triton cannot run this call: ({reason})"):
        ops.REGISTRY[op](*sample.cast(torch.float32), backend="triton", **sample.kwargs)
    if op in TAKES_FLOAT16:
        check(op, sample, torch.float16, "cpp")
        return
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


@pytest.mark.parametrize("op", ops.REGISTRY)
def test_every_tensor_of_an_op_has_a_sample_at_an_odd_address(op):
    """Each alone: where all are, the first that is looked at hides the others."""
    samples = [s for s in ops.REGISTRY[op].samples() if not s.bench]
    given = [[*enumerate(s.args), *s.kwargs.items()] for s in samples]
    tensors = {at for each in given for at, arg in each if flat([arg])} - {"lengths", "cu_seqlens"}
    assert tensors <= {s.odd[0] for s in samples if len(s.odd) == 1}, "use Sample.at_odd_addresses"
    for sample in samples:
        if sample.odd:
            args = dict(enumerate(sample.cast(torch.float32))) | sample.options()
            for at in set(sample.odd) - {"incoming gradient"}:
                assert all(t.data_ptr() % 16 == t.itemsize for t in flat([args[at]]) if t.numel()), sample.name


def test_far_samples_are_far():
    found = [(op, s) for op in SAMPLES for s in SAMPLES[op] if s.far]
    assert {op for op, _ in found} >= {"attention", "paged_attention", "kv_cache", "rope", "swiglu", "token_logprobs"}
    for _, sample in found:
        at, dimension = sample.far
        for t in flat([sample.cast(torch.float32)[at]]):
            assert (t.shape[dimension] - 1) * t.stride(dimension) > 2**32


@pytest.mark.parametrize("variable", ["FINETUNE_BACKEND", "FINETUNE_CPU"])
def test_a_wrong_value_in_the_environment_is_one_line(variable):
    """Also where the library is imported without the command line."""
    code = (
        "from finetune.errors import UserError\ntry:\n  import finetune.ops\nexcept UserError as error:\n  print(error)"
    )
    env = os.environ | {variable: "gpu"}
    done = subprocess.run([sys.executable, "-c", code], cwd=emulator.ROOT, env=env, capture_output=True, text=True)
    assert done.stdout.startswith(f"{variable}=gpu: expected "), done.stderr
    assert done.stdout.count("\n") == 1


def test_an_op_has_the_signature_and_the_text_of_its_reference():
    assert [*inspect.signature(ops.rms_norm).parameters] == ["x", "weight", "eps", "backend"]
    assert ops.rms_norm.__doc__.startswith("x (..., C), weight (C,)")
    x = torch.ones(2, 3)
    for args, kwargs, message in (
        ((x,), {}, "missing a required argument: 'weight'"),
        ((x, x[0], 1e-5, None), {}, "too many positional arguments"),
        ((x, x[0]), {"epsilon": 1e-5}, "unexpected keyword argument 'epsilon'"),
        ((x, x[0]), {"x": x}, "multiple values for argument 'x'"),
        ((x,), {"epsilon": 1e-5}, "missing a required argument: 'weight'"),
    ):
        with pytest.raises(TypeError, match=message):
            ops.rms_norm(*args, **kwargs)
