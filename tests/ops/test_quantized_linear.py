"""ops.quantized_linear: what test_ops.py does not ask: layouts, exact values, rows that do not depend on each other."""

import pytest
import torch
from torch.nn import functional as F

from finetune import ops
from finetune.environment import CPU_LEVELS
from finetune.ops.quantized_linear import (
    FORMATS,
    QuantizedWeight,
    dense,
    halves,
    huge,
    nf4,
    random_weight,
)
from finetune.peft import quantize

LEVELS = CPU_LEVELS[: CPU_LEVELS.index(torch.ops.finetune.cpu_level_supported()) + 1]
# Name, options of random_weight
KINDS = {
    "fp32": ("fp32", {}),
    "bf16": ("bf16", {}),
    "int8": ("int8", {"half": False}),
    "int8 in 32": ("int8", {"group": 32}),
    "int8 in 16": ("int8", {"group": 16, "half": False}),
    "int4": ("int4", {}),
    "int4 without minima": ("int4", {"minima": False}),
    "nf4": ("nf4", {"half": False}),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def weight_of(kind: str, n: int, k: int, seed: int = 0) -> QuantizedWeight:
    name, how = KINDS[kind]
    return random_weight(name, n, k, torch.Generator().manual_seed(seed), **how)


@pytest.fixture
def level():
    """Sets the level; the one before comes back afterwards."""
    before = torch.ops.finetune.cpu_level()
    yield torch.ops.finetune.set_cpu_level
    torch.ops.finetune.set_cpu_level(before)


# --- weights


@each_kind
@pytest.mark.parametrize(("n", "k"), [(1, 1), (16, 64), (37, 70), (48, 192), (5, 257)])
def test_packing_loses_nothing(kind, n, k):
    weight = weight_of(kind, n, k)
    packed = weight.packed("cpu")
    assert packed.layout == "cpu"
    assert packed.packed("cpu") is packed
    assert torch.equal(packed.dequantize(), weight.dequantize())
    again = packed.laid_out("rows")
    for mine, want in zip(again.tensors, weight.tensors, strict=True):
        assert torch.equal(mine.float(), want.float())
    whole = -(-n // 16) * 16 == n and k % 64 == 0
    assert packed.nbytes == weight.nbytes if whole else packed.nbytes > weight.nbytes


def test_dequantized_by_hand():
    codes = torch.tensor([[0, 15, 3, 8], [1, 2, 4, 7]], dtype=torch.uint8)
    scale, minimum = torch.tensor([[0.5], [2.0]]), torch.tensor([[-1.0], [0.25]])
    four = QuantizedWeight("int4", halves(codes), scale, minimum, 32, (2, 4))
    assert four.codes.tolist() == [[0 + 16 * 15, 3 + 16 * 8], [1 + 16 * 2, 4 + 16 * 7]]
    assert four.dequantize().tolist() == [[-1.0, 6.5, 0.5, 3.0], [2.25, 4.25, 8.25, 14.25]]
    symmetric = QuantizedWeight("int4", halves(codes), scale, None, 32, (2, 4))
    assert symmetric.dequantize().tolist() == [[-4.0, 3.5, -2.5, 0.0], [-14.0, -12.0, -8.0, -2.0]]
    eight = QuantizedWeight("int8", torch.tensor([[-128, 127, 3]], dtype=torch.int8), torch.ones(1, 1), None, 3, (1, 3))
    assert eight.dequantize().tolist() == [[-128.0, 127.0, 3.0]]
    assert eight.dequantize(torch.float64).dtype == torch.float64


@pytest.mark.parametrize("double", [False, True])
def test_nf4_is_that_of_the_frozen_layers_to_the_bit(double):
    layer = quantize.NF4Linear(torch.nn.Linear(192, 40), double=double)
    absmax = quantize.double_dequantize(layer.absmax, layer.maxima, layer.offset) if double else layer.absmax
    weight = nf4(layer.codes, absmax, (40, 192))
    for layout in ("rows", "cpu"):
        assert torch.equal(weight.laid_out(layout).dequantize(), layer.weight)
    with pytest.raises(ValueError, match="blocks of 64 do not fit into rows of 96"):
        nf4(layer.codes, absmax, (80, 96))


def test_int8_is_that_of_the_frozen_layers_to_the_bit():
    layer = quantize.Int8Linear(torch.nn.Linear(70, 40))
    weight = QuantizedWeight("int8", layer.codes, layer.absmax[:, None] / 127, None, 70, (40, 70))
    assert torch.equal(weight.packed("cpu").dequantize(), layer.weight)


def test_weights_may_lie_in_one_piece_of_huge_pages():
    weights = [weight_of(kind, n, 64).packed("cpu") for n, kind in ((40, "int4"), (16, "bf16"), (33, "int8"))]
    slab, at = huge(sum(weight.nbytes for weight in weights)), 0
    assert slab.data_ptr() % 2**21 == 0
    assert not slab.any()

    def moved(t):
        nonlocal at
        at += t.nbytes
        return slab[at - t.nbytes : at].view(t.dtype).view(t.shape).copy_(t)

    x = torch.randn(3, 64)
    for weight in weights:
        there = weight.mapped(moved)
        assert torch.equal(there.dequantize(), weight.dequantize())
        assert torch.equal(ops.quantized_linear(x, there), ops.quantized_linear(x, weight))
    assert huge(0).numel() == 0


def test_what_is_not_such_a_weight_is_refused():
    codes, scale = torch.zeros(4, 8, dtype=torch.int8), torch.ones(4, 1)
    for message, make in (
        ("format 'int3' is not one of fp32", lambda: QuantizedWeight("int3", codes, scale, None, 8, (4, 8))),
        (r"codes of int8 weights \(4, 9\) are", lambda: QuantizedWeight("int8", codes, scale, None, 9, (4, 9))),
        ("has groups of", lambda: QuantizedWeight("int8", codes, scale, None, 4, (4, 8))),
        ("only int4 has minima", lambda: QuantizedWeight("int8", codes, scale, scale, 8, (4, 8))),
        ("int8, int4 and nf4 have scales", lambda: QuantizedWeight("int8", codes, None, None, 8, (4, 8))),
        (r"are \[4, 1\] float16 or", lambda: QuantizedWeight("int8", codes, scale.double(), None, 8, (4, 8))),
        ("float32 or bfloat16", lambda: dense(scale.half())),
        ("layout 'npu' is not one of rows, cpu", lambda: dense(scale).laid_out("npu")),
        (r"x must be \(..., 8\)", lambda: ops.quantized_linear(torch.ones(2, 7), dense(torch.ones(4, 8)))),
        (r"bias \(4,\)", lambda: ops.quantized_linear(torch.ones(8), dense(torch.ones(4, 8)), torch.ones(3))),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_the_binding_refuses_tensors_that_are_not_the_weight():
    weight = weight_of("int4", 20, 64).packed("cpu")
    x, own = torch.randn(2, 64), torch.ops.finetune.quantized_linear
    given = (x, weight.codes, weight.scale, weight.minimum, None, 3, 20, 32)
    assert own(*given).shape == (2, 20)
    for at, wrong in (
        (1, weight.codes[:1]),
        (2, weight.scale.float()[:1]),
        (2, None),
        (3, weight.minimum.float()),
        (5, 9),
        (6, 40),
        (7, 33),
        (0, torch.randn(2, 63 + 64)),
        (4, torch.ones(3)),
    ):
        with pytest.raises(RuntimeError, match="finetune::quantized_linear"):
            own(*given[:at], wrong, *given[at + 1 :])


# --- products


@each_kind
@pytest.mark.parametrize("at", LEVELS)
def test_a_row_has_the_same_bits_in_any_company(kind, at, level):
    """1, few and many rows, at any place among them, with any number of threads."""
    level(at)
    weight, threads = weight_of(kind, 90, 320).packed("cpu"), torch.get_num_threads()
    g = torch.Generator().manual_seed(1)
    for dtype in (torch.float32, torch.bfloat16):
        x = (torch.randn(66, 320, generator=g) * torch.rand(66, 1, generator=g)).to(dtype)
        alone = torch.stack([ops.quantized_linear(row, weight) for row in x])
        try:
            for count in (1, 2, 7, 8, 9, 64, 65):
                torch.set_num_threads(1 + count % 3)
                for first in {0, 1, 66 - count}:
                    rows = slice(first, first + count)
                    assert torch.equal(ops.quantized_linear(x[rows], weight), alone[rows]), (count, first)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", ["int8", "int8 in 32", "int8 in 16", "int4", "int4 without minima"])
def test_integer_activations_err_by_half_a_unit_of_their_row(kind):
    """An element of x is rounded to a multiple of its row's largest / 32639. With outliers, and a long K."""
    weight = weight_of(kind, 48, 4160)
    ends = torch.iinfo(weight.codes.dtype)
    weight.codes[0], weight.codes[1] = ends.min, ends.max  # the largest sums that there are
    g = torch.Generator().manual_seed(2)
    x = torch.randn(6, 4160, generator=g)
    x[0, 7], x[1], x[2], x[3] = 300.0, x[1].sign(), 1.0, -1.0
    x = x.bfloat16()
    y = ops.quantized_linear(x, weight.packed("cpu")).double()
    w = weight.dequantize(torch.float64)
    exact = x.double() @ w.T
    unit = x.double().abs().amax(-1, keepdim=True) / 32639
    bound = 0.5 * unit * w.abs().sum(1) + 2**-8 * exact.abs() + 1e-5 * (x.double().abs() @ w.abs().T)
    assert ((y - exact).abs() <= bound).all()


@pytest.mark.parametrize("at", [at for at in LEVELS if at != "amx"])
@pytest.mark.parametrize("kind", ["int4", "int4 without minima"])
def test_int4_takes_x_in_bf16_as_it_is(kind, at, level):
    """Next to an outlier in its row, too, by which integers would be coarse: nothing but the sums is rounded."""
    level(at)
    weight = weight_of(kind, 40, 320)
    x = torch.randn(9, 320, generator=torch.Generator().manual_seed(3))
    x[:, 7] = 1e5
    weight.codes[:, 3] &= 15  # the outlier's codes, the high halves, …
    weight.codes[:, 3] |= 8 << 4
    if kind == "int4":  # … mean 0 with the minima, too
        weight.minimum[:, 0] = -8 * weight.scale[:, 0]
    x = x.bfloat16()
    y = ops.quantized_linear(x, weight.packed("cpu")).double()
    w = weight.dequantize(torch.float64)
    size = x.double().abs() @ w.abs().T
    exact = x.double() @ w.T
    assert w[:, 7].abs().max() == 0
    assert ((y - exact).abs() <= 2**-8 * exact.abs() + 1e-5 * size).all()


def test_a_row_that_is_not_finite_spoils_no_other():
    x = torch.randn(9, 96).bfloat16()
    x[2, 5], x[7, 0] = torch.nan, torch.inf
    good = torch.tensor([i not in (2, 7) for i in range(9)])
    for kind in KINDS:
        weight = weight_of(kind, 20, 96).packed("cpu")
        y = ops.quantized_linear(x, weight)
        assert not y[~good].isfinite().any()
        assert torch.equal(y[good], ops.quantized_linear(x[good], weight))


def test_a_weight_in_rows_is_packed_for_the_call():
    x = torch.randn(2, 64)
    for kind in KINDS:
        weight = weight_of(kind, 20, 64)
        assert torch.equal(ops.quantized_linear(x, weight), ops.quantized_linear(x, weight.packed("cpu")))


def test_gradients_are_the_references(monkeypatch):
    monkeypatch.setattr(ops.REGISTRY["quantized_linear"], "warned", set())
    weight, x = weight_of("int4", 20, 64), torch.randn(3, 64, requires_grad=True)
    with pytest.warns(UserWarning, match="no backward pass"):
        y = ops.quantized_linear(x, weight)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(grad, weight.dequantize().sum(0).expand(3, -1), atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(
            ops.quantized_linear(x, weight, backend="cpp"), F.linear(x, weight.dequantize()), atol=1e-5
        )


def test_every_format_has_a_sample():
    assert {s.args[1].format for s in ops.REGISTRY["quantized_linear"].samples()} == set(FORMATS)
