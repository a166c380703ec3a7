"""ops.loss_scale_update_ against torch's and DeepSpeed's loss scalers, ops.unscale_check_finite_ and ops.global_norm
against torch's equivalents."""

import importlib.util
import math
import random

import pytest
import torch

from finetune import ops
from finetune.kernels import emulator

BACKENDS = ("reference", "cpp", "emulated")
each_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(scope="module", autouse=True)
def emulated():
    return emulator.load("emulated")


def overflows(seed: int, steps: int, rate: float) -> list[bool]:
    draw = random.Random(seed)
    return [draw.random() < rate for _ in range(steps)]


def scales(found: list[bool], backend: str, scale: float, hysteresis: int = 1, **kwargs) -> list[float]:
    """The scale after each step."""
    state = torch.tensor(scale), torch.tensor(0, dtype=torch.int32), torch.tensor(hysteresis, dtype=torch.int32)
    out = []
    for bad in found:
        ops.loss_scale_update_(*state, torch.tensor(float(bad)), hysteresis=hysteresis, backend=backend, **kwargs)
        out.append(state[0].item())
    return out


@each_backend
def test_the_two_policies_differ_by_design(backend):
    found = [False, False, True, False, False]
    assert scales(found, backend, 65536.0, growth_interval=2) == [65536, 131072, 65536, 65536, 131072]
    mine = scales(found, backend, 65536.0, growth_interval=2, policy="deepspeed")
    assert mine == [65536, 65536, 32768, 32768, 32768]


@each_backend
@pytest.mark.parametrize(("interval", "rate"), [(1, 0.3), (3, 0.2), (7, 0.05), (2000, 0.5)])
def test_sequences_equal_gradscaler(backend, interval, rate):
    found = overflows(interval, 300, rate)
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([p], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=interval, growth_factor=3.0)
    theirs = []
    for bad in found:
        scaler.scale(p.sum()).backward()
        if bad:
            p.grad[1] = math.inf
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        theirs.append(scaler.get_scale())
    assert scales(found, backend, 1024.0, growth_interval=interval, growth_factor=3.0) == theirs
    assert len(set(theirs)) > 3


@pytest.mark.peer
@pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="needs deepspeed")
@each_backend
@pytest.mark.parametrize("consecutive", [False, True])
@pytest.mark.parametrize(("interval", "hysteresis", "rate"), [(1, 1, 0.3), (4, 1, 0.1), (5, 3, 0.2), (2, 2, 0.4)])
def test_sequences_equal_deepspeed(backend, interval, hysteresis, rate, consecutive, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.fp16 import loss_scaler

    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 1)  # of rank 0 it logs, and needs a process group for it
    scaler = loss_scaler.DynamicLossScaler(
        2.0**20, interval, 1.0, hysteresis, consecutive, raise_error_at_min_scale=False, dtype=torch.half
    )
    found = overflows(interval + hysteresis, 400, rate)
    theirs = []
    for bad in found:
        scaler.update_scale(bad)
        theirs.append(float(scaler.cur_scale))
    largest = torch.finfo(torch.float32).max
    if max(theirs) > largest:  # ours is a float32 and stays there
        steps = next(i for i, s in enumerate(theirs) if s > largest)
        found, theirs = found[:steps], theirs[:steps]
    assert len(theirs) > 100
    assert len(set(theirs)) > 3
    kwargs = {"policy": "deepspeed", "min_scale": 1.0, "consecutive_hysteresis": consecutive}
    assert scales(found, backend, 2.0**20, hysteresis, growth_interval=interval, **kwargs) == theirs


@each_backend
def test_hysteresis_of_torchs_policy(backend):
    """As apex's update_scale_hysteresis: overflows in a row count, and all after the third back off."""
    found = [True, True, False, True, True, True, True, False, True]
    mine = scales(found, backend, 64.0, hysteresis=3)
    assert mine == [64, 64, 64, 64, 64, 32, 16, 16, 16]


@each_backend
def test_a_scale_stays_finite_and_above_its_least(backend):
    assert scales([False] * 4, backend, 2.0**126, growth_interval=1)[-1] == 2.0**127
    assert scales([True] * 4, backend, 4.0, min_scale=1.0)[-1] == 1.0
    assert scales([True] * 4, backend, 4.0, min_scale=1.0, policy="deepspeed")[-1] == 1.0


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="neither 'torch' nor 'deepspeed'"):
        scales([True], "cpp", 1.0, policy="apex")
    with pytest.raises(RuntimeError, match="count from 1"):
        scales([True], "cpp", 1.0, growth_interval=0)


def gradients(dtype=torch.float32, scale=1.0):
    g = torch.Generator().manual_seed(5)
    return [(torch.randn(*s, generator=g) * scale).to(dtype) for s in [(33, 7), (1,), (20001,), (0, 2)]]


@each_backend
@pytest.mark.parametrize("bad", [None, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_unscaling_equals_torch(dtype, bad, backend):
    mine, theirs = gradients(dtype, 64.0), gradients(dtype, 64.0)
    for grads in (mine, theirs):
        if bad is not None:
            grads[2][12345] = bad
    inverse, want = torch.tensor(1 / 64), torch.zeros(())
    torch._amp_foreach_non_finite_check_and_unscale_(theirs, want, inverse)
    found, square = ops.unscale_check_finite_(mine, inverse, backend=backend)
    assert torch.equal(found, want)
    assert found.item() == (bad is not None)
    assert all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in zip(mine, theirs, strict=True))
    if bad is None:
        exact = sum(g.double().square().sum() for g in mine)
        assert square.item() == pytest.approx(exact.item(), rel=1e-3 if dtype != torch.float32 else 1e-6)
    else:
        assert not square.isfinite()


@each_backend
def test_mixed_dtypes_and_the_norm_for_clipping(backend):
    mixed = [g.to(d) for g, d in zip(gradients(), (torch.float32, torch.bfloat16, torch.float16) * 2, strict=False)]
    exact = math.sqrt(sum(g.double().square().sum().item() for g in mixed))
    assert ops.global_norm(mixed, backend=backend).item() == pytest.approx(exact, rel=1e-6)
    _, square = ops.unscale_check_finite_(mixed, torch.tensor(1.0), backend=backend)
    assert square.sqrt().item() == pytest.approx(exact, rel=1e-6)
    assert ops.global_norm(mixed, backend=backend).item() == pytest.approx(exact, rel=1e-6)


def test_the_norm_is_clip_grad_norms():
    grads = gradients()
    assert torch.allclose(ops.global_norm(grads), ops.clip_grad_norm_(grads, math.inf), rtol=2e-7)
    assert torch.equal(ops.global_norm([]), torch.zeros(()))
    for size in (1e30, 1e-25):  # their squares are no fp32 numbers
        for n in (4, 4000):
            norm = ops.global_norm([torch.full((n,), size)], backend="cpp").item()
            assert norm == pytest.approx(n**0.5 * size, rel=1e-6)
    assert ops.global_norm([torch.tensor([1.0, math.inf])], backend="cpp") == math.inf
    assert ops.global_norm([torch.tensor([1.0, math.nan] * 500)], backend="cpp").isnan()


@each_backend
def test_unaligned_gradients(backend):
    whole = torch.randn(3000, generator=torch.Generator().manual_seed(1))
    view, kept = whole[5:2990], whole.clone()
    assert ops.global_norm([view], backend=backend).item() == pytest.approx(view.double().norm().item(), rel=1e-6)
    ops.unscale_check_finite_([view], torch.tensor(0.5), backend=backend)
    kept[5:2990] *= 0.5
    assert torch.equal(whole, kept)


def test_bad_arguments_are_refused():
    with pytest.raises(RuntimeError, match="inverse_scale must be one float32 number"):
        ops.unscale_check_finite_([torch.ones(3)], torch.ones(2), backend="cpp")
    with pytest.raises(ops.BackendUnavailable, match="contiguous gradients"):
        ops.unscale_check_finite_([torch.ones(3, 4).t()], torch.ones(()), backend="cpp")
    with pytest.raises(ops.BackendUnavailable, match="got float64"):
        ops.global_norm([torch.ones(3).double()], backend="cpp")
