"""ops.linear_cross_entropy: what test_ops.py does not ask: memory, ignored rows, backward twice, the bf16 path."""

import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from finetune import ops
from finetune.environment import CPU_LEVELS as LEVELS
from finetune.ops._check import check, run


def inputs(n=40, dim=16, vocab=300, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, dim, generator=g).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, dim, generator=g) * dim**-0.5).to(dtype).requires_grad_()
    return x, weight, torch.randint(vocab, (n,), generator=g)


def cpp(*args, **kwargs):
    return ops.linear_cross_entropy(*args, backend="cpp", **kwargs)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_equals_torch(reduction):
    x, weight, targets = inputs()
    targets[::3] = -100
    got = cpp(x, weight, targets, reduction=reduction)
    want = F.cross_entropy(F.linear(x, weight), targets, reduction=reduction)
    assert torch.allclose(got, want, rtol=1e-6)
    for a, b in zip(torch.autograd.grad(got, (x, weight)), torch.autograd.grad(want, (x, weight)), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-7)
    assert torch.equal(torch.autograd.grad(cpp(x, weight, targets), x)[0][::3], torch.zeros(14, 16))


def test_any_block_and_tile():
    """Sizes around the cuts of the work: blocks of 16 rows, tiles of 256 words, many rows and few words."""
    for n, dim, vocab in ((15, 3, 255), (17, 5, 257), (33, 2, 513), (700, 4, 2), (100, 3, 8193), (1025, 1, 40)):
        x, weight, targets = inputs(n, dim, vocab)
        results = []
        for backend in ("cpp", "reference"):
            loss = ops.linear_cross_entropy(x, weight, targets, z_loss=1e-3, backend=backend)
            results.append([loss, *torch.autograd.grad(loss, (x, weight))])
        for a, b in zip(*results, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-6), (n, dim, vocab)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=("f32", "bf16"))
@pytest.mark.parametrize("level", LEVELS[: LEVELS.index(torch.ops.finetune.cpu_level_supported()) + 1])
def test_chunks(level, dtype):
    """So many words that the rows go in two chunks, of 34 and 33: the bound of every op, poisoned memory, threads."""
    g = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 3, generator=g, dtype=torch.float64) for n in (67, 98317))
    sample = ops.Sample("chunks", (x, weight * 3**-0.5, torch.randint(98317, (67,), generator=g)), grad=(0, 1))
    before, threads = torch.ops.finetune.cpu_level(), torch.get_num_threads()
    torch.ops.finetune.set_cpu_level(level)
    try:
        check("linear_cross_entropy", sample, dtype, "cpp")
        plain = run("linear_cross_entropy", sample, dtype, "cpp")
        torch.set_num_threads(threads % 2 + 1)
        torch.use_deterministic_algorithms(True)
        assert all(map(torch.equal, run("linear_cross_entropy", sample, dtype, "cpp"), plain))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
        torch.ops.finetune.set_cpu_level(before)


MEMORY = """
import resource, sys, torch
from finetune import ops
from finetune.environment import CPU_LEVELS as LEVELS
x, weight = torch.randn(2048, 16), torch.randn(49152, 16)
x.requires_grad_(); weight.requires_grad_(sys.argv[1] == "trained")
targets = torch.arange(2048)
ops.linear_cross_entropy(x[:8], weight, targets[:8], backend="cpp").backward()  # threads and libraries have started
x.grad = weight.grad = None
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ops.linear_cross_entropy(x, weight, targets, backend="cpp").backward()
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


@pytest.mark.parametrize("weight", ["frozen", "trained"])
def test_all_logits_never_exist_at_once(weight):
    """2048 × 49152 logits are 403 MB in fp32; the peak must stay near the 25 MB of one chunk."""
    done = subprocess.run([sys.executable, "-c", MEMORY, weight], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 60e6, f"{int(done.stdout) / 1e6:.0f} MB"


def test_a_frozen_weight_gets_no_gradient_memory():
    x, weight, targets = inputs()
    op = torch.ops.finetune.linear_cross_entropy
    for x_grad, weight_grad in ((True, False), (False, True), (False, False)):
        _, dx, dweight = op(x.detach(), weight.detach(), targets, -100, 0.0, True, x_grad, weight_grad, False)
        assert dx.numel() == (x.numel() if x_grad else 0)
        assert dweight.numel() == (weight.numel() if weight_grad else 0)
    with torch.no_grad():
        assert cpp(x, weight, targets).grad_fn is None
    frozen = weight.detach()
    cpp(x, frozen, targets).backward()
    assert frozen.grad is None


def test_ignored_rows_are_never_multiplied():
    """Rows of NaN leave no trace if their target is ignored."""
    x, weight, targets = inputs()
    poisoned = x.detach().clone()
    poisoned[5::2] = float("nan")
    targets[5::2] = -100
    poisoned.requires_grad_()
    loss = cpp(poisoned, weight, targets)
    assert torch.equal(loss, cpp(x, weight, targets))
    dx, dweight = torch.autograd.grad(loss, (poisoned, weight))
    assert torch.isfinite(dx).all()
    assert torch.isfinite(dweight).all()


def test_backward_twice_and_scaled():
    x, weight, targets = inputs()
    loss = cpp(x, weight, targets)
    once = torch.autograd.grad(loss, (x, weight), torch.tensor(3.0), retain_graph=True)
    kept = [g.clone() for g in once]
    twice = torch.autograd.grad(loss, (x, weight), torch.tensor(0.5), retain_graph=True)
    third = torch.autograd.grad(loss, (x, weight), torch.tensor(3.0))
    assert all(map(torch.equal, once, kept))  # the second pass did not write into the first's result
    assert all(map(torch.equal, third, kept))
    assert all(torch.allclose(a / 3, b / 0.5, rtol=1e-5) for a, b in zip(kept, twice, strict=True))


def test_gradients_add_up_over_calls():
    x, weight, targets = inputs()
    for _ in range(2):
        cpp(x, weight, targets, reduction="sum").backward()
    want = torch.autograd.grad(cpp(x, weight, targets, reduction="sum"), weight)[0]
    assert torch.allclose(weight.grad, 2 * want, rtol=1e-6)


@pytest.mark.parametrize("bad", [300, -1, -101, 2**40])
def test_a_target_outside_the_vocabulary_is_named(bad):
    x, weight, targets = inputs()
    targets[7] = bad
    with pytest.raises(RuntimeError, match=rf"targets\[7\] is {bad}, outside the vocabulary of 300"):
        cpp(x, weight, targets)


def test_wrong_shapes_are_refused():
    x, weight, targets = inputs()
    for args, what in (
        ((x, weight[:, :8], targets), "weight"),
        ((x, weight, targets[:5]), "targets"),
        ((x, weight, targets.int()), "int64"),
    ):
        with pytest.raises(RuntimeError, match=what):
            cpp(*args)
    with pytest.raises(ValueError, match="reduction must be"):
        cpp(x, weight, targets, reduction="none")


@pytest.mark.parametrize("shape", [(40, 16, 300), (80, 8, 70000)])
def test_bf16_products(shape):
    """The path of machines with bf16 matrix units, run here by torch's slower products: the same bound."""
    x, weight, targets = inputs(*shape, dtype=torch.bfloat16)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    exact = ops.linear_cross_entropy(*wide, targets, backend="reference")
    exact = [exact, *torch.autograd.grad(exact, wide)]
    like = ops.linear_cross_entropy(x, weight, targets, backend="reference")
    like = [like, *torch.autograd.grad(like, (x, weight))]
    op = torch.ops.finetune.linear_cross_entropy
    got = op(x.detach(), weight.detach(), targets, -100, 0.0, True, True, True, True)
    for mine, theirs, want in zip(got, like, exact, strict=True):
        assert mine.dtype == theirs.dtype
        bound = 2 * (theirs.double() - want).abs().max() + torch.finfo(torch.bfloat16).eps * want.abs().max()
        assert (mine.double() - want).abs().max() <= bound


def test_compiles():
    x, weight, targets = inputs()

    def loss(x, weight):
        return ops.linear_cross_entropy(x, weight, targets) * 2

    plain = torch.autograd.grad(loss(x, weight), (x, weight))
    compiled = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(x, weight), (x, weight))
    assert all(torch.allclose(a, b) for a, b in zip(plain, compiled, strict=True))


def test_training_falls():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(50, 8) * 0.1)
    x, targets = torch.randn(64, 8), torch.randint(50, (64,))
    losses = []
    for _ in range(200):
        loss = cpp(x, weight, targets)
        losses.append(loss.item())
        weight.grad = None
        loss.backward()
        with torch.no_grad():
            weight -= 2.0 * weight.grad
    assert losses[-1] < 0.5 * losses[0]
