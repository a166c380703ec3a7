"""Quantizers of inference: their errors, the search of int4, what they refuse."""

import pytest
import torch

from finetune.errors import UserError
from finetune.inference.quantize import GROUP, quantize
from finetune.ops.quantized_linear import FORMATS
from finetune.peft.quantize import int8_quantize, nf4_dequantize, nf4_quantize

SHAPES = [(576, 192), (7, 64), (33, 100), (5, 7), (1, 1), (3, 33)]


def weights(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def groups(w):
    """(N, K) → (groups, 32), the last of a row filled with its last weight."""
    rest = w[:, -1:].expand(-1, -w.shape[1] % GROUP)
    return torch.cat([w, rest], 1).view(-1, GROUP)


def plain_int4(w):
    """Rounding between the smallest and the largest weight of a group, with fp16 scale and minimum."""
    w = groups(w)
    low = w.amin(1, keepdim=True)
    scale = ((w.amax(1, keepdim=True) - low) / 15).half().float()
    low = low.half().float()
    return ((w - low) / scale.clamp(min=1e-30)).round().clamp(0, 15) * scale + low


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=("f32", "bf16"))
@pytest.mark.parametrize("format", FORMATS)
def test_errors(shape, dtype, format):
    w = weights(shape).to(dtype)
    packed = quantize(w, format)
    assert (packed.shape, packed.format) == (shape, format)
    error = (packed.dequantize() - w.float()).abs()
    size = w.float().abs().amax(1, keepdim=True)
    within = {
        "fp32": 0,
        "bf16": 2**-8 * w.float().abs(),
        "int8": 0.51 * size / 127,
        "int4": 0.2 * size,
        "nf4": 0.16 * size,
    }
    assert (error <= within[format]).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_is_that_of_training(shape):
    codes, absmax = int8_quantize(weights(shape))
    packed = quantize(weights(shape), "int8")
    assert torch.equal(packed.codes, codes)
    assert torch.equal(packed.dequantize(), codes * (absmax[:, None] / 127))


def test_nf4_is_that_of_training():
    w = weights((33, 128))
    assert torch.equal(quantize(w, "nf4").dequantize(), nf4_dequantize(*nf4_quantize(w), w.numel()).view(33, 128))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_group_of_int4_is_worse_than_its_own_range(shape):
    w = weights(shape)
    errors = (groups(quantize(w, "int4").dequantize()) - groups(w)).square().sum(1)
    if not shape[1] % GROUP:
        assert (errors <= (plain_int4(w) - groups(w)).square().sum(1) * (1 + 1e-5)).all()
    assert errors.sum() <= (plain_int4(w) - groups(w)).square().sum() * (1 + 1e-5) + 1e-12


@pytest.mark.parametrize(
    "draw", [torch.distributions.Normal(0.0, 0.05), torch.distributions.StudentT(4.0, 0.0, 0.05)], ids=str
)
def test_the_search_of_int4_removes_a_sixth_of_the_squared_error(draw):
    torch.manual_seed(0)
    w = draw.sample((256, 512))
    error = (quantize(w, "int4").dequantize() - w).square().mean()
    assert error < 5 / 6 * (plain_int4(w).view_as(w) - w).square().mean()


def test_weights_on_a_grid_of_16_values_are_kept():
    """As those of a model whose file has 4 bits."""
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (64, GROUP), generator=g)
    codes[:, :2] = torch.tensor([0, 15])
    w = codes * (torch.rand(64, 1, generator=g) * 0.01).half().float() - torch.rand(64, 1, generator=g).half().float()
    assert (quantize(w, "int4").dequantize() - w).abs().max() <= 2**-11  # the range itself is rounded to fp16


@pytest.mark.parametrize("format", ["int8", "int4", "nf4"])
def test_constant_weights(format):
    w = torch.tensor([0.0, 0.25, -0.5])[:, None].expand(3, 40)
    assert torch.allclose(quantize(w, format).dequantize(), w, atol=1e-6)


def test_what_is_refused():
    with pytest.raises(UserError, match=r"'int3' \(only fp32, bf16, int8, int4, nf4\)"):
        quantize(weights((2, 3)), "int3")
    for format in ("int8", "int4", "nf4"):
        with pytest.raises(UserError, match=f"not a number cannot be quantized to {format}"):
            quantize(torch.tensor([[1.0, torch.nan]]), format)
    with pytest.raises(UserError, match=r"up to 1e\+06 are too large .* use int8"):
        quantize(torch.tensor([[1.0, 1e6]]), "int4")
