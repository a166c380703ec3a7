"""On a machine with a GPU: the CUDA and Triton kernels themselves, against the references that the emulator and the
interpreter are held to elsewhere. `pytest -m gpu` runs this and nothing else."""

import pytest
import torch

from finetune import ops
from finetune.ops._check import check, run

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = [
    pytest.param(op, sample, backend, id=f"{op}-{sample.name}-{backend}")
    for op in ops.REGISTRY
    for sample in ops.REGISTRY[op].samples()
    if not sample.bench
    for backend in ("cuda", "triton")
]


@pytest.mark.parametrize("dtype", DTYPES, ids=("f32", "bf16", "f16"))
@pytest.mark.parametrize(("op", "sample", "backend"), CASES)
def test_values_and_gradients(op, sample, backend, dtype):
    check(op, sample, dtype, backend)


@pytest.mark.parametrize(("op", "sample", "backend"), CASES)
def test_same_bits_twice(op, sample, backend):
    assert all(map(torch.equal, run(op, sample, torch.float32, backend), run(op, sample, torch.float32, backend)))


@pytest.mark.parametrize("op", ops.REGISTRY)
def test_opcheck(op):
    for sample in [s for s in ops.REGISTRY[op].samples() if not s.bench][:4]:
        overload, args = ops.REGISTRY[op].overload("finetune", *sample.cast(torch.float32, "cuda"), **sample.kwargs)
        torch.library.opcheck(overload, args)
