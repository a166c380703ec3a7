"""Continuous actions within bounds: policies, action values, and the targets and losses of SAC and TD3 as functions.

SAC: Haarnoja et al. 2018, arXiv:1812.05905. TD3: Fujimoto et al. 2018, arXiv:1802.09477. Q of several critics is
(C, …), the critic first. Noise is given, never drawn here: the same noise gives the same numbers.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.errors import UserError
from finetune.rl.agents.policies import Ensemble
from finetune.rl.envs.environments import Env, sizes


def bounds(env: Env) -> tuple[Tensor, Tensor]:
    """Lowest and highest action (A,) fp32. UserError if actions are no vector, or if one has no bound."""
    if not sizes(env)[2]:
        raise UserError(f"'{env.name}' has actions of {env.action_space}: a method for continuous ones needs a vector")
    low, high = (torch.tensor(x, dtype=torch.float32) for x in (env.action_space.low, env.action_space.high))
    if not (low.isfinite() & high.isfinite() & (low < high)).all():
        raise UserError(f"'{env.name}' has actions without bounds ({env.action_space}): tanh needs both")
    return low, high


def relu_mlp(widths: list[int]) -> nn.Sequential:
    """Linear layers with ReLU between, and torch's own initial weights, which is what both papers' code has."""
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Bounded(nn.Module):
    """A policy whose actions lie within bounds: center + scale · tanh(·)."""

    center: Tensor  # (A,)
    scale: Tensor  # (A,)

    def __init__(self, observations: int, outputs: int, hidden: list[int], low: Tensor, high: Tensor) -> None:
        super().__init__()
        self.net = relu_mlp([observations, *hidden, outputs])
        self.register_buffer("center", (high + low) / 2, persistent=False)
        self.register_buffer("scale", (high - low) / 2, persistent=False)


class SquashedGaussian(Bounded):
    """a = center + scale · tanh(u), u normal. Its distribution is (mean, log deviation) of u side by side (…, 2 A).

    log π is the density of the action itself: log N(u) − Σ log(scale · (1 − tanh² u)).
    """

    LEAST, MOST = -20.0, 2.0  # of the log deviation

    def __init__(self, observations: int, hidden: list[int], low: Tensor, high: Tensor) -> None:
        super().__init__(observations, 2 * len(low), hidden, low, high)

    def forward(self, observations: Tensor) -> Tensor:
        mean, log_deviation = self.net(observations).chunk(2, -1)
        return torch.cat([mean, log_deviation.clamp(self.LEAST, self.MOST)], -1)

    @property
    def target_entropy(self) -> float:
        """SAC's: −1 nat for each number of an action scaled to within −1 and 1."""
        return float(self.scale.log().sum()) - len(self.scale)

    def sample(self, params: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """noise (…, A) standard normal → actions (…, A) and log π (…); differentiable in params."""
        mean, log_deviation = params.chunk(2, -1)
        u = mean + log_deviation.exp() * noise
        return self.center + self.scale * u.tanh(), self._log_prob(u, noise, log_deviation)

    def best(self, params: Tensor) -> Tensor:
        """The action of the mean of u, which is the median."""
        return self.center + self.scale * params.chunk(2, -1)[0].tanh()

    def log_prob(self, params: Tensor, actions: Tensor, within: float = 1e-6) -> Tensor:
        """log π (…) of given actions; those on a bound, of density 0, count as `within` of the scale inside."""
        mean, log_deviation = params.chunk(2, -1)
        u = ((actions - self.center) / self.scale).clamp(within - 1, 1 - within).atanh()
        return self._log_prob(u, (u - mean) * torch.exp(-log_deviation), log_deviation)

    def _log_prob(self, u: Tensor, z: Tensor, log_deviation: Tensor) -> Tensor:
        squashed = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 − tanh² u), also where tanh² u rounds to 1
        normal = -0.5 * z.square() - log_deviation - 0.5 * math.log(2 * math.pi)
        return (normal - squashed - self.scale.log()).sum(-1)


class Deterministic(Bounded):
    """a = center + scale · tanh(net)."""

    def __init__(self, observations: int, hidden: list[int], low: Tensor, high: Tensor) -> None:
        super().__init__(observations, len(low), hidden, low, high)

    def forward(self, observations: Tensor) -> Tensor:
        return self.center + self.scale * self.net(observations).tanh()


class TwinQ(Ensemble):
    """`count` independent networks of Q(s, a)."""

    def __init__(self, observations: int, actions: int, hidden: list[int], count: int = 2) -> None:
        super().__init__(count, [observations + actions, *hidden, 1])

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:  # type: ignore[override]
        """(…, D), (…, A) → (count, …); the leading sizes are broadcast."""
        lead = observations.shape[:-1]
        if lead != actions.shape[:-1]:
            lead = torch.broadcast_shapes(lead, actions.shape[:-1])
            observations, actions = observations.expand(*lead, -1), actions.expand(*lead, -1)
        x = torch.cat([observations, actions], -1)
        return super().forward(x.reshape(-1, x.shape[-1]).expand(self.count, -1, -1)).reshape(self.count, *lead)


@torch.no_grad()
def polyak_(target: nn.Module, source: nn.Module, tau: float) -> None:
    """target ← (1 − τ) target + τ source, for every parameter."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)


# --- Targets and losses


@torch.no_grad()
def td_target(rewards: Tensor, next_values: Tensor, terminated: Tensor, gamma: float | Tensor) -> Tensor:
    """r + γ V(s'), without V(s') where nothing can follow; an episode that was cut off goes on."""
    return rewards + (gamma * next_values).masked_fill(terminated, 0.0)


def critic_loss(q: Tensor, target: Tensor) -> Tensor:
    """Σ over the critics of the mean squared error. q (C, N), target (N,)."""
    return (q - target).square().mean(-1).sum()


def soft_value(q: Tensor, log_probs: Tensor, alpha: float | Tensor) -> Tensor:
    """SAC's V(s): min over the critics of Q(s, a) − α log π(a|s), with a drawn from π. q (C, N) → (N,)."""
    return q.amin(0) - alpha * log_probs


def sac_policy_loss(q: Tensor, log_probs: Tensor, alpha: float | Tensor) -> Tensor:
    """E[α log π − min Q], where actions are drawn so that the gradient passes through them."""
    return -soft_value(q, log_probs, alpha).mean()


def temperature_loss(log_alpha: Tensor, log_probs: Tensor, target_entropy: float) -> Tensor:
    """−log α · E[log π + target]: α rises while the entropy is below its target. The usual form, in log α; the paper's
    has α in its place, and the same sign of the gradient."""
    return -log_alpha * (log_probs.detach() + target_entropy).mean()


def smoothed(actions: Tensor, noise: Tensor, clip: float | Tensor, low: Tensor, high: Tensor) -> Tensor:
    """TD3's target action: the policy's with noise of at most `clip` (or (A,) of them), within the bounds."""
    return torch.clamp(actions + torch.clamp(noise, -clip, clip), low, high)  # type: ignore[arg-type]


def td3_policy_loss(q: Tensor) -> Tensor:
    """−E[Q₁(s, π(s))]: of the first critic only. q (C, N)."""
    return -q[0].mean()
