"""Schedules and samplers: equal to diffusers over whole loops, of the order that theory says on an analytic mixture."""

import math

import pytest
import torch

from finetune.diffusion import mixture, samplers, schedules
from finetune.errors import UserError

T = 1000
KINDS = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}


def toy_eps(x, t):
    return torch.sin(x + t / T) * 0.9


@pytest.mark.peer
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("zero", [False, True])
def test_betas_equal_diffusers(kind, zero):
    from diffusers import DDIMScheduler

    other = DDIMScheduler(beta_schedule=KINDS[kind], beta_start=1e-4, rescale_betas_zero_snr=zero)
    own = schedules.betas(kind, T)
    own = schedules.zero_terminal_snr(own) if zero else own
    torch.testing.assert_close(schedules.alphas_bar(own).float(), other.alphas_cumprod, atol=1e-5, rtol=0)


@pytest.mark.peer
@pytest.mark.parametrize("name", ["small", "large", "ddim0", "ddim.5"])
@pytest.mark.parametrize("steps", [1, 2, 7, 13, 20])
def test_ancestral_loops_equal_diffusers(name, steps):
    from diffusers import DDIMScheduler, DDPMScheduler

    bar = schedules.alphas_bar(schedules.betas("linear", T))
    if name.startswith("ddim"):
        other = DDIMScheduler(clip_sample=False, beta_start=1e-4)
    else:
        other = DDPMScheduler(clip_sample=False, beta_start=1e-4, variance_type=f"fixed_{name}")
    other.set_timesteps(steps)
    ts = schedules.timesteps(T, steps, "leading")
    assert other.timesteps.tolist() == ts
    generator, theirs = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    x = y = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    for t, following in zip(ts, [*ts[1:], None], strict=True):
        a, b = float(bar[t]), 1.0 if following is None else float(bar[following])
        if name.startswith("ddim"):
            eta = float(name[4:])
            noise = torch.randn(4, 3, generator=generator) if eta else None
            x = samplers.ddim_step(x, toy_eps(x, t), a, b, eta, noise)
            y = other.step(toy_eps(y, t), t, y, eta=eta, generator=theirs).prev_sample
        else:
            noise = torch.randn(4, 3, generator=generator)
            x = samplers.ddpm_step(x, toy_eps(x, t), a, b, noise, name)
            y = other.step(toy_eps(y, t), t, y, generator=theirs).prev_sample
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


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
    for call in (
        lambda: schedules.betas("sigmoid", T),
        lambda: schedules.timesteps(T, T + 1),
        lambda: samplers.predict_x0(torch.ones(1), torch.ones(1), 0.0),
    ):
        with pytest.raises(UserError):
            call()
    a, b = torch.randn(2, 50)
    assert torch.equal(samplers.guided(a, b, 0), a)
    assert torch.equal(samplers.guided(a, b, 1), b)
    torch.testing.assert_close(samplers.guided(a, b, 2), 2 * b - a)
