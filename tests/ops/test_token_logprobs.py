"""ops.token_logprobs: what test_ops.py does not ask: torch in float64, memory, masks, entropy's gradient, errors."""

import subprocess
import sys

import pytest
import torch

from finetune import ops
from finetune.kernels import emulator


@pytest.fixture(params=["cpp", "emulated"])
def backend(request):
    if request.param == "emulated":
        emulator.load("emulated")
    return request.param


def inputs(n=9, vocab=70, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, vocab, generator=g).mul_(3).requires_grad_(), torch.randint(vocab, (n,), generator=g)


def test_equals_torch_in_float64(backend):
    logits, targets = inputs()
    got = ops.token_logprobs(logits, targets, temperature=0.7, backend=backend)
    wide = logits.detach().double().requires_grad_()
    want = torch.log_softmax(wide / 0.7, -1).gather(1, targets[:, None])[:, 0]
    weight = torch.linspace(-1, 2, len(targets))
    assert torch.allclose(got.double(), want, rtol=1e-6, atol=1e-6)
    (mine,), (theirs,) = torch.autograd.grad(got, logits, weight), torch.autograd.grad(want, wide, weight.double())
    assert torch.allclose(mine.double(), theirs, rtol=1e-5, atol=1e-7)
    assert torch.allclose(mine.sum(-1), torch.zeros(len(targets)), atol=1e-6)  # a shift of all logits changes nothing


def test_entropy_is_torchs(backend):
    logits, targets = inputs()
    logprobs, entropy = ops.token_logprobs(logits, targets, entropy=True, backend=backend)
    wide = logits.detach().double().requires_grad_()
    want = torch.distributions.Categorical(logits=wide).entropy()
    assert torch.allclose(entropy.double(), want, rtol=1e-6, atol=1e-6)
    assert torch.equal(logprobs, ops.token_logprobs(logits, targets, backend=backend))
    got = torch.autograd.grad(entropy.sum(), logits)[0]  # of the entropy alone
    assert torch.allclose(got.double(), torch.autograd.grad(want.sum(), wide)[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [1.0, 1e4])
def test_large_logits_are_exact(backend, size):
    """Logits of ±1e4: the differences are what they are, without a unit in the last place of 1e4."""
    logits = torch.tensor([[size, size - 1, -size], [-size, size, size]])
    got = ops.token_logprobs(logits, torch.tensor([1, 2]), backend=backend)
    want = torch.log_softmax(logits.double(), -1)[[0, 1], [1, 2]]
    assert torch.allclose(got.double(), want, rtol=3e-7, atol=0)


def test_uniform_and_certain(backend):
    targets = torch.zeros(2, dtype=torch.int64)
    logprobs, entropy = ops.token_logprobs(torch.zeros(2, 1000), targets, entropy=True, backend=backend)
    assert torch.allclose(torch.stack((-logprobs, entropy)), torch.tensor(1000.0).log())
    certain = torch.full((2, 1000), -torch.inf).index_fill(1, torch.tensor(0), 5.0)
    logprobs, entropy = ops.token_logprobs(certain, targets, entropy=True, backend=backend)
    assert torch.equal(torch.stack((logprobs, entropy)), torch.zeros(2, 2))


def test_ignored_rows_and_impossible_words_leave_no_trace(backend):
    logits, targets = inputs()
    with torch.no_grad():
        logits[2] = torch.nan
        logits[:, 5] = -torch.inf
    targets[targets == 5] = 6
    targets[2] = -7
    logprobs, entropy = ops.token_logprobs(logits, targets, ignore_index=-7, entropy=True, backend=backend)
    assert logprobs[2] == entropy[2] == 0
    gradient = torch.autograd.grad((logprobs + entropy).sum(), logits)[0]
    assert gradient.isfinite().all()
    assert (gradient[2] == 0).all()
    assert (gradient[:, 5] == 0).all()


def test_a_nan_is_not_lost(backend):
    logits, targets = inputs(n=3)
    with torch.no_grad():
        logits[1, 33] = torch.nan
    logprobs = ops.token_logprobs(logits, targets, backend=backend)
    assert logprobs.isnan().tolist() == [False, True, False]


MEMORY = """
import resource, sys, torch
from finetune import ops
logits = torch.randn(400, 49152).requires_grad_()
targets = torch.arange(400)
ops.token_logprobs(logits[:8], targets[:8], backend="cpp")  # threads and libraries have started
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ops.token_logprobs(logits, targets, entropy=True, backend="cpp")
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


def test_no_softmax_in_forward():
    """The logits are 79 MB; the forward pass keeps a few numbers a row."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 4e6, f"{int(done.stdout) / 1e6:.0f} MB"


@pytest.mark.parametrize("name", ["cpp", "reference"])
@pytest.mark.parametrize("bad", [70, -1, 2**40])
def test_a_target_outside_the_vocabulary_is_named(name, bad):
    logits, targets = inputs()
    targets[7] = bad
    with pytest.raises(RuntimeError, match=rf"targets\[7\] is {bad}, outside the vocabulary of 70"):
        ops.token_logprobs(logits, targets, backend=name)


def test_a_target_outside_the_vocabulary_is_nan_on_a_gpu():
    emulator.load("emulated")
    logits, targets = inputs()
    for bad in (70, -1, 2**40):
        targets[7] = bad
        logprobs, entropy = ops.token_logprobs(logits, targets, entropy=True, backend="emulated")
        gradient = torch.autograd.grad((logprobs + entropy).sum(), logits)[0]
        for result in (logprobs, entropy, gradient.sum(-1)):
            assert result.isnan().nonzero().tolist() == [[7]]


def test_wrong_arguments_are_refused():
    logits, targets = inputs()
    for args, what in (((logits[0], targets), "logits"), ((logits, targets[:3]), "targets"),
                       ((logits, targets.int()), "int64")):  # fmt: skip
        with pytest.raises(RuntimeError, match=what):
            ops.token_logprobs(*args, backend="cpp")
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        ops.token_logprobs(logits, targets, temperature=0.0)


def test_compiles():
    logits, targets = inputs()

    def loss(logits):
        logprobs, entropy = ops.token_logprobs(logits, targets, entropy=True)
        return (logprobs.exp() + 0.1 * entropy).sum()

    plain = torch.autograd.grad(loss(logits), logits)[0]
    compiled = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(logits), logits)[0]
    assert torch.allclose(plain, compiled)
