"""Images: data that ship in packages, folders and npz with one line for every bad file, grids, animations."""

import importlib.util
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.diffusion import images
from finetune.diffusion.images import load, to_bytes, to_unit
from finetune.errors import UserError


def picture(path, size=(8, 8), mode="L", value=100):
    path.parent.mkdir(exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value,) * len(mode)).save(path)
    return path


def test_digits_are_scikit_learns_and_mnist_is_whole():
    digits, mnist = load("digits"), load("mnist")
    assert digits.x.shape == (1797, 1, 8, 8)
    assert mnist.x.shape == (5000, 1, 28, 28)
    assert mnist.labels.bincount().tolist() == [500] * 10
    assert digits.x.dtype == torch.uint8
    assert digits.x.unique().tolist() == [round(v * 255 / 16) for v in range(17)]
    assert int(mnist.x.max()) == 255
    small = load("mnist", 14)
    assert small.x.shape == (5000, 1, 14, 14)
    assert small.x.float().mean() == pytest.approx(float(mnist.x.float().mean()), rel=0.02)


@pytest.mark.peer
def test_digits_equal_scikit_learns_loader():
    from sklearn.datasets import load_digits

    theirs, ours = load_digits(), load("digits")
    assert torch.equal(ours.labels, torch.from_numpy(theirs.target))
    assert np.array_equal(np.rint(ours.x[:, 0].numpy() * (16 / 255)), theirs.images)


@pytest.mark.peer
def test_digits_without_scikit_learn_come_from_its_wheel(monkeypatch):
    there, asked = load("digits"), []
    folder = Path(importlib.util.find_spec("sklearn").origin).parent
    packed = (folder / "datasets/data/digits.csv.gz").read_bytes()
    monkeypatch.setattr(images.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(images.wheels, "member", lambda wheel, name: asked.append((wheel.package, name)) or packed)
    assert torch.equal(load("digits").x, there.x)
    assert asked == [("scikit-learn==1.7.2", "sklearn/datasets/data/digits.csv.gz")]


def test_a_split_holds_out_a_share_of_each_class():
    digits = load("digits")
    train, test = digits.split(0.25)
    assert len(train) + len(test) == len(digits)
    share = test.labels.bincount() / digits.labels.bincount()
    assert (share - 0.25).abs().max() < 0.01
    again = digits.split(0.25)[1]
    assert torch.equal(test.x, again.x)
    assert not torch.equal(test.x[:50], digits.split(0.25, seed=1)[1].x[:50])


def test_bytes_survive_the_unit_scale():
    x = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(to_bytes(to_unit(x)), x)
    assert torch.equal(
        to_bytes(torch.tensor([-2.0, -1.0, 1.0, 3.0])), torch.tensor([0, 0, 255, 255], dtype=torch.uint8)
    )


def test_a_folder_of_classes_and_formats(tmp_path):
    picture(tmp_path / "cat/a.png", mode="RGB", value=10)
    picture(tmp_path / "cat/b.jpg", mode="RGB", value=20)
    picture(tmp_path / "dog/c.webp", mode="RGBA", value=0)  # wholly transparent: white
    (tmp_path / "dog/notes.txt").write_text("not an image")
    found = load(tmp_path)
    assert found.classes == ("cat", "dog")
    assert found.labels.tolist() == [0, 0, 1]
    assert found.x.shape == (3, 3, 8, 8)
    assert found.x[0].unique().tolist() == [10]
    assert found.x[2].unique().tolist() == [255]


def test_a_folder_without_classes_and_gray_images(tmp_path):
    picture(tmp_path / "a.png", value=3)
    picture(tmp_path / "b.png", value=4)
    found = load(tmp_path)
    assert found.x.shape == (2, 1, 8, 8)
    assert found.classes == (tmp_path.name,)
    picture(tmp_path / "c.png", mode="RGB")
    assert load(tmp_path).x.shape == (3, 3, 8, 8)


def broken(path):
    whole = picture(path, (64, 64), "RGB").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def animated(path):
    frames = [Image.new("RGB", (8, 8), (value,) * 3) for value in (0, 255)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    ("name", "make", "says"),
    [
        ("bad.png", broken, "not a readable image"),
        ("bad.jpg", lambda p: p.write_bytes(b"hello"), "not a readable image"),
        ("empty.png", lambda p: p.write_bytes(b""), "not a readable image"),
        ("moves.webp", animated, "animation of 2 frames"),
        ("moves.png", animated, "animation of 2 frames"),
        ("wide.png", lambda p: picture(p, (9, 8)), "9×8"),
        ("huge.png", lambda p: picture(p, (600, 600)), "600×600"),
        ("deep.png", lambda p: Image.fromarray(np.ones((8, 8), np.uint16)).save(p), "8 bits"),
    ],
)
def test_every_bad_image_is_one_line_that_names_the_file(tmp_path, name, make, says):
    picture(tmp_path / "a.png")
    make(tmp_path / name)
    with pytest.raises(UserError, match=says) as caught:
        load(tmp_path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_size_makes_different_images_alike(tmp_path):
    picture(tmp_path / "a.png", (40, 20))
    picture(tmp_path / "b.png", (600, 700))
    assert load(tmp_path, 16).x.shape == (2, 1, 16, 16)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"y": np.zeros(3, int)}, "no array x"),
        ({"x": np.zeros((3, 8, 8))}, "uint8"),
        ({"x": np.zeros((3, 8), np.uint8)}, "shape"),
        ({"x": np.zeros((0, 8, 8), np.uint8)}, "shape"),
        ({"x": np.zeros((3, 2, 8, 8), np.uint8)}, "shape"),
        ({"x": np.zeros((3, 8, 8), np.uint8), "labels": np.zeros(2, int)}, "labels"),
        ({"x": np.zeros((3, 8, 8), np.uint8), "labels": np.array([0, -1, 1])}, "labels"),
        ({"x": np.zeros((3, 8, 8), np.uint8), "labels": np.zeros(3)}, "labels"),
        ({"x": np.array([{}, 1], dtype=object)}, "not a readable npz"),
    ],
)
def test_a_bad_npz_is_one_line(tmp_path, arrays, says):
    path = tmp_path / "mine.npz"
    np.savez(path, **arrays)
    with pytest.raises(UserError, match=says) as caught:
        load(path)
    assert "mine.npz" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_npz_layouts(tmp_path):
    path, rng = tmp_path / "mine.npz", np.random.default_rng(0)
    x = rng.integers(0, 256, (4, 8, 6, 3), dtype=np.uint8)
    for stored in (x, x.transpose(0, 3, 1, 2)):
        np.savez(path, x=stored, labels=[0, 2, 1, 2])
        found = load(path)
        assert np.array_equal(found.x.numpy(), x.transpose(0, 3, 1, 2))
        assert found.classes == ("0", "1", "2")
    np.savez(path, x=x[..., 0])
    assert load(path).x.shape == (4, 1, 8, 6)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="not a readable npz"):
        load(path)


@pytest.mark.parametrize(
    ("source", "says"), [("nothing", "no such"), ("cifar10", "digits, mnist, emoji"), ("", "holds no")]
)
def test_sources_that_are_not_there(tmp_path, source, says):
    with pytest.raises(UserError, match=says):
        load(tmp_path / source if source != "cifar10" else source)


def test_emoji_need_a_color_font(monkeypatch, tmp_path):
    monkeypatch.setattr(images, "FONTS", ())
    with pytest.raises(UserError, match="fonts-noto-color-emoji"):
        load("emoji")
    (tmp_path / "font.ttf").write_bytes(b"no font")
    with pytest.raises(UserError, match="cannot be used as a font"):
        images.emoji(font=(str(tmp_path / "font.ttf"), 109))


def test_emoji_have_their_unicode_names(monkeypatch):
    """With a font that draws noise by the character; the one of U+1F601 looks like that of U+1F600."""
    from PIL import ImageDraw, ImageFont

    class Face:
        def getbbox(self, text):
            return 0, 0, 8, 8

    class Pen:
        def __init__(self, canvas):
            self.canvas = canvas

        def text(self, place, text, font, embedded_color):
            seed = ord(text) - (text == "\U0001f601")
            noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            self.canvas.paste(Image.fromarray(noise))

    monkeypatch.setattr(ImageFont, "truetype", lambda *font: Face())
    monkeypatch.setattr(ImageDraw, "Draw", Pen)
    found = images.emoji(8, ("any.ttf", 8), named=True)
    assert found.labels.tolist() == list(range(len(found)))
    assert len(set(found.classes)) == len(found.classes) == len(found) > 1000
    assert "grinning face" in found.classes
    assert "grinning face with smiling eyes" not in found.classes
    cat = found.x[found.classes.index("cat face")]
    noise = np.random.default_rng(ord("\U0001f431")).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert np.array_equal(cat.permute(1, 2, 0).numpy(), noise)
    assert images.emoji(8, ("any.ttf", 8)).classes == ("emoji",)


def test_emoji_of_this_machines_font():
    try:
        found = load("emoji", 16)
    except UserError as e:
        pytest.skip(str(e))
    assert len(found) > 500
    assert found.x.shape[1:] == (3, 16, 16)


def test_a_grid_holds_every_image_in_its_place(tmp_path):
    x = torch.randint(256, (5, 1, 3, 4), dtype=torch.uint8)
    made = images.grid(x, columns=2, gap=1, enlarge=2)
    assert made.shape == (1, 2 * (3 * 4 + 1), 2 * (2 * 5 + 1))
    small = made[:, ::2, ::2]
    for i in range(5):
        top, left = (i // 2) * 4 + 1, (i % 2) * 5 + 1
        assert torch.equal(small[:, top : top + 3, left : left + 4], x[i])
    images.save(tmp_path / "grid.png", made)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "grid.png")), made[0].numpy())


@pytest.mark.parametrize("suffix", [".gif", ".png"])
@pytest.mark.parametrize("channels", [1, 3])
def test_animations_move(tmp_path, suffix, channels):
    frames = [torch.full((channels, 6, 6), value, dtype=torch.uint8) for value in (0, 120, 255)]
    images.animation(tmp_path / f"a{suffix}", frames)
    with Image.open(io.BytesIO((tmp_path / f"a{suffix}").read_bytes())) as opened:
        assert opened.n_frames == 3
        for i, value in enumerate((0, 120, 255)):
            opened.seek(i)
            assert np.asarray(opened.convert("L")).mean() == pytest.approx(value, abs=2)
    with pytest.raises(UserError, match="gif"):
        images.animation(tmp_path / "a.mp4", frames)
