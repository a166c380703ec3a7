"""Encoders trained here: what they learn, what they see of the splits, their cache and their folders."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from finetune.errors import UserError
from finetune.vision import load, pictures, pretrain, save
from finetune.vision.vit import ViT, ViTConfig, sincos_2d

SHORT = replace(pretrain.RECIPES["digits"], steps=2, batch=4, count=40)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a recipe of two steps."""
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))
    monkeypatch.setitem(pretrain.RECIPES, "digits", SHORT)
    return tmp_path / "encoders"


def test_an_encoder_is_made_once_and_frozen(cache):
    heard = []
    first = pretrain.pretrained("digits", on_step=lambda step, loss: heard.append((step, loss)))
    again = pretrain.pretrained("digits", on_step=lambda step, loss: pytest.fail("it was trained again"))
    assert [step for step, _ in heard] == [0, 1]
    assert not first.training
    assert not any(parameter.requires_grad for parameter in first.parameters())
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
    other = pretrain.pretrained("digits", 1)
    assert not torch.equal(first.positions, other.positions)
    kept = [folder for folder in cache.iterdir() if folder.is_dir()]
    assert len(kept) == 2
    assert json.loads((sorted(kept)[0] / "recipe.json").read_text())["steps"] == 2


def test_a_recipe_that_changes_is_trained_again(cache, monkeypatch):
    first = pretrain.pretrained("digits")
    monkeypatch.setitem(pretrain.RECIPES, "digits", replace(SHORT, lr=3e-3))
    assert not torch.equal(first.positions, pretrain.pretrained("digits").positions)


def test_a_damaged_cache_says_what_to_remove(cache):
    pretrain.pretrained("digits")
    folder = next(each for each in cache.iterdir() if each.is_dir())
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match=f"damaged.*remove {folder}"):
        pretrain.pretrained("digits")


def test_an_unknown_recipe_is_one_line():
    with pytest.raises(UserError, match=r"no encoder 'digit': they are digits, .*mnist.*did you mean 'digits'"):
        pretrain.pretrained("digit")


def test_training_leaves_the_random_state_and_stays_the_same():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first, second = pretrain.train(SHORT), pretrain.train(SHORT)
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(first.positions, second.positions)


def test_halves_are_means_of_columns():
    grid = torch.arange(32.0).view(1, 4, 4, 2)
    found = pretrain.halves(grid.flatten(1, 2))
    torch.testing.assert_close(found[0, 0], grid[0, :, :2].mean((0, 1)))
    torch.testing.assert_close(found[0, 1], grid[0, :, 2:].mean((0, 1)))


def test_inputs_are_padded_with_gray_to_a_square():
    x = torch.full((1, 1, 8, 16), 255, dtype=torch.uint8)
    found = pretrain.inputs(x)
    assert found.shape == (1, 3, 16, 16)
    assert (found[:, :, 4:12] == 1).all()
    torch.testing.assert_close(found[:, :, [0, 1, 2, 3, 12, 13, 14, 15]], torch.full((1, 3, 8, 16), 127 / 127.5 - 1))


def test_positions_begin_as_sines_and_tell_the_sides_apart():
    encoder = pretrain.train(replace(SHORT, steps=0, sines=True))
    assert torch.equal(encoder.positions[1:], sincos_2d(64, 4, 4))


def test_contrast_is_clips_loss():
    """By the definition: the cross-entropy of each image over all captions, and of each caption over all images."""
    g = torch.Generator().manual_seed(0)
    seen, told = (F.normalize(torch.randn(5, 4, generator=g), dim=1) for _ in range(2))
    similar = 7 * torch.tensor([[float(a @ b) for b in told] for a in seen])
    expected = -(torch.log_softmax(similar, 1).diag().mean() + torch.log_softmax(similar, 0).diag().mean()) / 2
    torch.testing.assert_close(pretrain.contrast(seen, told, torch.tensor(7.0)), expected)


def test_contrast_learns_which_caption_belongs_to_which_image():
    """From ln 64, which is chance among 64, down; equal captions in a batch keep it from 0."""
    losses = []
    recipe = replace(pretrain.RECIPES["contrast_digits"], steps=150, batch=64, count=1000)
    pretrain.train(recipe, on_step=lambda step, loss: losses.append(loss))
    assert losses[0] > 0.9 * math.log(64)
    assert sum(losses[-5:]) / 5 < 0.87 * math.log(64)


def test_a_caption_is_its_words_and_an_end():
    told = pretrain.Captions(["red heart", "sun"], 8)
    tokens, lengths = told.encode(["red sun", "blue"])
    red, sun = told.words["red"], told.words["sun"]
    assert tokens.tolist() == [[red, sun, pretrain.END], [pretrain.UNKNOWN, pretrain.END, pretrain.END]]
    assert lengths.tolist() == [3, 2]
    alone = told.embed(tokens[1:, :2], lengths[1:])
    torch.testing.assert_close(told.embed(tokens, lengths)[1:], alone)


def encoder_sees(name, monkeypatch):
    """The digit images that a recipe's training pictures are made of."""
    seen = []
    made = pictures.make
    monkeypatch.setattr(pictures, "make", lambda original, *rest: seen.append(made(original, *rest)) or seen[-1])
    pretrain.train(replace(pretrain.RECIPES[name], steps=1, batch=2, count=2000))
    return set(seen[0].sources.unique().tolist())


@pytest.mark.parametrize("name", ["digits", "contrast_digits"])
def test_no_encoder_sees_another_split(name, monkeypatch):
    trained_on = encoder_sees(name, monkeypatch)
    others = pictures.load("digits", {"validation": 300, "test": 600}, size=8, kinds=("left",))
    for split in others.values():
        assert not trained_on & set(split.sources.unique().tolist())


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long), pytest.param(2, marks=pytest.mark.long)])
def test_patches_say_which_digit_is_in_their_half(seed):
    """The features that a language model takes: a linear probe of half means on unseen digits."""
    recipe = pretrain.RECIPES["digits"]
    encoder = pretrain.pretrained("digits", seed)
    train, test = (pretrain.split_of(recipe, seed, name) for name in ("train", "test"))
    with torch.no_grad():
        seen, unseen = (
            torch.cat([pretrain.halves(encoder.features(pretrain.inputs(x))) for x in split.x[:2000].split(500)])
            for split in (train, test)
        )
    probe = torch.linalg.lstsq(
        F.pad(seen.flatten(0, 1), (0, 1), value=1.0), F.one_hot(train.digits[:2000].flatten(), 10).float()
    ).solution
    found = (F.pad(unseen.flatten(0, 1), (0, 1), value=1.0) @ probe).argmax(1)
    right = (found == test.digits[:2000].flatten()).float().mean()
    assert right >= 0.93, f"{right:.3f}; chance .10, a logistic regression on one digit .969"


SHAPES = {
    "clip": {"class_token": True, "pre_norm": True, "patch_bias": False, "activation": "quick_gelu"},
    "projected": {"class_token": True, "pre_norm": True, "patch_bias": False, "projection": 6},
    "siglip": {"class_token": False, "pooling": "attention"},
    "headless": {"class_token": False, "pooling": "none", "activation": "gelu"},
}


def encoder(**changed):
    torch.manual_seed(0)
    made = ViT(ViTConfig(**({"height": 12, "width": 12, "patch": 4, "dim": 16, "layers": 3, "heads": 2} | changed)))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return made.eval()


@pytest.mark.parametrize("kind", SHAPES)
def test_a_saved_encoder_comes_back(kind, tmp_path):
    made = encoder(**SHAPES[kind])
    save.vit(made, tmp_path)
    back = load.vit(tmp_path)
    assert back.config == made.config
    for name, parameter in made.named_parameters():
        assert torch.equal(parameter, back.get_parameter(name)), name


@pytest.mark.peer
@pytest.mark.parametrize("kind", SHAPES)
@torch.no_grad()
def test_transformers_opens_a_saved_encoder(kind, tmp_path):
    import transformers

    made = encoder(**SHAPES[kind])
    save.vit(made, tmp_path)
    named = json.loads((tmp_path / "config.json").read_text())["architectures"][0]
    theirs, report = getattr(transformers, named).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    x = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    out = theirs(x, output_hidden_states=True)
    torch.testing.assert_close(made.states(x, -2), out.hidden_states[-2], atol=1e-5, rtol=1e-5)
    if kind == "projected":
        torch.testing.assert_close(made.projection(made(x)), out.image_embeds, atol=1e-5, rtol=1e-5)
    elif kind != "headless":
        torch.testing.assert_close(made(x), out.pooler_output, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"positions": "sincos", "class_token": True}, "positions = 'sincos' cannot be saved: CLIP's has 'learned'"),
        ({"width": 16, "class_token": True, "pre_norm": True, "patch_bias": False}, "width = 16"),
        ({"class_token": False, "pooling": "mean"}, "pooling = 'mean' cannot be saved: SigLIP's has 'none'"),
    ],
)
def test_a_shape_without_a_place_in_transformers_is_named(changed, says, tmp_path):
    with pytest.raises(UserError, match=says):
        save.vit(encoder(**changed), tmp_path / "out")
    assert not (tmp_path / "out").exists()
