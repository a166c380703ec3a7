"""ops.adamw8bit_: the map, the same bits from every backend, and that it trains like AdamW with fp32 moments."""

import importlib.util
import math

import pytest
import torch

from finetune import ops
from finetune.kernels import emulator
from finetune.ops._check import run
from finetune.ops.adamw8bit import blocks_of, dequantize, dynamic_map, quantize, states_like

OP = ops.REGISTRY["adamw8bit"]
SAMPLES = [s for s in OP.samples() if not s.bench]
HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}


@pytest.mark.parametrize("signed", [True, False])
def test_the_map(signed):
    values = dynamic_map(signed)
    assert values.shape == (256,)
    assert (values.diff() > 0).all()
    assert {0.0, 1.0} <= set(values.tolist())
    if signed:  # symmetric but for 0 and 1
        inner = values[(values != 0) & (values != 1)]
        assert torch.equal(inner, -inner.flip(0))
        assert values[values > 0].min().item() == pytest.approx(0.55e-6)
    else:
        assert (values >= 0).all()
        assert values[1].item() == pytest.approx(0.325e-6)
    for decade in range(7):  # each has its share of codes, evenly spread
        low, high = 10.0 ** (decade - 7), 10.0 ** (decade - 6)
        inside = values[(values > low) & (values < high)].double()
        assert len(inside) == (2**decade if signed else 2 ** (decade + 1))
        assert torch.allclose(inside.diff(), torch.tensor((high - low) / len(inside)).double(), rtol=1e-3)


@pytest.mark.peer
@pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="needs bitsandbytes")
@pytest.mark.parametrize("signed", [True, False])
def test_the_map_equals_bitsandbytes(signed):
    from bitsandbytes.functional import create_dynamic_map

    assert torch.equal(dynamic_map(signed), create_dynamic_map(signed=signed))


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest(signed):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    x = x * torch.logspace(-6, 0, 1000)
    x = x if signed else x.abs()
    codes, absmax = quantize(x, signed)
    assert absmax.shape == (4,)
    scaled = (x / absmax.repeat_interleave(256)[:1000]).double()
    distances = (scaled[:, None] - dynamic_map(signed).double()).abs()
    chosen = distances.gather(1, codes.long()[:, None])[:, 0]
    assert (chosen <= distances.amin(1) * (1 + 1e-6)).all()
    back = dequantize(codes, absmax, signed)
    tops = x.abs().view(-1)[:768].view(3, 256).argmax(1) + torch.arange(3) * 256
    assert torch.allclose(back[tops], x[tops], rtol=0.01)  # a negative largest element has no code of its own


@pytest.mark.parametrize("backend", ["cpp", "emulated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=("f32", "bf16"))
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.name)
def test_same_moments_as_the_reference(sample, dtype, backend):
    """To the last bit. Parameters are not: torch's square root on the CPU is not always the nearest number."""
    emulator.load("emulated")
    mine, theirs = (run("adamw8bit", sample, dtype, how) for how in (backend, "reference"))
    for i in range(len(sample.args[0]), 5 * len(sample.args[0])):
        assert torch.equal(mine[i], theirs[i])


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.name)
def test_cuda_and_cpp_agree_to_the_last_bit(sample):
    emulator.load("emulated")
    assert all(map(torch.equal, *(run("adamw8bit", sample, torch.float32, how) for how in ("cpp", "emulated"))))


@pytest.mark.parametrize("level", ["portable", "avx2"])
def test_same_bits_at_every_level(level):
    before = torch.ops.finetune.cpu_level()
    try:
        try:
            torch.ops.finetune.set_cpu_level(level)
        except RuntimeError:
            pytest.skip(f"this machine lacks {level}")
        lower = [run("adamw8bit", sample, torch.float32, "cpp") for sample in SAMPLES]
    finally:
        torch.ops.finetune.set_cpu_level(before)
    for sample, results in zip(SAMPLES, lower, strict=True):
        assert all(map(torch.equal, results, run("adamw8bit", sample, torch.float32, "cpp"))), sample.name


@pytest.mark.parametrize("offset", [1, 4])
def test_unaligned_tensors_in_cuda(offset):
    emulator.load("emulated")
    results = []
    for backend in ("emulated", "reference"):
        p, g = (torch.randn(700, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
        state = states_like(p[offset:690])
        codes = [torch.zeros(700, dtype=torch.uint8) for _ in range(2)]
        for whole, name in zip(codes, ("exp_avg", "exp_avg_sq"), strict=True):
            whole[offset:690] = state[name]
        tops = state["exp_avg_max"], state["exp_avg_sq_max"]
        lists = [p[offset:690]], [g[offset:690]], [codes[0][offset:690]], [tops[0]], [codes[1][offset:690]], [tops[1]]
        for step in (1, 2):
            ops.adamw8bit_(*lists, **HYPER, step=step, backend=backend)
        results.append((*codes, *tops, p))
    assert all(map(torch.equal, results[0][:4], results[1][:4]))
    assert torch.allclose(results[0][4], results[1][4], rtol=1e-6, atol=1e-8)


def train(eight_bit: bool, steps: int = 300) -> list[float]:
    """Losses of a two-layer regression of 64 → 128 → 8 on noisy targets."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(4096, 64, generator=g)
    y = torch.tanh(x @ torch.randn(64, 8, generator=g) / 8) + 0.1 * torch.randn(4096, 8, generator=g)
    params = [torch.randn(128, 64, generator=g) / 8, torch.zeros(128), torch.randn(8, 128, generator=g) / 12]
    for p in params:
        p.requires_grad_()
    states = [states_like(p) for p in params]
    moments = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    losses = []
    for step in range(1, steps + 1):
        loss = (torch.relu(x @ params[0].t() + params[1]) @ params[2].t() - y).square().mean()
        grads = torch.autograd.grad(loss, params)
        if eight_bit:
            lists = [[s[k] for s in states] for k in ("exp_avg", "exp_avg_max", "exp_avg_sq", "exp_avg_sq_max")]
            ops.adamw8bit_(params, grads, *lists, **HYPER | {"lr": 1e-3}, step=step)
        else:
            ops.adamw_(params, grads, *moments, **HYPER | {"lr": 1e-3}, step=step)
        losses.append(loss.item())
    return losses


def test_trains_like_adamw():
    """300 steps: the loss falls to a quarter, and stays within 2 % of that with fp32 moments."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two that share their cores with others wait for each other
    try:
        exact, coarse = train(False), train(True)
    finally:
        torch.set_num_threads(threads)
    assert exact[-1] < exact[0] / 4
    assert coarse[-1] == pytest.approx(exact[-1], rel=0.02)
    assert coarse != exact


@pytest.mark.parametrize("shape", [(1,), (256,), (257,), (3, 1000), (0,)])
def test_bytes_of_the_states(shape):
    """Two bytes a parameter and eight a block."""
    p = torch.zeros(shape)
    state = states_like(p)
    assert sum(t.numel() * t.element_size() for t in state.values()) == 2 * p.numel() + 8 * blocks_of(p)
    assert blocks_of(p) == math.ceil(p.numel() / 256)
    assert torch.equal(dequantize(state["exp_avg"], state["exp_avg_max"], True), p)


def test_bad_arguments_are_refused():
    p, g = torch.zeros(300), torch.zeros(300)
    s = states_like(p)
    lists = {name: [t] for name, t in s.items()}

    def call(**other):
        given = [[p], [g], *(lists | other).values()]
        ops.adamw8bit_(*given, **HYPER, step=1, backend="cpp")

    call()
    with pytest.raises(RuntimeError, match="exp_avg_maxs must have a float32 for every 256"):
        call(exp_avg_max=[torch.zeros(1)])
    with pytest.raises(RuntimeError, match="exp_avg_sqs must be uint8, match params"):
        call(exp_avg_sq=[torch.zeros(299, dtype=torch.uint8)])
    with pytest.raises(ops.BackendUnavailable, match="moments in uint8"):
        call(exp_avg=[torch.zeros(300)])
