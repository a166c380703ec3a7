"""The dit module: what it learns to draw, its controls, its commands. Its network: test_dit_network.py."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from resumed import resumes_to_the_same_bytes
from summaries import check_values

from finetune import sample
from finetune.diffusion import images
from finetune.errors import UserError
from finetune.runs import registry
from finetune.runs.run import execute

INFO = registry.find("dit")
main = registry.load(INFO)
convert = registry.part("dit", "convert")


def toy(**changes):
    return dataclasses.replace(main.Config.toy(), **changes)


def small(**changes):
    """A few steps, for what does not depend on how well it learns."""
    given = {"steps": 3, "batch": 4, "samples": 20, "sample_steps": 3, "judge_steps": 5, "show_every": 2}
    return toy(**given | changes)


def run(folder, config, **changes):
    return execute(INFO, config, folder, toy=True, **changes)


@pytest.fixture(scope="module")
def absent(tmp_path_factory):
    """The toy, with a class that training never sees."""
    folder = tmp_path_factory.mktemp("dit") / "run"
    return folder, run(folder, toy(without=3, samples=200))


def test_a_class_that_was_never_seen_cannot_be_drawn(absent):
    folder, summary = absent
    assert summary["metrics"]["accuracy_of_the_removed_class"] <= 0.2
    assert check_values(summary)["accuracy_of_the_others"] >= 0.8
    for name in ("samples", "samples_over_training", "guidance", "training_curves"):
        assert (folder / f"{name}.png").stat().st_size > 1000
    assert (folder / "denoising.gif").stat().st_size > 1000


def test_accuracy_rises_with_guidance(absent):
    found = [check_values(absent[1])[f"accuracy_w{w}"] for w in (0, 1, 2)]
    assert found[0] <= 0.25
    assert found[0] + 0.4 < found[1] <= found[2] + 0.02


def test_memory_of_the_run_is_exact(absent):
    rows = absent[1]["memory"]
    assert len(rows) == 5
    assert all(row["predicted"] == row["measured"] for row in rows)


def test_without_guidance_labels_do_nothing(absent):
    """To the bit; and an image is the same in another batch."""
    model, cfg = main.opened(absent[0], toy()), toy()
    assert model.classes == tuple("0123456789")
    ones, twos = (main.sample(cfg, model, torch.full((4,), label), 0.0) for label in (1, 2))
    assert torch.equal(ones, twos)
    guided = main.sample(cfg, model, torch.full((4,), 1), 2.0)
    assert not torch.equal(guided, main.sample(cfg, model, torch.full((4,), 2), 2.0))
    alone = main.sample(cfg, model, torch.ones(1, dtype=torch.int64), 2.0)
    made = sample.sample(str(absent[0]), "1", guidance=2.0, steps=25, sampler="ddim", threads=1)
    assert made["labels"] == ["1"]
    assert made["steps"] == 25
    assert (alone.int() - guided[:1].int()).abs().max() <= 1


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_toy_draws_the_class_it_is_asked_for(seed, tmp_path):
    summary = run(tmp_path / "run", toy(seed=seed))
    assert summary["passed"], summary["metrics"]
    assert set(summary["target"]) == {"accuracy", "frechet_pixels"}


@pytest.mark.long
def test_shuffled_labels_mean_nothing(tmp_path):
    assert run(tmp_path / "run", toy(shuffle=True))["metrics"]["accuracy"] < 0.25


@pytest.mark.long
def test_a_flow_learns_too(tmp_path):
    assert run(tmp_path / "run", toy(prediction="flow", sampler="euler"))["metrics"]["accuracy"] >= 0.8


def test_an_interrupted_run_ends_with_the_same_bytes(tmp_path):
    """Metrics, the averaged weights and the pictures over training."""
    cfg = small(steps=4, checkpoint_every=1, dtype="bfloat16")
    resumes_to_the_same_bytes(INFO, cfg, tmp_path, calls=3)
    for name in (f"model/{convert.WEIGHTS}", "samples_over_training.png", "samples.png"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_step_at_zero_learning_rate_changes_nothing(tmp_path):
    for name, changes in (("none", {"steps": 0}), ("still", {"lr": 0.0})):
        run(tmp_path / name, small(**changes))
    a, b = (convert.load(tmp_path / name / "model").state_dict() for name in ("none", "still"))
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch": 3}, "--patch 3 does not divide images of 8×8"),
        ({"patch": 16}, "--patch 16 does not divide images of 8×8"),
        ({"without": 10}, "--without 10: the classes are 0 to 9"),
        ({"prediction": "flow", "sampler": "ddpm"}, "flow is sampled with"),
        ({"sample_steps": 2000}, "must be 1 to 1000"),
        ({"model": "XL", "batch": 1 << 20}, "smaller --model"),
    ],
)
def test_bad_settings_are_one_line(tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        run(tmp_path / "run", small(**changes))
    assert "\n" not in str(caught.value)


def test_images_of_ones_own(tmp_path):
    """A folder with a class each: wide pictures are refused, or cropped to the side that is asked for."""
    from PIL import Image

    for name in ("cats", "dogs"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for k in range(12):
            shade = 20 * k if name == "cats" else 255 - 20 * k
            Image.new("RGB", (12, 8), (shade, 10, 200)).save(tmp_path / "data" / name / f"{k}.png")
    with pytest.raises(UserError, match="the images are 12×8, not square"):
        run(tmp_path / "wide", small(data=tmp_path / "data"))
    summary = run(tmp_path / "run", small(data=tmp_path / "data", size=8))
    assert summary["baseline"]["accuracy"] == 0.5
    net = convert.load(tmp_path / "run/model")
    assert (net.config.channels, net.config.classes) == (3, 2)
    picture = Image.open(tmp_path / "run/samples.png")
    assert images.to_unit(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]
    assert picture.mode == "RGB"


# --- The latent stage


def test_latents_are_drawn_and_decoded(tmp_path):
    """Latents of unit variance, a DiT on them, images of the data's size; the saved autoencoder gives the same."""
    cfg = small(latent=True, patch=1, vae_steps=120)
    summary = run(tmp_path / "run", cfg)
    train, test = main.load(cfg)
    model = main.opened(tmp_path / "run", cfg)
    assert model.image == (4, 2, 2)
    coder = registry.part("dit", "vae").load(tmp_path / "run/model")
    latents = coder.encode(images.to_unit(train.x))
    assert latents.std().item() == pytest.approx(1, abs=1e-3)
    again = coder.decode(coder.encode(images.to_unit(test.x)))
    error = (again - images.to_unit(test.x)).square().mean()
    assert check_values(summary)["vae_psnr"] == pytest.approx(10 * math.log10(4 / error), abs=1e-3)
    assert error < 0.6 * images.to_unit(test.x).var()  # better than one gray for all pixels
    assert main.sample(cfg, model, torch.arange(3), 1.0).shape == (3, 1, 8, 8)
    made = sample.sample(str(tmp_path / "run"), "3,none", animate=True, threads=1)
    assert Path(made["path"]).stat().st_size > 100
    assert (tmp_path / "run/reconstructions.png").exists()


def test_images_that_make_no_latents_are_refused(tmp_path):
    with pytest.raises(UserError, match="images of 10×10 cannot be halved twice"):
        run(tmp_path / "run", small(latent=True, size=10, patch=1))
    with pytest.raises(UserError, match="does not divide latents of 2×2"):
        run(tmp_path / "run", small(latent=True, patch=4))
