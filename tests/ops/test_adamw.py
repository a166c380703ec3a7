"""ops.adamw_ and ops.clip_grad_norm_ against torch's, and what tests/ops/test_ops.py does not cover."""

import pytest
import torch

from finetune import ops
from finetune.kernels import emulator

HYPER = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
SHAPES = [(70, 33), (1,), (40000,), (3, 5, 7)]  # 40000: more than one piece of the parallel loop


def draw(*seeds, dtype=torch.float32):
    for seed in seeds:
        g = torch.Generator().manual_seed(seed)
        yield [torch.randn(*shape, generator=g).to(dtype) for shape in SHAPES]


def test_many_steps_stay_with_torch():
    (params, start), moments = draw(0, 0), [[torch.zeros(s) for s in SHAPES] for _ in range(2)]
    theirs = [p.clone().requires_grad_() for p in start]
    exact = [p.double().requires_grad_() for p in start]
    others = [torch.optim.AdamW(ps, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1) for ps in (theirs, exact)]
    for step in range(1, 21):
        (grads,) = draw(step)
        for p, q, g in zip(theirs, exact, grads, strict=True):
            p.grad, q.grad = g, g.double()
        for other in others:
            other.step()
        ops.adamw_(params, grads, *moments, **HYPER, step=step, backend="cpp")
    for mine, torchs, want in zip(params, theirs, exact, strict=True):
        unit = torch.finfo(torch.float32).eps * want.abs().max()
        assert (mine.double() - want).abs().max() <= 2 * (torchs.double() - want).abs().max() + unit


@pytest.mark.parametrize("backend", ["cpp", "emulated"])
def test_bf16_gradients_for_fp32_parameters_and_the_other_way_round(backend):
    emulator.load("emulated")
    for dtype, grad_dtype in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        results = []
        for how in (backend, "reference"):
            (params,) = draw(0, dtype=dtype)
            (grads,) = draw(1, dtype=grad_dtype)
            moments = [[torch.zeros(s) for s in SHAPES] for _ in range(2)]
            (masters,) = draw(0)
            ops.adamw_(params, grads, *moments, masters, **HYPER, step=1, backend=how)
            results.append(masters)
        for a, b in zip(*results, strict=True):
            assert torch.allclose(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("offset", [1, 2, 4])
def test_unaligned_tensors_in_cuda(offset):
    """Only tensors whose addresses all allow it are read in 16-byte pieces; the neighbors stay as they are."""
    emulator.load("emulated")
    results = []
    for backend in ("emulated", "reference"):
        lists = [torch.randn(50, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
        lists[3].square_()
        views = [[t[offset:47]] for t in lists]
        ops.adamw_(*views, **HYPER, step=3, backend=backend)
        results.append(torch.stack(lists))
    assert torch.allclose(*results, rtol=1e-6, atol=1e-7)


def test_a_graph_notices_that_a_parameter_changed():
    w = torch.randn(3, 3, requires_grad=True)
    y = (w * w).sum()
    ops.adamw_([w], [torch.ones(3, 3)], [torch.zeros(3, 3)], [torch.zeros(3, 3)], **HYPER, step=1, backend="cpp")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


class OnTheGpu(torch.Tensor):
    is_cuda = True


def test_a_cuda_graph_never_gets_a_step_that_it_would_repeat(monkeypatch):
    """lr and the bias corrections go by value: a replay would be the captured step again, without a word."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    given, codes, maxima = [torch.ones(3)], [torch.zeros(3, dtype=torch.uint8)], [torch.ones(1)]
    mine = [torch.ones(3).as_subclass(OnTheGpu)]
    for name, states in (("adamw_", [given, given]), ("adamw8bit_", [codes, maxima, codes, maxima])):
        with pytest.raises(RuntimeError, match=rf"{name}: every replay of the CUDA graph would take this step's lr"):
            getattr(ops, name)(mine, given, *states, **HYPER, step=1)
    params = [torch.ones(3)]  # on the CPU there is no graph
    ops.adamw_(params, given, [torch.zeros(3)], [torch.zeros(3)], **HYPER, step=1)
    assert params[0][0] < 1


def test_empty_lists():
    ops.adamw_([], [], [], [], **HYPER, step=1)
    assert ops.clip_grad_norm_([], 1.0) == 0


def test_a_transposed_gradient_and_a_transposed_parameter():
    p, g = torch.randn(6, 4), torch.randn(4, 6).t()
    args = {"cpp": p.clone(), "reference": p.clone()}
    for backend, param in args.items():
        ops.adamw_([param], [g], [torch.zeros(6, 4)], [torch.zeros(6, 4)], **HYPER, step=1, backend=backend)
    assert torch.allclose(args["cpp"], args["reference"], rtol=1e-6)
    with pytest.raises(ops.BackendUnavailable, match="contiguous parameters"):
        ops.adamw_([p.t()], [g.t()], [torch.zeros(4, 6)], [torch.zeros(4, 6)], **HYPER, step=1, backend="cpp")


def test_bad_arguments_are_refused():
    p, g, m = torch.zeros(4), torch.zeros(4), torch.zeros(4)
    with pytest.raises(RuntimeError, match="grads must match params"):
        ops.adamw_([p], [torch.zeros(5)], [m], [m.clone()], **HYPER, step=1, backend="cpp")
    with pytest.raises(ValueError, match="exp_avgs has 1 tensors for 2 params"):
        ops.adamw_([p, p], [g, g], [m], [m.clone()], **HYPER, step=1, backend="cpp")
    with pytest.raises(RuntimeError, match="step counts from 1"):
        ops.adamw_([p], [g], [m], [m.clone()], **HYPER, step=0, backend="cpp")
    with pytest.raises(ops.BackendUnavailable, match="moments and masters in float32"):
        ops.adamw_([p], [g], [m.bfloat16()], [m], **HYPER, step=1, backend="cpp")
    assert torch.equal(p, torch.zeros(4))


def clip_both(grads, max_norm):
    """(norm, gradients) of ours and of torch's."""
    mine = [g.clone() for g in grads]
    params = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    norm = ops.clip_grad_norm_(mine, max_norm, backend="cpp")
    return (norm, mine), (torch.nn.utils.clip_grad_norm_(params, max_norm), [p.grad for p in params])


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_equals_torch(max_norm):
    (grads,) = draw(3)
    (norm, mine), (want, theirs) = clip_both(grads, max_norm)
    exact = torch.stack([g.double().norm() for g in grads]).norm()
    assert abs(norm.double() - exact) <= torch.finfo(torch.float32).eps * exact
    assert torch.allclose(norm, want, rtol=1e-5)
    assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(mine, theirs, strict=True))
    if max_norm > norm:
        assert all(map(torch.equal, mine, grads))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_does_what_torch_does(bad):
    (grads,) = draw(4)
    grads[2][123] = bad
    (norm, mine), (want, theirs) = clip_both(grads, 1.0)
    assert torch.equal(norm, want) or (norm.isnan() and want.isnan())
    assert all(torch.allclose(a, b, equal_nan=True) for a, b in zip(mine, theirs, strict=True))


def test_squares_do_not_overflow():
    norm = ops.clip_grad_norm_([torch.full((4,), 1e30)], 1.0, backend="cpp")
    assert norm.item() == pytest.approx(2e30, rel=1e-6)


def test_mixed_dtypes_have_one_norm():
    grads = [torch.full((5,), 3.0), torch.full((7,), 2.0, dtype=torch.bfloat16)]
    norm = ops.clip_grad_norm_(grads, float("inf"), backend="cpp")
    assert norm.item() == pytest.approx((5 * 9 + 7 * 4) ** 0.5)
    assert torch.equal(grads[0], torch.full((5,), 3.0))  # max_norm = inf only measures
