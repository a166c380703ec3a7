"""Schedules and samplers: of the order that theory says on an analytic mixture, and every mode with its weight."""

import math

import pytest
import torch

from finetune.diffusion import mixture, samplers, schedules, targets
from finetune.diffusion.draw import Noise, draw
from finetune.diffusion.process import Process
from finetune.errors import UserError

T = 1000


WEIGHTS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
MEANS = torch.tensor([[-2.0, 0.0], [1.0, 1.5], [1.0, -2.0]], dtype=torch.float64)


def exact(x, sigma):
    return mixture.denoise(x, sigma, WEIGHTS, MEANS, 0.5)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("dpm_solver_2m", 2)])
def test_order_of_convergence_on_the_mixture(name, order):
    sample = getattr(samplers, f"sample_{name}")
    x = 10 * torch.randn(200, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def run(method, steps):
        return method(exact, x, torch.logspace(1, -1, steps + 1, dtype=torch.float64).tolist())

    truth = run(samplers.sample_heun, 2048)
    errors = [float((run(sample, n) - truth).abs().mean()) for n in (64, 128, 256)]
    assert math.log2(errors[0] / errors[2]) / 2 == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm_solver_2m"])
@pytest.mark.parametrize("steps", [1, 2, 7, 13])
def test_the_last_step_is_the_denoised_one(sampler, steps):
    calls = []

    def denoise(x, sigma):
        calls.append(sigma)
        return torch.full_like(x, 3.0)

    values = schedules.karras_sigmas(steps).tolist()
    out = getattr(samplers, f"sample_{sampler}")(denoise, torch.randn(2, 2, dtype=torch.float64), values)
    assert torch.allclose(out, torch.full_like(out, 3.0))
    assert 0 not in calls
    assert calls[-1] == values[-2]


@pytest.mark.parametrize("spacing", schedules.SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 7, 13, T])
def test_timesteps_fall_and_are_as_many_as_asked(spacing, steps):
    ts = schedules.timesteps(T, steps, spacing)
    assert len(set(ts)) == steps
    assert ts == sorted(ts, reverse=True)
    assert 0 <= ts[-1] <= ts[0] < T
    assert spacing == "leading" or ts[0] == T - 1


def test_refusals_and_exact_guidance():
    one = torch.ones(1)
    for call in (
        lambda: schedules.betas("sigmoid", T),
        lambda: schedules.betas("linear", 0),
        lambda: schedules.timesteps(T, T + 1),
        lambda: schedules.timesteps(T, 5, "log"),
        lambda: schedules.karras_sigmas(0),
        lambda: samplers.ddpm_step(one, one, 0.5, 0.6, one, "medium"),
        lambda: samplers.ddim_step(one, one, 0.5, 0.6, eta=1),
    ):
        with pytest.raises(UserError):
            call()
    a, b = torch.randn(2, 50)
    assert torch.equal(samplers.guided(a, b, 0), a)
    assert torch.equal(samplers.guided(a, b, 1), b)
    torch.testing.assert_close(samplers.guided(a, b, 2), 2 * b - a)


def test_learned_variance_lies_between_the_fixed_ones():
    x, x0, noise = torch.randn(3, 20, dtype=torch.float64)
    for value, name in ((-1.0, "small"), (1.0, "large")):
        learned = samplers.ddpm_step(x, x0, 0.3, 0.4, noise, torch.full_like(x, value))
        torch.testing.assert_close(learned, samplers.ddpm_step(x, x0, 0.3, 0.4, noise, name))


def test_a_ddpm_step_has_the_moments_of_the_posterior():
    # q(x_{t−1} | x_t, x₀) by conditioning the joint Gaussian of x_{t−1} and x_t given x₀
    bar, before, x0, x = 0.3, 0.4, 0.7, -0.2
    alpha = bar / before
    gain = math.sqrt(alpha) * (1 - before) / (1 - bar)
    mean = math.sqrt(before) * x0 + gain * (x - math.sqrt(bar) * x0)
    variance = (1 - before) - gain * math.sqrt(alpha) * (1 - before)
    step = samplers.ddpm_step(torch.tensor(x), torch.tensor(x0), bar, before, torch.tensor([0.0, 1.0]))
    assert step[0] == pytest.approx(mean, rel=1e-6)
    assert step[1] - step[0] == pytest.approx(math.sqrt(variance), rel=1e-5)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "euler", "heun", "dpm_solver_2m", "flow"])
def test_every_sampler_draws_the_modes_with_their_weights(name):
    count, steps = 3000, 100
    flow = name == "flow"
    process = Process("flow", "flow") if flow else Process("x0")

    def predict(x, t):  # the exact x₀, or velocity
        bar = float(process.bar[int(t)])
        alpha, sigma = (float(c) for c in targets.coefficients(process.kind, bar))
        if alpha == 0:
            x0 = (WEIGHTS @ MEANS).expand_as(x)
        else:
            x0 = exact(x.double() / alpha, sigma / alpha)
        return (x - x0) / sigma if flow else x0

    noise = Noise([0], (count, 2))
    sampler = "euler" if flow else name
    out = draw(predict, process, lambda: noise()[0].double(), sampler=sampler, steps=steps, clip=False)
    modes = torch.cdist(out, MEANS).argmin(1).bincount(minlength=3)
    expected = WEIGHTS * count
    chi2 = float(((modes - expected) ** 2 / expected).sum())
    assert chi2 < 18.4, modes  # the 0.9999 quantile of χ² with two degrees of freedom
    spread = torch.stack([(out - mean)[torch.cdist(out, MEANS).argmin(1) == i].std() for i, mean in enumerate(MEANS)])
    assert spread == pytest.approx([0.5] * 3, rel=0.1)
