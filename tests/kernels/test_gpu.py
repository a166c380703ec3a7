"""On a machine with a GPU: the CUDA and Triton kernels themselves, against the references that the emulator and the
interpreter are held to elsewhere. `pytest -m gpu` runs them; scripts/gpu_check does so op by op, what matters first.

With FINETUNE_GPU_CHECK=emulated the emulator stands in for the device, on each op's smallest samples: that rehearses
the run without a GPU.
"""

import dataclasses
import os

import pytest
import torch

from finetune import ops
from finetune.ops._check import check, flat, run, unchanged

pytestmark = pytest.mark.gpu
EMULATED = os.environ.get("FINETUNE_GPU_CHECK") == "emulated"
BACKENDS = ("emulated",) if EMULATED else ("cuda", "triton")
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def size(sample):
    return sum(leaf.numel() for leaf in flat(sample.args))


def by_size(op):
    """The op's samples, small ones first; two of them for the emulator."""
    samples = sorted((s for s in ops.REGISTRY[op].samples() if not s.bench), key=size)
    return [s for s in samples if size(s) and not s.placed][:2] if EMULATED else samples


SAMPLES = {op: by_size(op) for op in ops.REGISTRY}
AT_HOME = [
    pytest.param(op, sample, backend, id=f"{op}-{sample.name}-{backend}")
    for op, samples in SAMPLES.items()
    for sample in samples
    for backend in BACKENDS
    if not sample.placed
]
CASES = [
    pytest.param(op, sample, backend, dtype, id=f"{op}-{sample.name}-{backend}-{name}")
    for op, samples in SAMPLES.items()
    for sample in samples
    for backend in BACKENDS
    for name, dtype in DTYPES.items()
    # at other addresses, 16 bits of either kind are moved alike; those far apart take gigabytes
    if not (sample.placed and name == "f16") and not (sample.far and name == "f32")
]
WITH_GRADIENTS = [case for case in CASES if case.values[1].grad]


@pytest.fixture(scope="module", autouse=True)
def emulated():
    if EMULATED:
        from finetune.kernels import emulator

        emulator.load("emulated")


def fits(sample, dtype):
    """Skips where a tensor whose elements lie more than 2^32 apart and its copy have no room on this GPU."""
    if sample.far and torch.cuda.is_available():
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info()[0] < 3 * 2**32 * dtype.itemsize:
            pytest.skip("too little memory on this GPU")


def forward(sample):
    return dataclasses.replace(sample, grad=())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ops.REGISTRY)
def test_smoke(op, backend):
    """One small call in each dtype: does it compile, launch and give the right numbers?"""
    sample = next(s for s in SAMPLES[op] if size(s) and not s.placed)
    for dtype in DTYPES.values():
        check(op, forward(sample), dtype, backend)


@pytest.mark.parametrize(("op", "sample", "backend", "dtype"), CASES)
def test_values(op, sample, backend, dtype):
    fits(sample, dtype)
    check(op, forward(sample), dtype, backend)


@pytest.mark.parametrize(("op", "sample", "backend", "dtype"), WITH_GRADIENTS)
def test_gradients(op, sample, backend, dtype):
    fits(sample, dtype)
    check(op, sample, dtype, backend)


@pytest.mark.parametrize(("op", "sample", "backend"), AT_HOME)
def test_same_bits_twice(op, sample, backend):
    assert all(map(unchanged, run(op, sample, torch.float32, backend), run(op, sample, torch.float32, backend)))


@pytest.mark.parametrize("op", ops.REGISTRY)
def test_opcheck(op):
    library, device = ("finetune_emulated", "cpu") if EMULATED else ("finetune", "cuda")
    takes = [s for s in SAMPLES[op] if not s.placed and not any(t.float().isnan().any() for t in flat(s.args))]
    for sample in takes[:4]:  # it takes two NaN for different results
        args, options = sample.cast(torch.float32, device), sample.options(device)
        overload, args = ops.REGISTRY[op].overload(library, *args, **options)
        torch.library.opcheck(overload, args)
