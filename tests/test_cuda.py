"""The CUDA kernels, run by the emulator on CPU tensors, against their float64 references: values and gradients."""

import pytest
import torch

from finetune import emulator, ops
from finetune.ops._check import check, run

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROOT = emulator.ROOT
KERNELS = [op for op in ops.REGISTRY if (ROOT / f"csrc/cuda/{op}.cu").exists()]
SAMPLES = [
    pytest.param(op, sample, id=f"{op}-{sample.name}")
    for op in KERNELS
    for sample in ops.REGISTRY[op].samples()
    if not sample.bench
]
each_sample = pytest.mark.parametrize(("op", "sample"), SAMPLES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=("f32", "bf16", "f16"))


@pytest.fixture(scope="module")
def emulated():
    return emulator.load("emulated")


@each_dtype
@each_sample
def test_values_and_gradients(emulated, op, sample, dtype):
    check(op, sample, dtype, "emulated")


@each_sample
def test_uninitialised_memory_is_never_read(emulated, op, sample):
    """torch fills every new tensor with NaN in deterministic mode, the emulator shared memory: not a bit may change."""
    plain = run(op, sample, torch.float32, "emulated")
    torch.use_deterministic_algorithms(True)
    try:
        assert all(map(torch.equal, run(op, sample, torch.float32, "emulated"), plain))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("op", KERNELS)
def test_opcheck(emulated, op):
    for sample in [s for s in ops.REGISTRY[op].samples() if not s.bench][:4]:
        overload, args = ops.REGISTRY[op].overload("finetune_emulated", *sample.cast(torch.float16), **sample.kwargs)
        torch.library.opcheck(overload, args)
