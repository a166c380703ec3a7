"""The CUDA kernels, run by the emulator: rules of single ops that the samples of their pages cannot ask about."""

import math

import pytest
import torch

from finetune import ops
from finetune.kernels import emulator
from finetune.ops.rope import tables


@pytest.fixture(scope="module", autouse=True)
def emulated():
    return emulator.load("emulated")


@pytest.mark.parametrize("dim", [6, 16])  # one element a thread, and 16 bytes
def test_rope_marks_tokens_outside_of_the_tables(dim):
    """Where the CPU raises, a GPU would have to be waited for: its token becomes NaN and nothing is read."""
    x = torch.randn(1, 5, 2, dim)
    positions = torch.tensor([[0, 7, 3, -1, 6]])
    y = ops.rope(x, *tables(7, dim), positions, backend="emulated")
    bad = torch.tensor([False, True, False, True, False])
    assert y[:, bad].isnan().all()
    assert torch.allclose(y[:, ~bad], ops.rope(x[:, ~bad], *tables(7, dim), positions[:, ~bad], backend="reference"))


def test_clip_grad_norm_of_what_is_not_finite():
    """As torch: an infinite norm makes finite gradients 0, a NaN norm makes all NaN."""
    for bad in (math.inf, math.nan):
        grads = [torch.tensor([1.0, 2.0]), torch.tensor([bad, 3.0])]
        want = [g.clone() for g in grads]
        expected = ops.clip_grad_norm_(want, 1.0, backend="reference")
        norm = ops.clip_grad_norm_(grads, 1.0, backend="emulated")
        assert torch.equal(norm.nan_to_num(-1.0), expected.nan_to_num(-1.0))
        assert all(torch.allclose(a, b, equal_nan=True) for a, b in zip(grads, want, strict=True))


def test_clip_grad_norm_takes_any_mixture_and_alignment():
    whole = torch.randn(4000)
    grads = [whole[1:], torch.randn(7).bfloat16(), torch.zeros(0), torch.randn(1).half(), whole.double().float()[3:]]
    want = [g.clone() for g in grads]
    expected = ops.clip_grad_norm_(want, 0.5, backend="reference")
    norm = ops.clip_grad_norm_(grads, 0.5, backend="emulated")
    assert torch.allclose(norm, expected, rtol=1e-6)
    for a, b in zip(grads, want, strict=True):
        assert torch.allclose(a, b, rtol=1e-6 if a.dtype == torch.float32 else 1e-2)
    for g in grads:
        g.fill_(1e-3)
    kept = [g.clone() for g in grads]
    ops.clip_grad_norm_(grads, math.inf, backend="emulated")
    assert all(map(torch.equal, grads, kept))


def test_linear_cross_entropy_marks_targets_outside_of_the_vocabulary():
    x, weight, targets = torch.randn(5, 8), torch.randn(11, 8), torch.arange(5)
    for bad in (11, -1, 2**40):
        assert ops.linear_cross_entropy(
            x, weight, targets.index_fill(0, torch.tensor(2), bad), backend="emulated"
        ).isnan()


def test_linear_cross_entropy_never_multiplies_ignored_rows():
    """Rows of NaN leave no trace if their target is ignored; the others get the same bits."""
    x, weight, targets = torch.randn(70, 8), torch.randn(90, 8), torch.randint(90, (70,))
    targets[5::2] = -100
    results = []
    for fill in (1.0, math.nan):
        given = [x.clone(), weight.clone()]
        given[0][5::2] = fill
        given = [t.requires_grad_() for t in given]
        loss = ops.linear_cross_entropy(*given, targets, backend="emulated")
        results.append([loss, *torch.autograd.grad(loss, given)])
    assert all(map(torch.equal, *results))
    assert torch.equal(results[0][1][5::2], torch.zeros(33, 8))


def test_linear_cross_entropy_makes_what_is_wanted():
    x, weight, targets = torch.randn(5, 8), torch.randn(11, 8), torch.arange(5)
    op = torch.ops.finetune_emulated.linear_cross_entropy
    both = op(x, weight, targets, -100, 0.0, True, True, True, None)
    for x_grad, weight_grad in ((True, False), (False, True), (False, False)):
        loss, dx, dweight = op(x, weight, targets, -100, 0.0, True, x_grad, weight_grad, None)
        assert torch.equal(loss, both[0])
        assert torch.equal(dx, both[1] if x_grad else both[1][:0])
        assert torch.equal(dweight, both[2] if weight_grad else both[2][:0])
