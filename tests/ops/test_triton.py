"""The Triton kernels against their float64 references: values and gradients.

Without a GPU they are interpreted on CPU tensors (conftest.py sets TRITON_INTERPRET=1); with one the same tests, marked
`gpu` then, compile and run them there. test_triton_compile.py compiles them for GPUs that are not here.
"""

import os

import pytest
import torch

from finetune import ops
from finetune.kernels import emulator
from finetune.ops import _triton
from finetune.ops._backends import device_for
from finetune.ops._check import check, run, unchanged

pytest.importorskip("triton")
DEVICE = device_for("triton")
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
KERNELS = [op for op in ops.REGISTRY if (_triton.KERNELS / f"{op}.py").exists()]
SAMPLES = {op: [s for s in ops.REGISTRY[op].samples() if not s.bench] for op in KERNELS}


def cases(dtypes, default="bf16"):
    """op × sample × dtype. Interpretation takes its time: of each op the first two samples run by default in every
    dtype, the others in the default one, in fp32 among the slow tests and in fp16 among the long ones; it knows no
    alignment."""
    for op in KERNELS:
        for i, sample in enumerate(SAMPLES[op]):
            for name, dtype in dtypes.items():
                scan = op == "gae" and sample.args[0].numel() > 1000  # the interpreter takes one element after another
                marks = [pytest.mark.slow] if scan or sample.odd or (i > 1 and name != default) else []
                marks += [pytest.mark.long] if i > 1 and name not in (default, "f32") else []
                yield pytest.param(op, sample, dtype, id=f"{op}-{sample.name}-{name}", marks=marks)


@pytest.fixture
def large_tiles(monkeypatch):
    """The interpreter's time is the number of tiles: fp32 products, which have small ones, take those of bf16."""
    if DEVICE == "cpu":
        for op in ("attention", "linear_cross_entropy"):
            table = _triton.kernels(op).TILES
            for key in list(table):
                monkeypatch.setitem(table, key, table[(16, *key[1:]) if isinstance(key, tuple) else 16])


def test_every_kernel_file_belongs_to_an_op():
    assert {path.stem for path in _triton.KERNELS.glob("[a-z]*.py")} == set(KERNELS)
    for op in KERNELS:
        assert all(name.startswith(op) for name in _triton.kernels(op).OPERATORS)


@pytest.fixture
def filled_with_nan():
    """In deterministic mode torch fills every new tensor with NaN: a result that reads it is wrong."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(DEVICE == "cuda", reason="test_gpu.py does it there")
@pytest.mark.parametrize(("op", "sample", "dtype"), [*cases(DTYPES)])
def test_values_and_gradients(op, sample, dtype, large_tiles, filled_with_nan):
    check(op, sample, dtype, "triton")


@pytest.mark.parametrize(("op", "sample"), [pytest.param(op, s, id=op) for op in KERNELS for s in SAMPLES[op][:2]])
def test_uninitialized_memory_changes_no_bit(op, sample, large_tiles):
    """Not even where a comparison drops the NaN, which the values alone would not show."""
    dtype = torch.float32
    plain = run(op, sample, dtype, "triton")
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert all(map(unchanged, run(op, sample, dtype, "triton"), plain))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("op", KERNELS)
def test_opcheck(op):
    for sample in SAMPLES[op][:2]:
        args = sample.cast(torch.float16, DEVICE)
        assert ops.REGISTRY[op].why_not("triton", *args, **sample.options(DEVICE)) is None
        overload, arguments = ops.REGISTRY[op].overload("finetune_triton", *args, **sample.options(DEVICE))
        torch.library.opcheck(overload, arguments)


@pytest.mark.long
@pytest.mark.parametrize("op", ["attention", "linear_cross_entropy"])
def test_fp32_with_its_own_tiles(op):
    for sample in SAMPLES[op]:
        check(op, sample, torch.float32, "triton")


@pytest.mark.skipif(DEVICE == "cuda", reason="test_gpu.py compares both with the reference there")
@pytest.mark.parametrize("name", ["grouped", "packed", "lengths", "window, packed", "softcap, window, packed"])
def test_triton_and_cuda_attention_agree(name, large_tiles):
    """Two implementations of one algorithm, in two languages, by two interpreters: results, statistics, gradients."""
    emulator.load("emulated")
    (sample,) = [s for s in SAMPLES["attention"] if s.name == name]
    for dtype, units in ((torch.float32, 16), (torch.bfloat16, 1)):
        both = [run("attention", sample, dtype, backend) for backend in ("triton", "emulated")]
        for mine, theirs in zip(*both, strict=True):
            assert (mine - theirs).abs().max() <= units * torch.finfo(dtype).eps * theirs.abs().max()
        statistics = []
        for library in ("finetune_triton", "finetune_emulated"):
            overload, args = ops.REGISTRY["attention"].overload(library, *sample.cast(dtype), **sample.kwargs)
            statistics.append(overload(*args)[1:])
        for mine, theirs in zip(*statistics, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_several_chunks_of_gradients(monkeypatch):
    monkeypatch.setattr(_triton.kernels("linear_cross_entropy"), "CHUNK_BYTES", 1)
    for sample in SAMPLES["linear_cross_entropy"]:
        if len(sample.args[0]) > 64:
            check("linear_cross_entropy", sample, torch.bfloat16, "triton")


def test_a_target_outside_the_vocabulary_is_named():
    x, weight, targets = SAMPLES["linear_cross_entropy"][0].cast(torch.float32, DEVICE)
    targets[3] = len(weight)
    with pytest.raises(RuntimeError, match=r"targets\[3\] is 11, outside the vocabulary of 11"):
        ops.linear_cross_entropy(x, weight, targets, backend="triton")


@pytest.mark.parametrize("op", ["rms_norm", "layer_norm", "group_norm_silu", "modulate", "gate_residual"])
def test_rows_wider_than_a_tile(op, monkeypatch):
    monkeypatch.setattr(_triton.kernels(op), "WIDEST", 16)
    for sample in SAMPLES[op]:
        if sample.args[0].shape[-1] < 100:
            check(op, sample, torch.float32, "triton")


def test_lists_take_whole_and_misaligned_blocks_alike():
    """Blocks of 2048 and 4096 elements without a mask, the last of a tensor and all of a misaligned one with it: the
    same bits, and the table says which is which."""
    pointers = _triton.kernels("_tensors").pointers
    g = torch.Generator().manual_seed(0)
    sizes, results, tables = (9000, 5, 4096), [], []
    given = [[torch.randn(n, generator=g) for n in sizes] for _ in range(3)]
    for shift in (0, 1):  # elements from the start of an aligned buffer
        lists = []
        for tensors in [*given, [t.square() for t in given[2]]]:
            placed = [torch.empty(len(t) + 4, device=DEVICE)[shift : shift + len(t)] for t in tensors]
            lists.append([to.copy_(t) for to, t in zip(placed, tensors, strict=True)])
        params, grads, firsts, seconds = lists
        results.append([])
        norm = ops.clip_grad_norm_(grads, 1.0, backend="triton")
        found, square = ops.unscale_check_finite_(grads, torch.full((), 0.5, device=DEVICE), backend="triton")
        how = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "step": 3}
        ops.adamw_(params, grads, firsts, seconds, **how, backend="triton")
        results[-1] += [norm, found, square, *params, *grads, *firsts, *seconds]
        tables.append(pointers(params, grads)[0][:, 2].tolist())
    assert tables == [[8192, 0, 4096], [0, 0, 0]]
    assert all(map(torch.equal, *results))


def test_rope_marks_a_token_whose_position_is_outside_the_tables():
    x, cos, sin, positions = SAMPLES["rope"][0].cast(torch.float32, DEVICE)
    for wrong in (-1, len(cos), 2**40):
        positions[0, 1] = wrong
        y = ops.rope(x, cos, sin, positions, backend="triton")
        bad = torch.zeros_like(y, dtype=torch.bool)
        bad[0, 1] = True
        assert torch.equal(y.isnan(), bad)


def test_without_the_interpreter_cpu_tensors_are_refused(monkeypatch):
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "0")
    x, weight = torch.ones(2, 3), torch.ones(3)
    with pytest.raises(ops.BackendUnavailable, match=r"it takes CUDA tensors.*; TRITON_INTERPRET=1 interprets it"):
        ops.rms_norm(x, weight, backend="triton")
