"""The CUDA kernels, run by the emulator on CPU tensors, against their float64 references: values and gradients."""

import os
import subprocess
import sys

import pytest
import torch

from finetune import ops
from finetune.kernels import emulator, extra_cases, faults
from finetune.ops._check import check, run, unchanged

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNELS = faults.kernels()
SAMPLES = [
    pytest.param(op, sample, id=f"{op}-{sample.name}")
    for op in KERNELS
    for sample in ops.REGISTRY[op].samples()
    if not sample.bench
]
each_sample = pytest.mark.parametrize(("op", "sample"), SAMPLES)
each_at_home = pytest.mark.parametrize(("op", "sample"), [p for p in SAMPLES if not p.values[1].placed])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=("f32", "bf16", "f16"))


@pytest.fixture(scope="module")
def emulated():
    return emulator.load("emulated")


@each_dtype
@each_sample
def test_values_and_gradients(emulated, op, sample, dtype):
    if sample.placed and dtype == torch.float16:
        return  # as bfloat16
    check(op, sample, dtype, "emulated")


@each_at_home
def test_uninitialized_memory_is_never_read(emulated, op, sample):
    """torch fills every new tensor with NaN in deterministic mode, the emulator shared memory: not a bit may change."""
    plain = run(op, sample, torch.float32, "emulated")
    torch.use_deterministic_algorithms(True)
    try:
        assert all(map(unchanged, run(op, sample, torch.float32, "emulated"), plain))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("op", KERNELS)
def test_opcheck(emulated, op):
    for sample in [s for s in ops.REGISTRY[op].samples() if not s.bench][:4]:
        overload, args = ops.REGISTRY[op].overload("finetune_emulated", *sample.cast(torch.float16), **sample.kwargs)
        torch.library.opcheck(overload, args)


def smallest(op, count):
    """(sample, dtype) of an op's smallest samples, all dtypes, as far as its kernel takes them."""
    found = [(s, d) for s, d in faults.cases(op) if not ops.REGISTRY[op].why_not("checked", *s.cast(d), **s.kwargs)]
    return found[: count * len(DTYPES)]


@pytest.mark.parametrize("op", KERNELS)
def test_checked_in_every_order_and_copy_mode(emulated, op):
    """No wrong access and no race in any of the builds' threads orders, and every one gives the same bits."""
    checked = emulator.load("checked")
    try:
        for sample, dtype in smallest(op, 6):
            first = None
            for order, eager in ((0, False), (1, True), (7, False)):
                checked.set_order(order)
                checked.set_eager(eager)
                got = run(op, sample, dtype, "checked")
                first = first or got
                for mine, other in zip(got, first, strict=True):
                    assert torch.equal(mine.nan_to_num(7.0), other.nan_to_num(7.0)), (sample.name, dtype, order, eager)
    finally:
        checked.set_order(0)
        checked.set_eager(False)


@pytest.mark.parametrize("backend", ["emulated", "checked"])
@pytest.mark.parametrize("fault", extra_cases.CASES)
def test_extra_cases(fault, backend):
    """Offsets of more than 32 bits, and what the reference refuses."""
    emulator.load(backend)
    faults.check_case(extra_cases.CASES[fault], backend)


def test_faults_are_all_listed():
    assert not faults.mismatches()
    for op in KERNELS:
        text = (faults.FOLDER / f"{op}.cu").read_text()
        shared = any(word in text for word in ("SHARED(", "block_sum", "ptx::"))
        assert len(faults.listed(op)) >= (6 if shared else 3), op


@pytest.mark.parametrize(("op", "fault"), [(op, fault) for op in KERNELS for fault in faults.listed(op)])
def test_fault_is_rejected(op, fault):
    verdict = faults.judge(op, fault)
    assert verdict.reached, f"no sample of {op} comes by {fault}"
    assert verdict.by, f"{fault} survives all samples of {op}"


def sanitized(*words):
    libasan = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    environment = {
        **os.environ,
        "LD_PRELOAD": libasan.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python leaves much behind
        "UBSAN_OPTIONS": "halt_on_error=1",
        "PYTHONPATH": str(emulator.ROOT),
    }
    command = [sys.executable, str(emulator.ROOT / "tests" / "sanitized.py"), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_sanitized():
    emulator.build("sanitized")
    clean = sanitized()
    assert clean.returncode == 0, clean.stderr[-4000:]
    counts = dict(line.split() for line in clean.stdout.splitlines())
    assert set(counts) == set(KERNELS)
    assert all(int(count) for count in counts.values())
    found = sanitized("rms_norm.past_the_end")  # and would it see anything?
    assert found.returncode
    assert "heap-buffer-overflow" in found.stderr
    assert "rms_norm.cu" in found.stderr
