"""The judge and the measures of fidelity: closed forms; what they say of real images, copies, Gaussians and noise."""

import pytest
import torch

from finetune.diffusion import fidelity
from finetune.diffusion.images import load
from finetune.diffusion.judge import train_judge


@pytest.fixture(scope="module")
def digits():
    return load("digits").split(1 / 3)


@pytest.fixture(scope="module")
def judge(digits):
    return train_judge(*digits)


def test_frechet_of_gaussians_is_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(200_000, 2, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 2.0])
    b = torch.randn(200_000, 2, generator=generator, dtype=torch.float64) * torch.tensor([3.0, 0.5]) + 1
    # diagonal covariances: |Δμ|² + Σ (s_a − s_b)²
    assert fidelity.frechet(a, b) == pytest.approx(2 + 4 + 2.25, rel=0.02)
    assert fidelity.frechet(a, a) == pytest.approx(0, abs=1e-6)
    assert fidelity.frechet(a, b) == pytest.approx(fidelity.frechet(b, a), rel=1e-9)
    turn = torch.linalg.qr(torch.randn(2, 2, generator=generator, dtype=torch.float64))[0]
    assert fidelity.frechet(a @ turn, b @ turn) == pytest.approx(fidelity.frechet(a, b), rel=1e-9)
    with pytest.raises(ValueError, match="two rows"):
        fidelity.frechet(a[:1], b)


@pytest.mark.peer
def test_frechet_equals_scipys_matrix_root():
    from scipy.linalg import sqrtm

    a, b = torch.randn(2, 60, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    b = b @ torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) + 0.3
    ca, cb = torch.cov(a.T), torch.cov(b.T)
    root = torch.from_numpy(sqrtm((ca @ cb).numpy()).real)
    other = ((a.mean(0) - b.mean(0)) ** 2).sum() + (ca + cb - 2 * root).trace()
    assert fidelity.frechet(a, b) == pytest.approx(float(other), rel=1e-6)


def test_one_nearest_neighbor():
    a, b = torch.randn(2, 300, 4, generator=torch.Generator().manual_seed(0))
    assert fidelity.nearest_neighbor_two_sample(a, b) == pytest.approx(0.5, abs=0.07)
    assert fidelity.nearest_neighbor_two_sample(a, b + 50) == 1
    assert fidelity.nearest_neighbor_two_sample(a, a + 1e-9) == 0  # copies


def test_memorization_tells_copies():
    train, test = torch.randn(2, 200, 4, generator=torch.Generator().manual_seed(0))
    copied, usual = fidelity.memorization(train[:100] + 1e-4, train, test)
    assert copied < 1e-6 < usual
    again, same = fidelity.memorization(test, train, test)
    assert again == same == usual


def test_what_the_measures_say_of_digits(digits, judge):
    train, test = digits
    noise = torch.randint(256, test.x.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    some = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[: len(test)]
    rows = {
        "real": fidelity.fidelity(
            train.x[some],
            train,
            test,
            judge.features,
        ),
        "class": fidelity.fidelity(fidelity.class_gaussian(train, test.labels), train, test, judge.features),
        "one": fidelity.fidelity(fidelity.one_gaussian(train.x, len(test)), train, test, judge.features),
        "noise": fidelity.fidelity(noise, train, test, judge.features),
    }
    frechet = {name: row["frechet"] for name, row in rows.items()}
    assert frechet["real"] < 35
    assert frechet["one"] < 50  # it has the two moments that the distance looks at
    assert frechet["noise"] > 2000
    assert rows["real"]["one_nn"] == pytest.approx(0.5, abs=0.07)
    one_nn = [rows[name]["one_nn"] for name in ("real", "class", "one")]
    assert one_nn[0] + 0.05 < one_nn[1] < one_nn[2] - 0.05  # and this sees through it
    assert rows["noise"]["one_nn"] == 1
    assert rows["real"]["memorization"] == 0  # they are training images
    features = {name: row["frechet_features"] for name, row in rows.items()}
    assert max(features["real"], features["class"]) < 3
    assert 10 < features["one"] < features["noise"] / 2


def test_the_judge_knows_digits_and_not_shuffled_ones(digits, judge):
    train, test = digits
    assert judge.accuracy > 0.97
    assert (judge.classify(test.x) == test.labels).double().mean() == judge.accuracy
    assert judge.features(test.x[:5]).shape == (5, 64)
    wrong = type(train)(train.x, train.labels[torch.randperm(len(train))], train.classes)
    assert train_judge(wrong, test, steps=100).accuracy < 0.3


def test_the_judge_is_a_function_of_its_seed_and_leaves_torchs(digits):
    train, test = digits
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one = train_judge(train, test, steps=5)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(one.head.weight, train_judge(train, test, steps=5).head.weight)
    assert not torch.equal(one.head.weight, train_judge(train, test, steps=5, seed=1).head.weight)


def test_color_images_of_any_size():
    from finetune.diffusion.images import Images

    x = torch.zeros(60, 3, 20, 12, dtype=torch.uint8)
    labels = torch.arange(60) % 2
    x[labels == 1, 0] = 200
    data = Images(x, labels, ("dark", "red"))
    assert train_judge(data, data, steps=60).accuracy == 1
