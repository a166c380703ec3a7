"""The vision transformer: its parts against their definitions."""

import pytest
import torch
import torch.nn.functional as F

from finetune.errors import UserError
from finetune.vision.vit import ViT, ViTConfig, activate, patches, sincos_2d


def encoder(**changed):
    torch.manual_seed(0)
    sizes = {"height": 12, "width": 20, "patch": 4, "dim": 16, "layers": 3, "heads": 2, "channels": 1}
    return ViT(ViTConfig(**sizes | changed))


def pictures(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_patch_and_a_linear_layer_are_a_strided_convolution():
    x, weight = pictures(2, 3, 13, 22), pictures(5, 3, 4, 4)
    theirs = F.conv2d(x, weight, stride=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(patches(x, 4) @ weight.flatten(1).T, theirs, atol=1e-5, rtol=1e-5)


def test_sincos_positions_by_their_formula():
    table = sincos_2d(8, 3, 5)
    assert table.shape == (15, 8)
    for row in range(3):
        for column in range(5):
            expected = []
            for place in (column, row):
                angles = torch.tensor([place / 1.0, place / 100.0])  # 10000^(0/2), 10000^(1/2)
                expected += [angles.sin(), angles.cos()]
            torch.testing.assert_close(table[row * 5 + column], torch.cat(expected))


def test_attention_is_not_causal_and_has_every_head():
    model = encoder()
    x = pictures(2, 7, 16)
    attn = model.blocks[0].attn
    q, k, v = (part(x).view(2, 7, 2, 8).transpose(1, 2) for part in (attn.q, attn.k, attn.v))
    expected = attn.o(((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attn(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("positions", ["learned", "sincos"])
def test_every_patch_reaches_the_pooled_vector_and_every_parameter_learns(positions):
    for pooling in ("class", "mean", "attention"):
        model = encoder(pooling=pooling, positions=positions, pre_norm=True)
        x = pictures(2, 1, 12, 20).requires_grad_()
        model(x).square().sum().backward()
        assert all((grad.abs().sum() > 0) for grad in patches(x.grad, 4).flatten(0, 1))
        learned = [n for n, p in model.named_parameters() if not n.endswith("k.bias")]  # softmax cancels that one
        assert all(model.get_parameter(name).grad.any() for name in learned)


def test_states_of_a_layer_are_what_its_block_gave():
    model, x, seen = encoder(), pictures(2, 1, 12, 20), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    last = model.states(x)
    kept = list(seen)
    assert last is kept[-1][1]
    assert last.shape == (2, 16, 16)
    for layer in (0, 1, 2, 3, -1, -2, -4):
        seen.clear()
        count = layer % 4
        state = model.states(x, layer)
        assert len(seen) == count  # later blocks are not computed
        assert torch.equal(state, kept[count][0] if count < 3 else kept[2][1])
        assert torch.equal(model.features(x, layer), state[:, 1:])
    assert torch.equal(model.features(x), model.features(x, -2))  # LLaVA's
    bare = encoder(class_token=False, pooling="mean")
    assert torch.equal(bare.features(x), bare.states(x, -2))
    for layer in (4, -5):
        with pytest.raises(UserError, match="the layers 0 to 3"):
            model.states(x, layer)


def test_pooling_by_definition():
    x = pictures(2, 1, 12, 20)
    model = encoder(pooling="class")
    torch.testing.assert_close(model(x), model.norm(model.states(x))[:, 0])
    for token in (True, False):
        model = encoder(pooling="mean", class_token=token)
        torch.testing.assert_close(model(x), model.norm(model.states(x))[:, int(token) :].mean(1))
    model = encoder(projection=6)
    torch.testing.assert_close(model.compared(x).norm(dim=-1), torch.ones(2))
    torch.testing.assert_close(model.compared(x), F.normalize(model.projection(model(x)), dim=-1))
    with pytest.raises(UserError, match="no pooling"):
        encoder(pooling="none")(x)


def test_positions_tell_places_apart():
    """Permuted patches: without positions the mean would not change."""
    x = pictures(1, 1, 12, 20)
    for positions in ("learned", "sincos"):
        model = encoder(pooling="mean", class_token=False, positions=positions)
        assert (model(x) - model(x.flip(-1))).abs().max() > 1e-3
        moved = torch.cat([x[..., 4:], x[..., :4]], -1)  # the same patches in other places
        apart = (model(x) - model(moved)).abs().max()
        with torch.no_grad():
            model.positions.zero_()
        torch.testing.assert_close(model(x), model(moved), atol=1e-5, rtol=1e-5)
        assert apart > 1e-4


@pytest.mark.parametrize("positions", ["learned", "sincos"])
def test_another_size_is_refused_or_interpolated(positions):
    model = encoder(positions=positions)
    with pytest.raises(UserError, match=r"images are 16×20, the encoder takes 12×20"):
        model(pictures(1, 1, 16, 20))
    with pytest.raises(UserError, match=r"\(1, 3, 12, 20\), not \(batch, 1, H, W\)"):
        model(pictures(1, 3, 12, 20))
    assert model.states(pictures(1, 1, 16, 24), interpolate=True).shape == (1, 25, 16)
    assert torch.equal(model.positions_of(4, 6)[0], model.positions[0])
    flat = torch.full_like(model.positions, 2.0)
    model.positions.data = flat
    torch.testing.assert_close(model.positions_of(5, 2), torch.full((11, 16), 2.0))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"heads": 3}, r"dim \(16\) must be a multiple of heads \(3\)"),
        ({"layers": 0}, "layers of at least 1, not 0"),
        ({"patch": 13}, "patches of 13 pixels do not fit into images of 12×20"),
        ({"positions": "rotary"}, "positions 'rotary' is not supported"),
        ({"activation": "relu"}, "activation 'relu' is not supported"),
        ({"pooling": "max"}, "pooling 'max' is not supported"),
        ({"class_token": False}, "needs a class token"),
        ({"dim": 18, "positions": "sincos"}, "multiple of 4, not 18"),
    ],
)
def test_a_shape_that_cannot_be_is_one_line(changed, says):
    with pytest.raises(UserError, match=says) as caught:
        encoder(**changed)
    assert "\n" not in str(caught.value)


def test_activations_differ_as_their_formulas_do():
    x = torch.linspace(-4, 4, 101)
    torch.testing.assert_close(activate(x, "quick_gelu"), x / (1 + torch.exp(-1.702 * x)))
    torch.testing.assert_close(activate(x, "gelu"), x * (1 + torch.erf(x / 2**0.5)) / 2)
    torch.testing.assert_close(activate(x, "gelu_tanh"), F.gelu(x, approximate="tanh"))
    assert (activate(x, "quick_gelu") - activate(x, "gelu")).abs().max() > 0.01


def test_it_computes_in_bf16():
    model, x = encoder().to(torch.bfloat16), pictures(2, 1, 12, 20)
    assert model(x).dtype == torch.bfloat16
    assert (model(x).float() - encoder()(x)).abs().max() < 0.1
