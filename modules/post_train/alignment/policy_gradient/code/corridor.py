"""Policy gradients in tables: Sutton & Barto's short corridor, shifted rewards, other coordinates."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from finetune.rl.agents.networks import Categorical
from finetune.rl.envs.rollout import Rollout
from finetune.rl.tabular import mdp as tables
from finetune.rl.tabular.mdp import MDP
from finetune.rl.tabular.sample import sample_tabular

from .losses import advantages, policy_loss
from .natural import natural_direction

BEST_RIGHT = 2 - math.sqrt(2)  # of the corridor: where (2p − 4) / (p (1 − p)) is largest
RIGHT = 1


def corridor() -> MDP:
    """Sutton & Barto, example 13.1: three states in a row and the goal, −1 a step; in the second the actions are
    swapped. The policy cannot tell the states apart."""
    P = np.zeros((4, 2, 4))
    for s, (left, right) in enumerate([(0, 1), (2, 0), (1, 3), (3, 3)]):
        P[s, 0, left] = P[s, 1, right] = 1
    rewards = np.full((4, 2), -1.0)
    rewards[3] = 0
    start = np.array([1.0, 0, 0, 0])
    return tables.make(P, rewards, 1.0, start=start, actions=("left", "right"), name="short corridor")


def corridor_value(right: float) -> float:
    """Of the start, where every state goes right with this probability."""
    return tables.performance(corridor(), np.tile([1 - right, right], (4, 1)))


def episodes(mdp: MDP, policy: np.ndarray, count: int, length: int, draw: np.random.Generator) -> Rollout:
    """One episode a row, at most `length` steps."""
    starts = draw.choice(len(mdp.start), count, p=mdp.start)
    return sample_tabular(mdp, policy, length, starts, draw, one_episode=True)


def ascend(
    mdp: MDP, logits: Tensor, rollout: Rollout, baseline: str, values: Tensor | None, lr: float, shift: float = 0.0
) -> None:
    """One step of plain gradient ascent on the logits (S, A), or (A,) where all states share them; `values` (S,) is the
    learned baseline, moved halfway to the mean return of each state that was seen."""
    theta = logits.clone().requires_grad_()
    params = theta.expand(mdp.size).log_softmax(-1)[rollout.observations]
    rollout.rewards = rollout.rewards + shift
    given = None if values is None else values[rollout.observations]
    psi, returns = advantages(rollout, mdp.gamma, baseline, given)
    log_probs = params.gather(-1, rollout.actions[..., None])[..., 0]
    loss = policy_loss(log_probs, psi, rollout.first_episode) / log_probs.shape[1]
    loss.backward()
    logits -= lr * theta.grad
    if values is not None:
        alive = rollout.first_episode
        states, seen = rollout.observations[alive], torch.zeros_like(values)
        seen.index_add_(0, states, torch.ones(len(states), dtype=values.dtype))
        total = torch.zeros_like(values).index_add_(0, states, returns[alive])
        values += torch.where(seen > 0, 0.5 * (total / seen.clamp(min=1) - values), 0.0)


def probabilities(mdp: MDP, logits: Tensor) -> np.ndarray:
    return logits.expand(mdp.size).softmax(-1).numpy()


# --- Rewards with a constant added


def shifted(
    baseline: str, shift: float, generators: list[np.random.Generator], steps: int = 60
) -> tuple[np.ndarray, float]:
    """The policy learned on episodes of ten steps with every reward moved by `shift`, and its performance without."""
    mdp = tables.garnet(5, 3, 2, generators[0], 0.9)
    logits = torch.zeros(mdp.size, dtype=torch.float64)
    for _ in range(steps):
        rollout = sample_tabular(mdp, probabilities(mdp, logits), 10, generators[1].choice(5, 32), generators[1])
        ascend(mdp, logits, rollout, baseline, None, 0.05, shift)
    policy = probabilities(mdp, logits)
    return policy, tables.performance(mdp, policy)


# --- Other coordinates


def reparametrized(generator: torch.Generator) -> tuple[float, float]:
    """A logistic policy with θ itself as parameters and with ψ, θ = sinh(W ψ): how much the step in θ differs that the
    natural and that the plain gradient take, relative to its size."""
    d = 5
    observations = torch.randn(64, d, generator=generator, dtype=torch.float64)
    actions = torch.randint(2, (64,), generator=generator)
    psi_t = torch.randn(64, generator=generator, dtype=torch.float64)
    W = torch.randn(d, d, generator=generator, dtype=torch.float64) + 2 * torch.eye(d, dtype=torch.float64)
    theta = torch.randn(d, generator=generator, dtype=torch.float64)

    def log_policy(theta: Tensor) -> Tensor:
        right = observations @ theta
        return torch.stack([torch.zeros_like(right), right], -1).log_softmax(-1)

    def to_theta(psi: Tensor) -> Tensor:
        return torch.sinh(W @ psi)

    def steps(to: Callable[[Tensor], Tensor], at: Tensor) -> tuple[Tensor, Tensor]:
        """What the natural and the plain gradient in these coordinates do to θ."""
        at = at.clone().requires_grad_()
        log_probs = Categorical.log_prob(log_policy(to(at)), actions)
        (gradient,) = torch.autograd.grad((log_probs * psi_t).mean(), at)
        natural, _ = natural_direction(lambda x: log_policy(to(x)), Categorical.kl, at.detach(), gradient, 0.0, 50)
        jacobian = torch.autograd.functional.jacobian(to, at.detach())
        return jacobian @ natural, jacobian @ gradient

    ones = steps(lambda x: x, theta)
    others = steps(to_theta, torch.linalg.solve(W, torch.asinh(theta)))
    natural, vanilla = (float((a - b).norm() / a.norm()) for a, b in zip(ones, others, strict=True))
    return natural, vanilla
