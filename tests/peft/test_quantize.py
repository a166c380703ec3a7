"""Weights in 4 and 8 bits: equal to bitsandbytes' bit for bit; layers against their dense weights; what they hold."""

import pytest
import torch
from torch import nn

from finetune import memory
from finetune.lm.llama import Llama, LlamaConfig
from finetune.memory import meters
from finetune.peft.quantize import (
    BLOCK,
    NF4,
    FrozenLinear,
    Int8Linear,
    NF4Linear,
    double_dequantize,
    double_quantize,
    int8_quantize,
    nf4_dequantize,
    nf4_quantize,
    quantize_linears,
)

CONFIG = LlamaConfig(vocab_size=50, dim=64, layers=3, heads=4, kv_heads=2, hidden=96, max_length=64)
SHAPES = [(576, 1536), (7, 64), (64, 100), (3, 5), (1, 1), (129, 33)]


def weights(shape, seed=0, dtype=torch.float32):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_are_the_nearest(shape):
    w = weights(shape).flatten()
    codes, absmax = nf4_quantize(w)
    assert codes.shape == (-(-len(w) // 2),)
    assert absmax.shape == (-(-len(w) // BLOCK),)
    back = nf4_dequantize(codes, absmax, len(w))
    each = absmax.repeat_interleave(BLOCK)[: len(w)]
    nearest = (w[:, None] - NF4 * each[:, None]).abs().amin(1)
    assert ((w - back).abs() <= nearest + 1e-6 * each).all()


def test_a_block_of_zeros_stays_zero():
    w = torch.cat([torch.zeros(BLOCK), weights((BLOCK,))])
    assert not nf4_dequantize(*nf4_quantize(w), len(w))[:BLOCK].any()
    codes, absmax = int8_quantize(torch.zeros(2, 8))
    assert not codes.any()
    assert not absmax.any()


@pytest.mark.peer
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=("f32", "bf16"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nf4_equals_bitsandbytes(shape, dtype, seed):
    functional = pytest.importorskip("bitsandbytes.functional")
    w = weights(shape, seed, dtype)
    theirs, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4")
    codes, absmax = nf4_quantize(w)
    assert torch.equal(codes, theirs.flatten())
    assert torch.equal(absmax, state.absmax)
    back = nf4_dequantize(codes, absmax, w.numel()).to(dtype).view(shape)
    assert torch.equal(back, functional.dequantize_4bit(theirs, state))

    theirs, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    twice, maxima, offset = double_quantize(absmax)
    assert torch.equal(maxima, state.state2.absmax)
    assert torch.equal(offset, state.offset)
    if len(absmax) > 1:
        assert_codes_of_the_maxima(absmax, twice, state)
    state.absmax = twice
    back = nf4_dequantize(codes, double_dequantize(twice, maxima, offset), w.numel()).to(dtype).view(shape)
    assert torch.equal(back, functional.dequantize_4bit(theirs, state))


def assert_codes_of_the_maxima(absmax, twice, state):
    """Equal to what bitsandbytes gives by its definition, the nearest value, which its kernel for float64 follows. Its
    CPU kernel for fp32 first rounds to 16 bits, so near the middle of two values it may take the other one."""
    exact, _ = torch.ops.bitsandbytes.quantize_blockwise(
        (absmax - state.offset).double(), state.state2.code, state.state2.blocksize
    )
    assert torch.equal(twice, exact)
    assert (twice.int() - state.absmax.int()).abs().max() <= 8  # the values around 0 are closer than 16 bits
    assert (twice != state.absmax).sum() <= max(1, len(twice) // 100)


@pytest.mark.peer
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_equals_bitsandbytes(shape):
    functional = pytest.importorskip("bitsandbytes.functional")
    w = weights(shape)
    theirs, absmax, _ = functional.int8_vectorwise_quant(w)
    mine = int8_quantize(w)
    assert torch.equal(mine[0], theirs)
    assert torch.equal(mine[1], absmax)


@pytest.mark.peer
def test_nf4_equals_bitsandbytes_on_smollm2(smollm2_model):
    """The layers of three blocks; double quantization too."""
    functional = pytest.importorskip("bitsandbytes.functional")
    for name, m in smollm2_model.named_modules():
        if isinstance(m, nn.Linear) and name.split(".")[1] in ("0", "15", "29"):
            theirs, state = functional.quantize_4bit(
                m.weight.data, blocksize=64, quant_type="nf4", compress_statistics=True
            )
            mine = NF4Linear(m)
            assert torch.equal(mine.codes, theirs.flatten()), name
            assert torch.equal(mine.maxima, state.state2.absmax), name
            assert torch.equal(mine.offset, state.offset), name
            assert_codes_of_the_maxima(nf4_quantize(m.weight)[1], mine.absmax, state)


@pytest.mark.parametrize("make", [NF4Linear, lambda m: NF4Linear(m, double=False), Int8Linear], ids=("2", "1", "8"))
def test_a_layer_and_its_gradient_are_those_of_its_dense_weight(make):
    dense = nn.Linear(100, 24, bias=False)
    layer = make(dense)
    error = (layer.weight - dense.weight).abs().max() / dense.weight.abs().max()
    assert 0 < error < 0.16  # half the widest gap of NF4 is 0.152 of the block's largest weight
    dense.weight.data.copy_(layer.weight)
    x = torch.randn(3, 7, 100, requires_grad=True)
    assert torch.equal(layer(x), dense(x))
    got, want = (torch.autograd.grad(f(x).square().sum(), x)[0] for f in (layer, dense))
    assert torch.allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("format", ["nf4", "nf4_double", "int8"])
def test_bytes_are_predicted_and_nothing_dense_is_kept(format):
    torch.manual_seed(0)
    model = Llama(CONFIG)
    plain = model(torch.arange(40)[None])
    quantize_linears(model, format)
    assert sum(isinstance(m, FrozenLinear) for m in model.modules()) == 7 * CONFIG.layers
    setup = memory.Setup(batch=1, seq=40, lora_rank=2, quantized=format)
    terms = {t.name: t.bytes for t in memory.predict(memory.shape_of(CONFIG), setup)}
    adapters = 4 * memory.counts.adapter_parameters(memory.shape_of(CONFIG), 2, memory.shape_of(CONFIG).linears)
    assert meters.weight_bytes(model) == terms["weights"] - adapters
    error = (model(torch.arange(40)[None]) - plain).abs().max() / plain.abs().max()
    assert 0 < error < (0.02 if format == "int8" else 0.3)


def test_a_pass_widens_one_layer_at_a_time():
    """Most that a forward and backward pass allocates at once stays below a quarter of the dense weights."""
    model = Llama(LlamaConfig(vocab_size=50, dim=256, layers=12, heads=4, kv_heads=2, hidden=512, max_length=64))
    dense = sum(m.weight.nbytes for m in model.modules() if isinstance(m, nn.Linear))
    quantize_linears(model, "nf4_double")
    tokens = torch.arange(8)[None]
    peak = meters.peak_allocated(lambda: model(tokens).sum().backward())
    assert peak < 0.25 * dense
