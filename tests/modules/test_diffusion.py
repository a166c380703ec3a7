"""diffusion: toy targets on three seeds, controls, the bound against closed forms, resume, drawing from a run."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import seeds
import torch
from PIL import Image

from finetune.cli import main as command
from finetune.diffusion import images
from finetune.diffusion.judge import train_judge
from finetune.diffusion.process import Process
from finetune.errors import UserError
from finetune.runs import registry
from finetune.runs.run import execute

INFO = registry.find("diffusion")
MODULE = registry.load(INFO)
bound, oracle, unet = (registry.part("diffusion", name) for name in ("bound", "oracle", "unet"))
QUICK = {"bound_rows": 0, "oracle_steps": 0, "exhibits": False}


@pytest.fixture
def quick_judge(monkeypatch):
    """A judge of a few steps, where a test does not ask what it says."""
    monkeypatch.setattr(MODULE, "train_judge", lambda *data: train_judge(*data, steps=5))


def run(folder, **settings):
    return execute(INFO, dataclasses.replace(MODULE.Config.toy(), **settings), folder, toy=True)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A run of a few steps with everything in it."""
    folder = tmp_path_factory.mktemp("diffusion") / "run"
    settings = {"steps": 12, "batch": 16, "samples": 40, "bound_rows": 1, "oracle_steps": 5, "guidance": 2.0}
    settings |= {"width": 16, "heads": 2}
    return folder, run(folder, **settings)


@pytest.mark.parametrize("seed", seeds.THREE)
@pytest.mark.slow
def test_the_toy_draws_digits(tmp_path, seed):
    summary = run(tmp_path / "run", seed=seed, exhibits=False, bound_rows=1)
    assert summary["passed"]
    found, checks = summary["metrics"], summary["checks"]
    assert found["judge"] >= 0.8
    assert found["frechet"] <= 150 < checks["noise_frechet"]["value"]
    assert found["bits_per_dim"] < summary["baseline"]["bits_per_dim"]
    assert found["mixture_error"] < 0.05 < summary["baseline"]["mixture_error"]
    assert checks["mixture_weights_off"]["value"] < 0.06
    for name, order in (("ddim", 1), ("euler", 1), ("heun", 2), ("dpm_solver_2m", 2)):
        assert checks[f"order_{name}"]["value"] == pytest.approx(order, abs=0.25)


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_shuffled_labels_leave_the_judge_at_chance(tmp_path, seed):
    found = run(tmp_path / "run", seed=seed, shuffle=True, **QUICK)["metrics"]
    assert found["judge"] < 0.2
    assert found["frechet"] < 150  # the images are digits all the same


@pytest.mark.parametrize("shuffle", [False, True])
def test_labels_are_learned_and_shuffled_ones_are_not(tmp_path, shuffle):
    # the quick form of the control above, on two classes that anybody tells apart
    value = np.array([[60], [190]]).repeat(60, 1).reshape(-1, 1, 1)
    x = value + np.random.default_rng(0).integers(0, 20, (120, 4, 4))
    np.savez(tmp_path / "two.npz", x=x.astype(np.uint8), labels=np.arange(2).repeat(60))
    settings = {"steps": 120, "levels": 1, "width": 16, "heads": 2, "samples": 200, "data": tmp_path / "two.npz"}
    found = run(tmp_path / "run", shuffle=shuffle, **{**QUICK, **settings})["metrics"]
    assert 0.3 < found["judge"] < 0.7 if shuffle else found["judge"] > 0.95


def test_without_steps_nothing_is_drawn(tmp_path, quick_judge):
    summary = run(tmp_path / "run", steps=0, samples=100, **QUICK)
    assert summary["passed"] is False
    assert summary["metrics"]["frechet"] > 1000


# --- the bound


def test_the_bounds_terms_are_the_kl_of_two_gaussians():
    process = Process("eps", "linear", 50)
    t, rng = torch.tensor([1, 7, 30, 49]), torch.Generator().manual_seed(0)
    x0, found = torch.randn(2, 4, 1, 2, 2, generator=rng, dtype=torch.float64)
    for name in ("small", "large"):
        log_var = bound.log_variance(process, t, x0, None, name)
        ours = bound.step_bits(process, x0, found, log_var, t)
        for i, step in enumerate(t.tolist()):
            bar, before = float(process.bar[step]), float(process.bar[step - 1])
            beta = 1 - bar / before
            pull = math.sqrt(before) * beta / (1 - bar)
            true = math.sqrt(beta * (1 - before) / (1 - bar))
            said = math.sqrt(beta) if name == "large" else true
            normal = torch.distributions.Normal
            kl = torch.distributions.kl_divergence(normal(pull * x0[i], true), normal(pull * found[i], said))
            assert float(ours[i]) == pytest.approx(float(kl.mean()) / math.log(2), rel=1e-5)


def test_cells_have_the_probability_of_all_values_together():
    levels = torch.linspace(-1, 1, 17, dtype=torch.float64).reshape(17, 1, 1, 1)
    mean, log_var = torch.full_like(levels, 0.37), torch.full_like(levels, math.log(0.03))
    assert float(bound.cell_log_probability(levels, mean, log_var, 17).exp().sum()) == pytest.approx(1, abs=1e-9)


def test_the_bound_of_a_perfect_denoiser_of_a_gaussian_is_its_entropy():
    # Data N(0, s²) on fine cells: with the exact posterior mean and many steps the bound is tight.
    scale, levels = 0.3, 256
    process = Process("x0", "linear", 1000)
    values = (torch.randn(4000, 1, 1, 1, generator=torch.Generator().manual_seed(0)) * scale).clamp(-1, 1)
    x = images.to_bytes(values)
    data = images.Images(x, torch.zeros(len(x), dtype=torch.int64), ("all",))

    def predict(labels):
        def x0(x, t):
            bar = process.bar[t].float()[:, None, None, None]
            return bar.sqrt() * scale**2 / (bar * scale**2 + 1 - bar) * x

        return x0

    bits, terms = bound.bound(predict, process, data, data, "large", torch.Generator().manual_seed(1), rows=64)
    entropy = math.log2(scale * math.sqrt(2 * math.pi * math.e) * (levels - 1) / 2)
    assert bits == pytest.approx(entropy, abs=0.08)
    assert bits > entropy - 0.03  # it is a bound
    assert bound.gaussian_bits(data, data) == pytest.approx(entropy, abs=0.02)
    assert float(terms[bound.cut(process, levels)]) > 0


def test_the_chain_is_cut_where_noise_is_half_a_cell():
    process = Process()
    assert bound.cut(process, 256) == 0
    at = bound.cut(process, 17)
    sigma = ((1 - process.bar) / process.bar).sqrt()
    assert sigma[at - 1] < 1 / 16 <= sigma[at]


def test_the_prior_is_nearly_reached():
    x0 = torch.rand(10, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert bound.prior_bits(Process(), x0).mean() < 1e-4  # Ho et al. 2020, section 4: about 1e-5
    assert bound.prior_bits(Process("eps", "linear", 50), x0).mean() > 1e-2


# --- the network


def test_the_network_begins_with_nothing_and_sees_time_and_label():
    torch.manual_seed(0)
    net = unet.UNet(1, 10, levels=3, blocks=2)
    x, t, labels = torch.randn(2, 1, 8, 12), torch.tensor([3.0, 500.0]), torch.tensor([1, 10])
    assert torch.equal(net(x, t, labels), torch.zeros_like(x))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.05)
    out = net(x, t, labels)
    assert (net(x, t + 100, labels) - out).abs().max() > 1e-3
    assert (net(x, t, labels.flip(0)) - out).abs().max() > 1e-3
    torch.testing.assert_close(net(x[:1], t[:1], labels[:1]), out[:1], atol=1e-5, rtol=1e-5)
    assert unet.UNet(3, 2, learned_variance=True)(torch.randn(1, 3, 8, 8), t[:1], labels[:1]).shape == (1, 6, 8, 8)


def test_attention_mixes_all_pixels():
    torch.manual_seed(0)
    layer = unet.Attention(32, 4)
    torch.nn.init.normal_(layer.out.weight)
    x = torch.randn(1, 32, 4, 4, requires_grad=True)
    layer(x)[0, 0, 0, 0].backward()
    assert bool((x.grad.abs().sum(1) > 0).all())


# --- runs


@pytest.mark.parametrize(
    "settings",
    [
        {"prediction": "v", "schedule": "cosine", "zero_snr": True, "sampler": "ddpm"},
        {"prediction": "x0", "schedule": "scaled_linear", "sampler": "heun", "spacing": "karras", "min_snr": 5.0},
        {"prediction": "flow", "exhibits": True, "bound_rows": 1, "oracle_steps": 10, "width": 8, "heads": 1},
        {"learned_variance": True, "sampler": "ddpm", "bound_rows": 1, "timesteps": 100, "oracle_steps": 5},
        {
            "sampler": "ddim",
            "eta": 1.0,
            "dropout": 0.1,
            "images": "mnist",
            "side": 16,
            "levels": 3,
            "width": 16,
            "heads": 2,
            "guidance": 3.0,
        },
    ],
    ids=["v", "x0", "flow", "learned", "mnist"],
)
def test_every_option_trains_and_draws(tmp_path, quick_judge, settings):
    common = {"steps": 4, "batch": 8, "samples": 20, "sample_steps": 4}
    summary = run(tmp_path / "run", **{**QUICK, **common, **settings})
    assert math.isfinite(summary["metrics"]["frechet"])
    with Image.open(tmp_path / "run/samples.png") as opened:
        assert min(opened.size) > 300


def test_a_short_run_writes_its_pictures(short):
    folder, summary = short
    for name in ("samples", "samplers", "samplers_curve", "interpolation", "inpainting", "nearest", "bound", "oracle"):
        assert (folder / f"{name}.png").stat().st_size > 1000, name
    with Image.open(folder / "denoising.gif") as opened:
        assert 10 <= opened.n_frames <= 41  # GIF joins frames that are equal
    assert summary["checks"]["inpainting_known_pixels_off"]["value"] == 0


def test_resumed_it_is_the_same_to_the_bit(tmp_path, quick_judge):
    settings = {**QUICK, "steps": 6, "batch": 8, "samples": 20, "checkpoint_every": 3, "dropout": 0.1}
    whole = run(tmp_path / "whole", **settings)
    run(tmp_path / "part", **settings)
    (tmp_path / "part/summary.json").unlink()
    shutil.rmtree(tmp_path / "part/checkpoints/step_000006")
    cfg = dataclasses.replace(MODULE.Config.toy(), **settings)
    again = execute(INFO, cfg, tmp_path / "part", toy=True, resume=True)
    assert again["metrics"] == whole["metrics"]
    one, other = (tmp_path / name / "model/model.safetensors" for name in ("whole", "part"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"prediction": "eps", "zero_snr": True}, "zero terminal SNR"),
        ({"prediction": "flow", "sampler": "ddim"}, "euler or heun"),
        ({"sampler": "ddpm", "eta": 0.5}, "eta"),
        ({"sample_steps": 2000}, "1 to 1000"),
        ({"sampler": "ddim", "spacing": "karras"}, "karras"),
        ({"samples": 1}, "one image"),
    ],
)
def test_settings_that_do_not_go_together(settings, says):
    with pytest.raises(UserError, match=says) as caught:
        MODULE.Config(**settings)
    assert "\n" not in str(caught.value)


def test_too_few_images_are_refused(tmp_path):
    np.savez(tmp_path / "few.npz", x=np.zeros((3, 8, 8), np.uint8))
    with pytest.raises(UserError, match="3 images are too few"):
        run(tmp_path / "run", data=tmp_path / "few.npz")


def test_one_class_is_drawn_without_a_judge(tmp_path):
    x = np.random.default_rng(0).integers(0, 255, (30, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "one.npz", x=x)
    small = {"steps": 2, "batch": 8, "samples": 10, "width": 8, "heads": 1}
    found = run(tmp_path / "run", data=tmp_path / "one.npz", **{**QUICK, **small})["metrics"]
    assert "judge" not in found
    assert found["frechet"] > 0


def test_memory_of_training_is_the_formulas(short):
    rows = {row["name"]: row for row in short[1]["memory"]}
    assert set(rows) == {"weights", "gradients", "optimizer states", "EMA", "activations"}
    assert all(row["predicted"] == row["measured"] > 0 for row in rows.values())


@pytest.mark.parametrize(
    ("settings", "side"),
    [
        ({"width": 16, "heads": 2, "levels": 1}, (6, 5)),
        ({"width": 24, "heads": 1, "levels": 3, "blocks": 2, "attention": 0, "dropout": 0.2}, (8, 16)),
        ({"width": 32, "levels": 3, "attention": 2, "learned_variance": True}, (8, 8)),
    ],
)
def test_activations_are_the_formula(settings, side):
    """Every part of the network, of a picture that is not square, with and without attention and dropout."""
    plan = registry.part("diffusion", "cost").plan({"channels": 2, "classes": 3, **settings}, 3, side)
    assert all(row["predicted"] == row["measured"] > 0 for row in plan.rows())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"levels": 5}, "cannot be halved 4 times"),
        ({"width": 30}, "multiple of 8"),
        ({"data": "nowhere.npz"}, "no such"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(tmp_path, settings, says):
    with pytest.raises(UserError, match=says):
        run(tmp_path / "run", **settings)
    assert not (tmp_path / "run/checkpoints").exists()


def test_images_of_ones_own_train_and_are_drawn(tmp_path, quick_judge):
    for name, value in (("dark", 40), ("light", 200)):
        (tmp_path / "mine" / name).mkdir(parents=True)
        for i in range(12):
            noise = np.random.default_rng(i).integers(0, 30, (8, 8, 3), dtype=np.uint8)
            Image.fromarray((value + noise).astype(np.uint8)).save(tmp_path / "mine" / name / f"{i}.png")
    options = ["--data", tmp_path / "mine", "--out", tmp_path / "run", "--steps", 3, "--batch", 8, "--samples", 6]
    small = ["--toy", "--oracle-steps", 0, "--no-exhibits", "--bound-rows", 1]
    assert command(["run", "diffusion", *map(str, options + small)]) == 0
    shape = json.loads((tmp_path / "run/model/config.json").read_text())
    assert shape["classes"] == ["dark", "light"]
    assert shape["image"] == [3, 8, 8]


# --- finetune sample


def drawn(capsys, *words):
    code = command(["sample", *map(str, words)])
    return code, capsys.readouterr()


def test_sample_draws_from_a_finished_run(short, tmp_path, capsys):
    folder, _ = short
    words = ("--labels", "3,7,none", "--steps", 5, "--sampler", "heun", "--json")
    code, said = drawn(capsys, folder, *words, "--seed", 4, "--out", tmp_path / "a.png")
    assert code == 0
    found = json.loads(said.out)
    assert found["labels"] == ["3", "7", "none"]
    assert (found["steps"], found["sampler"], found["guidance"]) == (5, "heun", 2.0)
    with Image.open(tmp_path / "a.png") as opened:
        both = np.asarray(opened)
    drawn(capsys, folder, "--labels", "7", *words[2:], "--seed", 5, "--out", tmp_path / "b.png")
    with Image.open(tmp_path / "b.png") as opened:
        alone = np.asarray(opened)
    side = alone.shape[1]
    there = both[: alone.shape[0], side - 6 : 2 * side - 6].astype(int)  # the second image: seed 4 + 1
    assert np.abs(there - alone).max() <= 1
    code, said = drawn(capsys, folder, "--animate", "--labels", "1", "--steps", 4, "--out", tmp_path / "c.gif")
    assert code == 0
    assert "1 image" in said.out
    with Image.open(tmp_path / "c.gif") as opened:
        assert 2 <= opened.n_frames <= 5  # GIF joins frames that are equal


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--labels", "12"), "'12' is not among the classes (0, 1,"),
        (("--labels", "cat"), "'cat'"),
        (("--steps", "2000"), "1 to 1000"),
        (("--sampler", "plms"), "plms"),
        (("--sampler", "ddim", "--spacing", "karras"), "karras"),
        (("--out", "picture.jpg"), ".png"),
    ],
)
def test_sample_refuses_in_one_line(short, capsys, words, says):
    code, said = drawn(capsys, short[0], *words)
    assert code == 2
    assert says in said.err
    assert len(said.err.strip().splitlines()) == 1


def test_sample_refuses_what_is_no_run(short, tmp_path, capsys):
    code, said = drawn(capsys, tmp_path)
    assert code == 2
    assert "not the folder of a run" in said.err
    started = tmp_path / "started"
    started.mkdir()
    (started / "config.json").write_bytes((short[0] / "config.json").read_bytes())
    assert "not finished" in drawn(capsys, started)[1].err
    settings = json.loads((short[0] / "config.json").read_text())
    (started / "config.json").write_text(json.dumps(settings | {"module": "nanogpt"}))
    assert "draws no images" in drawn(capsys, started)[1].err
