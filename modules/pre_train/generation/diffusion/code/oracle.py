"""The 2-D mixture, where the exact ε is known: how well a small network learns it, and the order of every sampler."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune import optim
from finetune.diffusion import mixture, samplers
from finetune.diffusion.draw import draw
from finetune.diffusion.process import Process

MODES, SPREAD = 8, 0.15
ANGLES = torch.arange(MODES, dtype=torch.float64) * (2 * math.pi / MODES)
MEANS = torch.stack([ANGLES.cos(), ANGLES.sin()], 1)  # on the unit circle
WEIGHTS = torch.arange(1, MODES + 1, dtype=torch.float64) / (MODES * (MODES + 1) / 2)  # 1/36 … 8/36


def draw_data(count: int, generator: torch.Generator) -> Tensor:
    """(count, 2) points of the mixture."""
    mode = torch.multinomial(WEIGHTS, count, replacement=True, generator=generator)
    return (MEANS[mode] + SPREAD * torch.randn(count, 2, generator=generator, dtype=torch.float64)).float()


def exact_eps(process: Process, x: Tensor, t: Tensor) -> Tensor:
    """E[ε | x_t], (N, 2), at t (N,)."""
    out = torch.empty_like(x)
    for step in t.unique().tolist():
        at, bar = t == step, float(process.bar[step])
        sigma = math.sqrt((1 - bar) / bar)
        z = x[at].double() / math.sqrt(bar)
        out[at] = ((z - mixture.denoise(z, sigma, WEIGHTS, MEANS, SPREAD)) / sigma).float()
    return out


class Net(nn.Module):
    """ε of a point (N, 2) at t (N,): three residual layers, each told the time as waves of log SNR."""

    def __init__(self, process: Process, width: int = 128, layers: int = 3) -> None:
        super().__init__()
        self.level = (process.bar / (1 - process.bar)).log().float()
        self.waves = 0.05 * 2 ** torch.arange(8) / 2**0.5
        self.time = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))
        self.first, self.last = nn.Linear(2, width), nn.Linear(width, 2)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = self.level[t.long()][:, None] * self.waves
        said = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        h = self.first(3 * x)
        for layer in self.layers:
            h = h + layer(F.silu(h + said))
        return self.last(F.silu(h))


def learn(process: Process, steps: int, generator: torch.Generator, batch: int = 512) -> tuple[Net, float, float]:
    """A network trained to predict ε of the mixture, its mean squared error against the exact ε over all t, and that of
    predicting 0."""
    net = Net(process)
    optimizer = optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.0)
    for step in range(steps):
        x0, eps = draw_data(batch, generator), torch.randn(batch, 2, generator=generator)
        t = torch.randint(process.T, (batch,), generator=generator)
        (net(process.add_noise(x0, eps, t), t) - eps).square().mean().backward()
        optimizer.step(lr=optim.cosine(step, steps, 50, 2e-3, 0.0))
        optimizer.zero_grad()
    x0, eps = draw_data(8 * process.T, generator), torch.randn(8 * process.T, 2, generator=generator)
    t = torch.arange(process.T).repeat(8)
    x = process.add_noise(x0, eps, t)
    exact = exact_eps(process, x, t)
    with torch.no_grad():
        return net, (net(x, t) - exact).square().mean().item(), exact.square().mean().item()


def errors(steps: list[int], generator: torch.Generator) -> dict[str, list[float]]:
    """By sampler: the mean distance from the exact solution of the flow ODE, for each number of steps from σ = 10 to
    0.1 in equal ratios. Euler in σ, DDIM (Euler in x₀'s own variable), Heun and DPM-Solver++ 2M."""
    x = 10 * torch.randn(200, 2, dtype=torch.float64, generator=generator)

    def exact(z: Tensor, sigma: float) -> Tensor:
        return mixture.denoise(z, sigma, WEIGHTS, MEANS, SPREAD)

    def ddim(denoise: samplers.Denoise, z: Tensor, sigmas: list[float]) -> Tensor:
        bars = [1 / (1 + sigma**2) for sigma in sigmas]
        for i, sigma in enumerate(sigmas[:-1]):
            y = samplers.ddim_step(z * math.sqrt(bars[i]), denoise(z, sigma), bars[i], bars[i + 1])
            z = y / math.sqrt(bars[i + 1])
        return z

    methods = {"ddim": ddim, "euler": samplers.sample_euler, "heun": samplers.sample_heun,
               "dpm_solver_2m": samplers.sample_dpm_solver_2m}  # fmt: skip

    def at(method, count: int) -> Tensor:
        return method(exact, x, torch.logspace(1, -1, count + 1, dtype=torch.float64).tolist())

    truth = at(samplers.sample_heun, 8 * max(steps))
    return {name: [float((at(m, n) - truth).norm(dim=1).mean()) for n in steps] for name, m in methods.items()}


def order(steps: list[int], found: list[float]) -> float:
    """The slope −d log error / d log steps between the second half of the points."""
    first = len(steps) // 2
    return math.log(found[first] / found[-1]) / math.log(steps[-1] / steps[first])


def sample(net: Net, process: Process, count: int, generator: torch.Generator, steps: int = 50) -> Tensor:
    """(count, 2) points drawn by DDIM from the learned ε."""

    @torch.no_grad()
    def predict(x: Tensor, t: float) -> Tensor:
        return net(x, torch.full((len(x),), t))

    return draw(predict, process, lambda: torch.randn(count, 2, generator=generator), steps=steps, clip=False)


def mode_weights(points: Tensor) -> Tensor:
    """Share of the points nearest to each mode, (8,)."""
    return torch.cdist(points.double(), MEANS).argmin(1).bincount(minlength=MODES) / len(points)
