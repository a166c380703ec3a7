"""gae beyond its samples: the two ends of λ, segments that do not leak, truncation, float64, the loop it replaces."""

import pytest
import torch

from finetune import ops
from finetune.kernels import emulator


def rollout(steps, rows, seed=0, dtype=torch.float64, ends=0.1):
    g = torch.Generator().manual_seed(seed)
    floats = [torch.randn(steps, rows, generator=g, dtype=dtype) for _ in range(3)]
    return *floats, *(torch.rand(steps, rows, generator=g) < ends for _ in range(2))


def by_definition(r, v, next_v, terminated, truncated, gamma, lam):
    """A_t = Σ_k (γλ)^k δ_{t+k} up to the end of t's segment."""
    delta = r + gamma * next_v * ~terminated - v
    out = torch.zeros_like(r)
    for row in range(r.shape[1]):
        for t in range(len(r)):
            weight = 1.0
            for k in range(t, len(r)):
                out[t, row] += weight * delta[k, row]
                weight *= gamma * lam
                if terminated[k, row] or truncated[k, row]:
                    break
    return out


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("steps", [1, 2, 33, 130])
def test_equals_its_definition(backend, steps):
    given = rollout(steps, 5)
    advantages, returns = ops.gae(*given, gamma=0.97, lam=0.9, backend=backend)
    wanted = by_definition(*given, 0.97, 0.9)
    assert torch.allclose(advantages, wanted, atol=1e-12, rtol=1e-12)
    assert torch.allclose(returns, wanted + given[1], atol=1e-12, rtol=1e-12)
    assert advantages.dtype == torch.float64


@pytest.mark.parametrize("rows", [1, 7, 70])
def test_cpp_equals_the_loop_in_float64_at_any_length(rows):
    for steps in (3, 257, 4097):
        given = rollout(steps, rows, ends=0.01)
        mine, loop = (ops.gae(*given, backend=backend) for backend in ("cpp", "reference"))
        assert all(torch.allclose(a, b, atol=1e-12, rtol=1e-12) for a, b in zip(mine, loop, strict=True))


def test_lambda_zero_is_the_td_error():
    r, v, next_v, terminated, truncated = rollout(50, 4)
    advantages, _ = ops.gae(r, v, next_v, terminated, truncated, gamma=0.9, lam=0.0)
    assert torch.allclose(advantages, r + 0.9 * next_v * ~terminated - v)


def test_lambda_one_is_the_discounted_return_less_the_value():
    """Where V of the next state is the next step's V, the sum telescopes."""
    r, v, _, _, _ = rollout(40, 3)
    no = torch.zeros(40, 3, dtype=torch.bool)
    last = no.clone()
    last[-1] = True
    following = torch.cat([v[1:], torch.zeros(1, 3, dtype=v.dtype)])
    advantages, returns = ops.gae(r, v, following, last, no, gamma=0.95, lam=1.0)
    discounted = torch.zeros_like(r)
    total = torch.zeros(3, dtype=r.dtype)
    for t in reversed(range(40)):
        total = r[t] + 0.95 * total
        discounted[t] = total
    assert torch.allclose(returns, discounted)
    assert torch.allclose(advantages, discounted - v)


@pytest.mark.parametrize("which", ["terminated", "truncated"])
def test_nothing_crosses_the_end_of_a_segment(which):
    r, v, next_v, _, _ = rollout(30, 2)
    ends = {name: torch.zeros(30, 2, dtype=torch.bool) for name in ("terminated", "truncated")}
    ends[which][11] = True
    before = ops.gae(r, v, next_v, **ends)[0][:12]
    r, v, next_v = r.clone(), v.clone(), next_v.clone()
    for x in (r, v, next_v):
        x[12:] = torch.nan
    assert torch.equal(ops.gae(r, v, next_v, **ends)[0][:12], before)


def test_truncation_is_worth_what_the_value_says_and_termination_nothing():
    one = torch.ones(1, 1)
    yes, no = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.bool)
    cut = ops.gae(one, one, 10 * one, no, yes, gamma=0.5)[0].item()
    over = ops.gae(one, one, 10 * one, yes, no, gamma=0.5)[0].item()
    assert (cut, over) == (5.0, 0.0)


def test_bad_settings_are_refused():
    given = rollout(2, 2)
    with pytest.raises(ValueError, match="gamma must be between"):
        ops.gae(*given, gamma=1.1)
    with pytest.raises(ValueError, match="lam must be between"):
        ops.gae(*given, lam=-0.1)
    with pytest.raises(RuntimeError, match="one shape"):
        ops.gae(given[0][:1], *given[1:], backend="reference")


@pytest.mark.parametrize(("steps", "rows"), [(4, 1), (1024, 1), (1025, 1), (513, 2), (33, 31), (32, 32), (129, 70)])
def test_any_tile_of_the_scan(steps, rows):
    """Sizes around the tiles of the CUDA kernel: 1024 steps of one row, 32 of 32 rows."""
    emulator.load("emulated")
    given = rollout(steps, rows, dtype=torch.float32, ends=2 / steps)
    exact = ops.gae(*(t.double() if t.is_floating_point() else t for t in given), backend="cpp")
    for mine, want in zip(ops.gae(*given, backend="emulated"), exact, strict=True):
        assert (mine - want).abs().max() < 2e-6 * want.abs().max()


@pytest.mark.parametrize("which", ["terminated", "truncated"])
def test_nothing_crosses_the_end_of_a_segment_in_the_scan(which):
    """The CUDA kernel composes maps across steps: a NaN behind an end must not come through a product with 0."""
    emulator.load("emulated")
    r, v, next_v, _, _ = rollout(75, 3, dtype=torch.float32)
    ends = {name: torch.zeros(75, 3, dtype=torch.bool) for name in ("terminated", "truncated")}
    ends[which][40] = True
    before = ops.gae(r, v, next_v, **ends, backend="emulated")[0][:41]
    for x in (r, v, next_v):
        x[41:] = torch.nan
    assert torch.equal(ops.gae(r, v, next_v, **ends, backend="emulated")[0][:41], before)


def test_compiles():
    given = rollout(12, 3, dtype=torch.float32)
    compiled = torch.compile(lambda *given: ops.gae(*given), backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, compiled(*given), ops.gae(*given)))
