"""Exact cases of the policy gradient: the factor γ^t, a constant added to the rewards, other coordinates of the policy.

Each has an answer that is known without training; they are checks of a run.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from finetune.rl.agents.networks import Categorical
from finetune.rl.envs.rollout import numpy_generator
from finetune.rl.statistics import critical_z
from finetune.rl.tabular import mdp as tables
from finetune.rl.tabular.sample import sample_tabular
from finetune.runs.run import Run

from . import corridor, enumerated
from .baselines import discounts
from .enumerated import batch_means, episode_gradients, z_score
from .trpo import natural_direction


def check(run: Run, episodes: int) -> None:
    """All cases, as checks of the run; `episodes` are sampled where an estimate is compared."""
    discount_factor(run, episodes)
    constant_reward(run)
    natural, plain = reparametrized(run.generator("coordinates"))
    run.check("reparametrization_changes_natural_step_by", natural, at_most=1e-4)
    run.check("reparametrization_changes_plain_step_by", plain)


# --- The factor γ^t


def discount_factor(run: Run, episodes: int) -> None:
    """With γ^t the estimate is that of ∇J. Without it, it estimates a vector field that is no function's gradient."""
    rng = numpy_generator(run, "discount")
    mdp, logits = enumerated.process(rng)
    mdp = mdp.discounted(0.5)
    everything, world = enumerated.trajectories(mdp)
    exact = enumerated.gradient(everything, world, logits, mdp.gamma)
    rollout = enumerated.sample(mdp, logits, episodes, rng)
    G = enumerated.to_go(rollout, mdp.gamma)
    usual, corrected = (
        batch_means(episode_gradients(rollout, logits, A), 16) for A in (G, discounts(mdp.gamma, G) * G)
    )
    run.check("discount_correction_z", z_score(corrected, exact), at_most=critical_z())
    run.check("discount_omitted_z", z_score(usual, exact))

    def field(x: Tensor) -> Tensor:
        return enumerated.usual_form(everything, world, x, mdp.gamma)

    def gradient(x: Tensor) -> Tensor:
        J = enumerated.objective(everything, world, x, mdp.gamma)
        return torch.autograd.grad(J, x, create_graph=True)[0].flatten()

    run.check("usual_form_asymmetry", enumerated.asymmetry(field, logits), at_least=1e-3)
    run.check("gradient_asymmetry", enumerated.asymmetry(gradient, logits))


# --- A constant added to every reward


def constant_reward(run: Run) -> None:
    """A constant on every reward of episodes of equal length: a baseline cancels it exactly."""
    for baseline, bound in (("mean", {"at_most": 1e-6}), ("none", {"at_least": 0.01})):
        before, after = (
            shifted(baseline, shift, [numpy_generator(run, "shift", part) for part in range(2)])
            for shift in (0.0, 100.0)
        )
        which = "with_baseline" if baseline == "mean" else "without_baseline"
        run.check(f"reward_shift_moves_policy_{which}", float(abs(after - before).max()), **bound)


def shifted(baseline: str, shift: float, rngs: list[np.random.Generator], steps: int = 60) -> np.ndarray:
    """The policy that REINFORCE learns on episodes of ten steps with every reward moved by `shift`."""
    mdp = tables.garnet(5, 3, 2, rngs[0], 0.9)
    logits = torch.zeros(mdp.size, dtype=torch.float64)
    for _ in range(steps):
        starts = rngs[1].choice(5, 32)
        rollout = sample_tabular(mdp, corridor.policy_of(mdp, logits), 10, starts, rngs[1])
        corridor.update(mdp, logits, rollout, baseline, None, 0.05, shift)
    return corridor.policy_of(mdp, logits)


# --- Other coordinates


def reparametrized(generator: torch.Generator) -> tuple[float, float]:
    """A logistic policy parametrized by θ, and by φ with θ = sinh(W φ): the relative difference of the steps in θ, of
    the natural gradient and of the plain one."""
    d = 5
    observations = torch.randn(64, d, generator=generator, dtype=torch.float64)
    actions = torch.randint(2, (64,), generator=generator)
    advantages = torch.randn(64, generator=generator, dtype=torch.float64)
    W = torch.randn(d, d, generator=generator, dtype=torch.float64) + 2 * torch.eye(d, dtype=torch.float64)
    theta = torch.randn(d, generator=generator, dtype=torch.float64)

    def log_policy(theta: Tensor) -> Tensor:
        right = observations @ theta
        return torch.stack([torch.zeros_like(right), right], -1).log_softmax(-1)

    def steps(to_theta: Callable[[Tensor], Tensor], at: Tensor) -> tuple[Tensor, Tensor]:
        """The steps in θ of the natural and the plain gradient in the coordinates `at`."""
        at = at.clone().requires_grad_()
        log_probs = Categorical.log_prob(log_policy(to_theta(at)), actions)
        (gradient,) = torch.autograd.grad((log_probs * advantages).mean(), at)
        natural, _ = natural_direction(
            lambda x: log_policy(to_theta(x)), Categorical.kl, at.detach(), gradient, damping=0.0, iterations=50
        )
        jacobian = torch.autograd.functional.jacobian(to_theta, at.detach())
        return jacobian @ natural, jacobian @ gradient

    in_theta = steps(lambda x: x, theta)
    in_phi = steps(lambda x: torch.sinh(W @ x), torch.linalg.solve(W, torch.asinh(theta)))
    natural, plain = (float((a - b).norm() / a.norm()) for a, b in zip(in_theta, in_phi, strict=True))
    return natural, plain
