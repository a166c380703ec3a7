"""Conventions that run: predictions into each other and back, the direction of t, min-SNR weights, training targets."""

import itertools

import pytest
import torch

from finetune.diffusion import schedules, targets
from finetune.diffusion.process import Process
from finetune.errors import UserError

X0, EPS = torch.randn(2, 5, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
BAR = torch.tensor([0.01, 0.2, 0.5, 0.8, 0.99], dtype=torch.float64)


def noisy(kind):
    alpha, sigma = targets.coefficients(kind, BAR)
    return targets.over(alpha, X0) * X0 + targets.over(sigma, X0) * EPS, alpha, sigma


@pytest.mark.parametrize("path", ["eps", "flow"])
@pytest.mark.parametrize(("kind", "to"), list(itertools.product([*targets.KINDS, "score"], repeat=2)))
def test_round_trips_between_all_predictions(path, kind, to):
    x, alpha, sigma = noisy(path)
    truth = {
        "eps": EPS, "x0": X0, "flow": EPS - X0, "score": -EPS / targets.over(sigma, X0),
        "v": targets.over(alpha, X0) * EPS - targets.over(sigma, X0) * X0,
    }  # fmt: skip
    there = targets.convert(kind, to, x, truth[kind], alpha, sigma)
    torch.testing.assert_close(there, truth[to])
    torch.testing.assert_close(targets.convert(to, kind, x, there, alpha, sigma), truth[kind])


@pytest.mark.parametrize("kind", targets.KINDS)
def test_a_perfect_prediction_gives_back_image_and_noise(kind):
    x, alpha, sigma = noisy(kind)
    output = targets.target(kind, X0, EPS, BAR)
    torch.testing.assert_close(targets.to_x0(kind, x, output, BAR), X0)
    for found, wanted in zip(targets.pair(kind, x, output, alpha, sigma), (X0, EPS), strict=True):
        torch.testing.assert_close(found, wanted)


def test_the_score_is_the_gradient_of_the_log_density():
    # of x = α x₀ + σ ε given x₀: log p = −|x − α x₀|² / 2σ²
    x, alpha, sigma = noisy("eps")
    x = x.requires_grad_()
    log_p = -(((x - targets.over(alpha, X0) * X0) / targets.over(sigma, X0)) ** 2).sum() / 2
    score = torch.autograd.grad(log_p, x)[0]
    torch.testing.assert_close(targets.convert("eps", "score", x.detach(), EPS, alpha, sigma), score)


@pytest.mark.parametrize("kind", targets.KINDS)
def test_t_grows_with_the_noise(kind):
    process = Process(kind, "flow" if kind == "flow" else "cosine")
    assert bool((process.bar.diff() < 0).all())
    first, last = (process.add_noise(X0, EPS, torch.full((5,), t)) for t in (0, process.T - 1))
    assert (first - X0).abs().max() < 0.05
    assert (last - EPS).abs().max() < 0.05


@pytest.mark.parametrize("kind", targets.KINDS)
def test_min_snr_weights_are_min_snr_in_x0(kind):
    # a small error of the prediction is an error of x₀; its weight there is min(SNR, γ)
    x, _, _ = noisy(kind)
    error = 1e-4
    moved = targets.target(kind, X0, EPS, BAR) + error
    in_x0 = (targets.to_x0(kind, x, moved, BAR) - X0)[:, 0, 0, 0].abs()
    weight = targets.min_snr_weight(kind, BAR, gamma=5.0)
    torch.testing.assert_close(weight * error**2, targets.snr(kind, BAR).clamp(max=5) * in_x0**2, rtol=1e-6, atol=0)
    assert bool(targets.min_snr_weight(kind, torch.tensor([0.0, 0.5])).isfinite().all())


def test_refusals():
    x, _, _ = noisy("eps")
    for call, named in (
        (lambda: targets.target("noise", X0, EPS, BAR), "noise"),
        (lambda: targets.to_x0("eps", x, EPS, 0.0), "zero terminal SNR"),
        (lambda: targets.pair("x0", x, X0, *targets.coefficients("x0", 1.0)), "x0"),
        (lambda: Process("eps", zero_snr=True), "zero terminal SNR"),
        (lambda: Process("eps", "flow"), "flow"),
        (lambda: Process("flow", "linear"), "flow"),
        (lambda: Process("epsilon"), "epsilon"),
        (lambda: Process("eps", "sigmoid"), "sigmoid"),
        (lambda: Process("eps", T=1), "two timesteps"),
    ):
        with pytest.raises(UserError, match=named) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_what_is_left_at_the_end_is_printed_and_a_short_process_warned_about():
    long, short = Process("eps", "linear", 1000).notes(), Process("eps", "linear", 50).notes()
    assert len(long) == 1
    assert "√ᾱ_T = 0.00635" in long[0]
    assert any("warning" in line and "T = 50" in line and "78%" in line for line in short)
    assert len(Process("v", "linear", 50, zero_snr=True).notes()) == 1
    assert Process("v", zero_snr=True).bar[-1] == 0


def test_tables_of_the_paper():
    # Ho et al. 2020: T = 1000, β from 1e-4 to 0.02; ᾱ falls to 4e-5, so that KL(q(x_T|x_0) ‖ N(0, I)) ≈ 1e-5 bits/dim
    process = Process()
    beta = schedules.betas("linear", 1000)
    assert float(process.bar[-1]) == pytest.approx(4.036e-5, rel=1e-3)
    small, large = (v.exp() for v in process.log_variances())
    torch.testing.assert_close(large, beta)
    before = process.bar[:-1]
    torch.testing.assert_close(small[1:], beta[1:] * (1 - before) / (1 - process.bar[1:]))
    assert small[0] == small[1]
