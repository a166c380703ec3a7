"""finetune/optim.py: AdamW against torch's, masters, exact resume, groups, schedules."""

import itertools
import json

import pytest
import torch
from torch import nn

from finetune import ops, optim

SHAPES = [(8, 5), (5,), (3, 4, 2)]


def parameters(dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(*shape, generator=g).to(dtype)) for shape in SHAPES]


def set_grads(params, step, scale=1.0):
    g = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=g) * scale).to(p.dtype)


def test_equals_torch_adamw():
    """Same formula, so the same numbers up to rounding: both within twice the other's distance from float64."""
    hyper = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    ours, theirs = parameters(), parameters()
    exact = [nn.Parameter(p.detach().double()) for p in ours]
    optimizers = [
        optim.AdamW(ours, **hyper),
        torch.optim.AdamW(theirs, **hyper),
        torch.optim.AdamW(exact, **hyper),
    ]
    for step in range(50):
        for params in (ours, theirs, exact):
            set_grads(params, step)
        for p, q in zip(exact, ours, strict=True):
            p.grad = q.grad.double()
        for optimizer in optimizers:
            optimizer.step()
    for mine, torchs, want in zip(ours, theirs, exact, strict=True):
        unit = torch.finfo(torch.float32).eps * want.abs().max()
        error = (mine.double() - want).abs().max()
        assert error <= 2 * (torchs.double() - want).abs().max() + unit
        assert (mine - torch.as_tensor(parameters()[0].flatten()[0].item())).abs().max() > 0.01  # it did move


def test_masters_keep_what_bfloat16_would_lose():
    """A thousand updates far below a bf16 parameter's last bit add up with a master, and vanish without."""
    results = {}
    for master in ("auto", False):
        p = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
        optimizer = optim.AdamW([p], lr=1e-4, weight_decay=0.0, master=master)
        for _ in range(1000):
            p.grad = torch.ones_like(p)
            optimizer.step()
        results[master] = p.detach().float()
        assert ("master" in optimizer.state[p]) == (master == "auto")
    assert torch.allclose(results["auto"], torch.tensor(0.9), atol=4e-3)  # 1 - 1000 · 1e-4, as bf16
    assert torch.equal(results[False], torch.ones(64))


def test_a_bfloat16_parameter_is_its_rounded_master():
    params = parameters(torch.bfloat16)
    optimizer = optim.AdamW(params, lr=1e-2)
    for step in range(3):
        set_grads(params, step)
        optimizer.step()
    for p in params:
        state = optimizer.state[p]
        assert {k: v.dtype for k, v in state.items() if k != "step"} == dict.fromkeys(
            ("exp_avg", "exp_avg_sq", "master"), torch.float32
        )
        assert torch.equal(p, state["master"].bfloat16())
        assert not torch.equal(p.float(), state["master"])


@pytest.mark.parametrize("moments", ["fp32", "8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("through_json", [False, True])
def test_resume_is_exact(dtype, through_json, moments):
    whole, first = parameters(dtype), parameters(dtype)

    def train(params, optimizer, steps):
        for step in steps:
            set_grads(params, step)
            if step % 3 == 0:
                params[1].grad = None  # its age differs from the others'
            optimizer.step(lr=optim.cosine(step, 12, 2, 1e-2))

    uninterrupted = optim.AdamW(optim.decay_groups(whole, 0.1), moments=moments)
    train(whole, uninterrupted, range(12))

    before = optim.AdamW(optim.decay_groups(first, 0.1), moments=moments)
    train(first, before, range(5))
    saved = before.state_dict()
    if through_json:  # tensors aside, the rest must survive as text, which makes the keys text
        tensors = {(i, k): v.clone() for i, s in saved["state"].items() for k, v in s.items() if k != "step"}
        rest = {"state": {i: {"step": s["step"]} for i, s in saved["state"].items()}, "groups": saved["param_groups"]}
        rest = json.loads(json.dumps(rest))
        saved = {"state": rest["state"], "param_groups": rest["groups"]}
        for (i, k), v in tensors.items():
            saved["state"][str(i)][k] = v
    second = [nn.Parameter(p.detach().clone()) for p in first]
    after = optim.AdamW(optim.decay_groups(second, 0.5), lr=7.0)
    after.load_state_dict(saved)
    train(second, after, range(5, 12))

    assert all(map(torch.equal, second, whole))
    for p, q in zip(second, whole, strict=True):
        a, b = after.state[p], uninterrupted.state[q]
        assert a.keys() == b.keys()
        assert a["step"] == b["step"]
        assert all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a if k != "step")


def test_eight_bit_moments():
    """Two bytes and 1/32 a parameter, groups that differ, updates near those with fp32 moments."""
    exact, coarse = parameters(), parameters()
    optimizers = [optim.AdamW(exact), optim.AdamW([{"params": coarse[:2], "moments": "8bit"}, {"params": coarse[2:]}])]
    for step in range(20):
        for params, optimizer in zip((exact, coarse), optimizers, strict=True):
            set_grads(params, step)
            optimizer.step()
    state = optimizers[1].state
    assert {k: v.dtype for k, v in state[coarse[0]].items() if k != "step"} == {
        "exp_avg": torch.uint8,
        "exp_avg_max": torch.float32,
        "exp_avg_sq": torch.uint8,
        "exp_avg_sq_max": torch.float32,
    }
    assert set(state[coarse[2]]) == {"step", "exp_avg", "exp_avg_sq"}
    assert torch.equal(exact[2], coarse[2])
    moved = (exact[0] - parameters()[0]).abs().max()
    assert 0 < (exact[0] - coarse[0]).abs().max() < 0.2 * moved
    with pytest.raises(ValueError, match="AdamW: moments='4bit'"):
        optim.AdamW(parameters(), moments="4bit")


def test_loading_does_not_share_memory():
    params = parameters()
    optimizer = optim.AdamW(params)
    set_grads(params, 0)
    optimizer.step()
    other = optim.AdamW(parameters())
    other.load_state_dict(optimizer.state_dict())
    kept = other.state[other.param_groups[0]["params"][0]]["exp_avg"].clone()
    set_grads(params, 1)
    optimizer.step()
    assert torch.equal(other.state[other.param_groups[0]["params"][0]]["exp_avg"], kept)


def test_parameters_without_gradients_stay_and_do_not_age():
    params = parameters()
    before = params[0].detach().clone()
    optimizer = optim.AdamW(params, weight_decay=0.5)
    optimizer.step()
    assert not optimizer.state
    set_grads(params, 0)
    params[0].grad = None
    optimizer.step()
    assert torch.equal(params[0], before)
    assert params[0] not in optimizer.state
    assert optimizer.state[params[1]]["step"] == 1


def test_grad_scale_is_clipping_without_a_sweep():
    clipped, scaled = parameters(), parameters()
    for params in (clipped, scaled):
        set_grads(params, 0, scale=10.0)
    norm = ops.clip_grad_norm_([p.grad for p in clipped], 1.0)
    optim.AdamW(clipped).step()
    untouched = [p.grad.clone() for p in scaled]
    optim.AdamW(scaled).step(grad_scale=(1.0 / (norm + 1e-6)).clamp(max=1.0))
    for a, b in zip(clipped, scaled, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-8)
    assert all(torch.equal(p.grad, g) for p, g in zip(scaled, untouched, strict=True))


def test_decay_groups():
    frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)
    matrix, vector = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))
    assert optim.decay_groups([vector, frozen, matrix], 0.1) == [
        {"params": [matrix], "weight_decay": 0.1},
        {"params": [vector], "weight_decay": 0.0},
    ]
    assert len(optim.decay_groups([matrix], 0.1)) == 1


def test_decay_is_decoupled():
    """With zero gradients only the decay acts: p · (1 − lr λ)^steps."""
    p = nn.Parameter(torch.full((3, 3), 2.0))
    optimizer = optim.AdamW([p], lr=0.1, weight_decay=0.5)
    for _ in range(4):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    assert torch.allclose(p.detach(), torch.full((3, 3), 2.0 * 0.95**4), rtol=1e-6)


@pytest.mark.parametrize(
    "bad", [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"eps": -1e-8}, {"weight_decay": -0.1}, {"master": "always"}]
)
def test_values_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=f"AdamW: {next(iter(bad))}="):
        optim.AdamW(parameters(), **bad)


def test_minimizes():
    target = torch.linspace(-1, 1, 16)
    p = nn.Parameter(torch.zeros(16))
    optimizer = optim.AdamW([p], lr=0.05, weight_decay=0.0)
    for step in range(300):
        optimizer.zero_grad()
        (p - target).square().sum().backward()
        optimizer.step(lr=optim.linear(step, 300, 10, 0.05))
    assert (p - target).abs().max() < 1e-3


@pytest.mark.parametrize("schedule", [optim.constant, optim.linear, optim.cosine])
def test_schedules(schedule):
    rates = [schedule(step, 100, 10, 2.0, 0.2) for step in range(101)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == 2.0
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert rates[100] == pytest.approx(2.0 if schedule is optim.constant else 0.2)
    assert schedule(0, 10, 0, 2.0) == 2.0
    assert schedule(12, 10, 0, 2.0) == pytest.approx(2.0 if schedule is optim.constant else 0.0)
    assert schedule(5, 5, 5, 1.0) == 1.0  # nothing left after the warmup


def test_schedules_at_half_way():
    assert optim.cosine(55, 100, 10, 2.0) == pytest.approx(1.0)
    assert optim.linear(55, 100, 10, 2.0) == pytest.approx(1.0)
    assert optim.cosine(33, 102, 10, 2.0) == pytest.approx(1 + 0.5**0.5)


def test_wsd_is_flat_and_then_falls():
    rates = [optim.wsd(step, 100, 10, 1.0, 0.1) for step in range(101)]
    assert rates[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert rates[10:81] == [1.0] * 71
    assert all(a > b for a, b in itertools.pairwise(rates[80:]))
    assert rates[85] == pytest.approx(0.1 + 0.9 * (1 - 0.5))
    assert rates[100] == pytest.approx(0.1)
