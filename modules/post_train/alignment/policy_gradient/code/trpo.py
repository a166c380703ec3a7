"""The natural policy gradient (Kakade 2001) and TRPO (Schulman et al. 2015, arXiv:1502.05477): the step, the loop.

    natural: θ += √(2δ / gᵀF⁻¹g) · F⁻¹ g        TRPO: shorten it until KL ≤ δ and E[π_θ/π_old · A] has risen

Networks, episodes and baselines are those of reinforce.py; only the step differs. F, the Fisher matrix of the policy,
is the Hessian of KL(π_θ ‖ π_θ') at θ' = θ, so F v costs two backward passes and F is never built.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from finetune import optim
from finetune.rl.agents.reward_scale import RewardSize
from finetune.rl.envs import environments
from finetune.runs.run import Run

from .baselines import advantages
from .reinforce import Batch, collect, networks

if TYPE_CHECKING:
    from .main import Config

Distribution = Callable[[Tensor], Tensor]  # flat parameters θ → the policy's distribution on a batch of observations
Divergence = Callable[[Tensor, Tensor], Tensor]
Product = Callable[[Tensor], Tensor]  # v ↦ F v


# --- F⁻¹ g without F


def fisher_product(distribution: Distribution, kl: Divergence, theta: Tensor, damping: float = 0.0) -> Product:
    """The function v ↦ (F + damping) v at theta: the gradient of (∇KL · v)."""
    at = theta.detach().clone().requires_grad_()
    here = distribution(at)
    (slope,) = torch.autograd.grad(kl(here.detach(), here).mean(), at, create_graph=True)

    def product(v: Tensor) -> Tensor:
        (Fv,) = torch.autograd.grad(slope @ v, at, retain_graph=True)
        return Fv + damping * v

    return product


def conjugate_gradient(product: Product, b: Tensor, iterations: int, tolerance: float = 1e-10) -> Tensor:
    """Solves product(x) = b for a symmetric positive definite product (Hestenes & Stiefel 1952)."""
    x, r = torch.zeros_like(b), b.clone()
    p, rr = r.clone(), r @ r
    for _ in range(iterations):
        if rr <= tolerance**2 * (b @ b):
            break
        Ap = product(p)
        alpha = rr / (p @ Ap)
        x = x + alpha * p
        r = r - alpha * Ap
        rr, before = r @ r, rr
        p = r + rr / before * p
    return x


def natural_direction(
    distribution: Distribution, kl: Divergence, theta: Tensor, gradient: Tensor, damping: float, iterations: int
) -> tuple[Tensor, Tensor]:
    """x ≈ (F + damping)⁻¹ g, and xᵀ (F + damping) x: to second order twice the KL of the step x."""
    product = fisher_product(distribution, kl, theta, damping)
    x = conjugate_gradient(product, gradient, iterations)
    return x, x @ product(x)


# --- Update


def line_search(
    surrogate: Callable[[Tensor], Tensor], divergence: Callable[[Tensor], Tensor], theta: Tensor, step: Tensor,
    delta: float, shrink: float = 0.8, attempts: int = 15,
) -> tuple[Tensor, float]:  # fmt: skip
    """TRPO's line search: the longest of step · shrink^k that raises the surrogate with a KL of at most delta. Returns
    the new parameters and the fraction of the step that was taken; theta and 0 if no attempt succeeds."""
    before = surrogate(theta)
    for k in range(attempts):
        candidate = theta + shrink**k * step
        if divergence(candidate) <= delta and surrogate(candidate) > before:
            return candidate, shrink**k
    return theta, 0.0


def update(cfg: Config, policy: Any, batch: Batch, delta: float, search: bool) -> dict[str, float]:
    """A natural gradient step of KL delta; with `search` TRPO's."""
    distribution, theta = as_function(policy, batch.observations), flat_parameters(policy)
    old = distribution(theta).detach()
    old_log_probs = policy.log_prob(old, batch.actions)

    def surrogate(at: Tensor) -> Tensor:
        params = distribution(at)
        ratios = (policy.log_prob(params, batch.actions) - old_log_probs).exp()
        return (ratios * batch.advantages).mean() + cfg.entropy * policy.entropy(params).mean()

    def divergence(at: Tensor) -> Tensor:
        return policy.kl(old, distribution(at)).mean()

    at = theta.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(surrogate(at), at)
    x, xFx = natural_direction(distribution, policy.kl, theta, gradient, cfg.damping, cfg.iterations)
    step, taken = (2 * delta / xFx.clamp(min=1e-12)).sqrt() * x, 1.0
    with torch.no_grad():
        new = theta + step
        if search:
            new, taken = line_search(surrogate, divergence, theta, step, delta)
        kl = divergence(new)
        nn.utils.vector_to_parameters(new, policy.parameters())
    return {"entropy": policy.entropy(old).mean().item(), "kl": kl.item(), "step_taken": taken}


def flat_parameters(module: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach()


def as_function(module: nn.Module, observations: Tensor) -> Distribution:
    """The module on these observations as a function of its flat parameters."""
    names, shapes = zip(*((n, p.shape) for n, p in module.named_parameters()), strict=True)
    counts = [shape.numel() for shape in shapes]

    def distribution(theta: Tensor) -> Tensor:
        parts = [part.view(shape) for part, shape in zip(theta.split(counts), shapes, strict=True)]
        return torch.func.functional_call(module, dict(zip(names, parts, strict=True)), (observations,))

    return distribution


# --- Loop


def train(cfg: Config, run: Run, envs: list[environments.Env], method: str) -> nn.Module:
    """The policy after `--steps` updates with the method "natural" or "trpo"."""
    policy, learned = networks(cfg, run, envs)
    unit = RewardSize()
    state = {"policy": policy, **learned.state, "episode_limit": envs[0].episode_limit, "rewards": unit}
    for step in run.steps(cfg.steps, state, phase=method):
        rollout = collect(run, policy, envs, method, step)
        earned = fmean(rollout.rewards.sum(0).tolist())
        rollout.rewards = rollout.rewards + cfg.reward_shift * rollout.first_episode
        rollout.rewards = rollout.rewards / unit.see(rollout.rewards)
        values = learned.values(rollout) if cfg.baseline == "learned" else ()
        A, returns = advantages(rollout, cfg.gamma, cfg.baseline, *values)
        batch = Batch(cfg, rollout, A, run.generator("shuffle", method, step))
        delta = cfg.delta * optim.cosine(step, cfg.steps, 0, 1.0, 0.1)
        found = update(cfg, policy, batch, delta, search=method == "trpo")
        if cfg.baseline == "learned":
            found["value_loss"] = learned.fit(batch.observations, returns[rollout.first_episode])
        run.log(step, **{"return": earned}, **found)
    return policy
