"""Every sampler against diffusers' scheduler of the same name, step for step over whole loops."""

import math

import pytest
import torch

from finetune.diffusion import samplers, schedules

T = 1000
BAR = schedules.alphas_bar(schedules.betas("linear", T))
STEPS = [1, 2, 7, 13, 20]
pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore:__array__ implementation")]


def toy_eps(x, t):
    return torch.sin(x + t / T) * 0.9


def start():
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


def sigma_of(t):
    return math.sqrt((1 - BAR[t]) / BAR[t])


def denoiser(ts):
    """denoise(z, σ) of the toy ε at the timesteps ts."""
    place = {sigma_of(t): t for t in ts}

    def denoise(z, sigma):
        return z - sigma * toy_eps(z / math.sqrt(1 + sigma**2), place[sigma])

    return denoise, [*place, 0.0]


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", ["euler", "heun", "dpm_solver_2m"])
def test_loops_over_sigma_equal_diffusers(name, steps, spacing):
    import diffusers

    common = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "timestep_spacing": spacing}
    if name == "euler":
        other = diffusers.EulerDiscreteScheduler(**common)
    elif name == "heun":
        other = diffusers.HeunDiscreteScheduler(**common)
    else:
        other = diffusers.DPMSolverMultistepScheduler(**common, final_sigmas_type="zero")
    other.set_timesteps(steps)
    ts = schedules.timesteps(T, steps, spacing)
    theirs = list(dict.fromkeys(int(t) for t in other.timesteps))  # its Heun lists them twice
    if name == "dpm_solver_2m" and spacing == "leading":
        # its leading spacing divides T by N + 1; ours, as DDIM's, by N
        ts = theirs
    assert theirs == ts
    denoise, sigmas = denoiser(ts)
    x = start()
    if name == "dpm_solver_2m":  # it steps in x_t, the others in z = x_t / √ᾱ_t
        ours = samplers.sample_dpm_solver_2m(denoise, x / math.sqrt(BAR[ts[0]]), sigmas)
        for t in other.timesteps:
            x = other.step(toy_eps(x, int(t)), t, x).prev_sample
    else:
        z = x * sigmas[0]
        ours = getattr(samplers, f"sample_{name}")(denoise, z, sigmas)
        x = z
        for t in other.timesteps:
            x = other.step(toy_eps(other.scale_model_input(x, t), int(t)), t, x).prev_sample
    torch.testing.assert_close(ours, x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("steps", STEPS)
def test_the_flow_loop_equals_diffusers(steps):
    from diffusers import FlowMatchEulerDiscreteScheduler

    other = FlowMatchEulerDiscreteScheduler(num_train_timesteps=T)
    times = [1 - i / steps for i in range(steps)]
    other.set_timesteps(sigmas=times)
    ours = samplers.sample_flow(lambda x, t: toy_eps(x, t * T), start(), [*times, 0.0])
    x = start()
    for t in other.timesteps:
        x = other.step(toy_eps(x, float(t)), t, x).prev_sample
    torch.testing.assert_close(ours, x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", ["small", "large", "learned", "ddim0", "ddim.5"])
def test_ancestral_loops_equal_diffusers(name, steps):
    from diffusers import DDIMScheduler, DDPMScheduler

    if name.startswith("ddim"):
        other = DDIMScheduler(clip_sample=False, beta_start=1e-4)
    else:
        kind = "learned_range" if name == "learned" else f"fixed_{name}"
        other = DDPMScheduler(clip_sample=False, beta_start=1e-4, variance_type=kind)
    other.set_timesteps(steps)
    ts = schedules.timesteps(T, steps, "leading")
    assert other.timesteps.tolist() == ts
    generator, theirs = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    x = y = start()
    for t, following in zip(ts, [*ts[1:], None], strict=True):
        a, b = float(BAR[t]), 1.0 if following is None else float(BAR[following])
        x0 = (x - math.sqrt(1 - a) * toy_eps(x, t)) / math.sqrt(a)
        if name.startswith("ddim"):
            eta = float(name[4:])
            noise = torch.randn(4, 3, generator=generator) if eta else None
            x = samplers.ddim_step(x, x0, a, b, eta, noise)
            y = other.step(toy_eps(y, t), t, y, eta=eta, generator=theirs).prev_sample
        else:
            noise = torch.randn(4, 3, generator=generator)
            output = toy_eps(y, t)
            if name == "learned":
                output = torch.cat([output, torch.cos(3 * y)], 1)
            x = samplers.ddpm_step(x, x0, a, b, noise, torch.cos(3 * x) if name == "learned" else name)
            y = other.step(output, t, y, generator=theirs).prev_sample
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize("zero", [False, True])
def test_betas_equal_diffusers(kind, zero):
    from diffusers import DDIMScheduler

    theirs = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}[kind]
    other = DDIMScheduler(beta_schedule=theirs, beta_start=1e-4, rescale_betas_zero_snr=zero)
    own = schedules.betas(kind, T)
    own = schedules.zero_terminal_snr(own) if zero else own
    torch.testing.assert_close(schedules.alphas_bar(own).float(), other.alphas_cumprod, atol=1e-5, rtol=0)


def test_karras_sigmas_equal_diffusers():
    from diffusers import EDMEulerScheduler

    other = EDMEulerScheduler()
    other.set_timesteps(18)
    torch.testing.assert_close(schedules.karras_sigmas(18).float(), other.sigmas, atol=1e-5, rtol=1e-5)
