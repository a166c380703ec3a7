"""Batch-constrained Q-learning with continuous actions (Fujimoto et al. 2018, arXiv:1812.02900). The maximum over
actions becomes one over candidates that a generative model of the data proposes, each perturbed a little.

    a_i = D(s, z_i) of a conditional VAE,   ã_i = a_i + Φ tanh ξ(s, a_i)
    y = r + γ max_i [ λ min_j Q'_j(s', ã_i) + (1 − λ) max_j Q'_j(s', ã_i) ]

Actions are scaled to −1 … 1. `train` is also the loop of the methods that BCQ is compared with.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.optim import descend
from finetune.rl.agents.networks import TwinQ, relu_mlp
from finetune.rl.agents.offline import OfflineLearner
from finetune.rl.agents.targets import critic_loss, polyak_, td3_policy_loss, td_target
from finetune.rl.envs.replay import Transitions
from finetune.runs.run import Run

from .evaluation import LOG_EVERY, curve, evaluate

if TYPE_CHECKING:
    from .data import Task
    from .main import Config

LATENT_CLIP = 0.5  # |z| of a proposal: the decoder is reliable near the center of the latents only

# --- Networks


class CVAE(nn.Module):
    """Conditional VAE of the logged actions: p(a|s) = ∫ N(z; 0, 1) decode(s, z) dz, with two latents for each number of
    an action."""

    def __init__(self, obs_dim: int, action_dim: int, hidden: int) -> None:
        super().__init__()
        self.latents = 2 * action_dim
        self.encoder = relu_mlp([obs_dim + action_dim, hidden, hidden, 2 * self.latents])
        self.decoder = relu_mlp([obs_dim + self.latents, hidden, hidden, action_dim])

    def encode(self, observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, log standard deviation) of q(z|s, a), each (N, latents)"""
        mean, log_std = self.encoder(torch.cat([observations, actions], -1)).chunk(2, -1)
        return mean, log_std.clamp(-4, 15)

    def decode(self, observations: Tensor, z: Tensor) -> Tensor:
        return self.decoder(torch.cat([observations, z], -1)).tanh()

    def propose(self, observations: Tensor, count: int, rng: torch.Generator) -> Tensor:
        """(N, D) → (N, count, A)"""
        z = torch.randn(len(observations), count, self.latents, generator=rng).clamp(-LATENT_CLIP, LATENT_CLIP)
        return self.decode(observations[:, None].expand(-1, count, -1), z)


class Perturbation(nn.Module):
    """a → a + Φ tanh ξ(s, a), clipped to −1 … 1"""

    def __init__(self, obs_dim: int, action_dim: int, hidden: int, phi: float) -> None:
        super().__init__()
        self.phi = phi
        self.net = relu_mlp([obs_dim + action_dim, hidden, hidden, action_dim])

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        shift = self.phi * self.net(torch.cat([observations, actions], -1)).tanh()
        return (actions + shift).clamp(-1, 1)


# --- Losses and targets


def vae_loss(actions: Tensor, decoded: Tensor, mean: Tensor, log_std: Tensor, weight: float) -> Tensor:
    """Squared error + weight · KL(N(mean, std²) ‖ N(0, 1)), both averaged over rows and components."""
    kl = 0.5 * ((2 * log_std).exp() + mean.square() - 1) - log_std
    return F.mse_loss(decoded, actions) + weight * kl.mean()


def candidates(
    cvae: CVAE, perturbation: Perturbation, observations: Tensor, count: int, rng: torch.Generator
) -> Tensor:
    """(N, D) → (N, count, A): proposals of the VAE, perturbed."""
    proposed = cvae.propose(observations, count, rng)
    return perturbation(observations[:, None].expand(-1, count, -1), proposed)


def soft_minimum(q: Tensor, lam: float) -> Tensor:
    """Soft clipped double Q: λ min + (1 − λ) max over the critics (C, …)."""
    return lam * q.amin(0) + (1 - lam) * q.amax(0)


def best_candidate(q: Tensor, lam: float) -> Tensor:
    """Q of n candidates in N states (C, N, n) → (N,): the largest soft minimum."""
    return soft_minimum(q, lam).amax(-1)


# --- The learner


class BCQ:
    """Twin critics, the generative model of actions and the perturbation, each with its own optimizer."""

    def __init__(self, cfg: Config, obs_dim: int, action_dim: int) -> None:
        self.cfg = cfg
        self.critic = TwinQ(obs_dim, action_dim, [cfg.hidden, cfg.hidden])
        self.cvae = CVAE(obs_dim, action_dim, cfg.hidden)
        self.perturbation = Perturbation(obs_dim, action_dim, cfg.hidden, cfg.phi)
        self.critic_target, self.perturbation_target = copy.deepcopy(self.critic), copy.deepcopy(self.perturbation)
        self.critic_optimizer, self.cvae_optimizer, self.perturbation_optimizer = (
            torch.optim.Adam(network.parameters(), lr=cfg.lr, fused=True)
            for network in (self.critic, self.cvae, self.perturbation)
        )

    @property
    def state(self) -> dict[str, Any]:
        return {
            "critic": self.critic, "critic_target": self.critic_target, "critic_optimizer": self.critic_optimizer,
            "cvae": self.cvae, "cvae_optimizer": self.cvae_optimizer, "perturbation": self.perturbation,
            "perturbation_target": self.perturbation_target, "perturbation_optimizer": self.perturbation_optimizer,
        }  # fmt: skip

    def update(self, batch: Transitions, rng: torch.Generator) -> dict[str, Tensor]:
        # the generative model
        mean, log_std = self.cvae.encode(batch.observations, batch.actions)
        z = mean + log_std.exp() * torch.randn(mean.shape, generator=rng)
        vae = vae_loss(batch.actions, self.cvae.decode(batch.observations, z), mean, log_std, self.cfg.kl)
        descend(vae, self.cvae_optimizer)

        # the critics
        next_values = self.next_values(batch.next_observations, rng)
        targets = td_target(batch.rewards, next_values, batch.terminated, self.cfg.gamma)
        critic = critic_loss(self.critic(batch.observations, batch.actions), targets)
        descend(critic, self.critic_optimizer)

        # the perturbation, towards a larger Q of the first critic
        with torch.no_grad():
            proposed = self.cvae.propose(batch.observations, 1, rng)[:, 0]
        perturbed = self.perturbation(batch.observations, proposed)
        actor = td3_policy_loss(self.critic(batch.observations, perturbed))
        descend(actor, self.perturbation_optimizer)

        polyak_(self.critic_target, self.critic, self.cfg.polyak)
        polyak_(self.perturbation_target, self.perturbation, self.cfg.polyak)
        return {"vae_loss": vae.detach(), "critic_loss": critic.detach(), "actor_loss": actor.detach()}

    @torch.no_grad()
    def next_values(self, observations: Tensor, rng: torch.Generator) -> Tensor:
        """V(s') (N,): the best of the candidates by the target networks."""
        actions = candidates(self.cvae, self.perturbation_target, observations, self.cfg.candidates, rng)
        return best_candidate(self.critic_target(observations[:, None], actions), self.cfg.lam)

    @torch.no_grad()
    def act(self, observations: Tensor, rng: torch.Generator) -> Tensor:
        """The candidate with the largest Q of the first critic."""
        actions = candidates(self.cvae, self.perturbation, observations, self.cfg.act_candidates, rng)
        best = self.critic(observations[:, None], actions)[0].argmax(-1)
        return actions[torch.arange(len(actions)), best]

    policy = act

    @torch.no_grad()
    def value(self, observations: Tensor, actions: Tensor) -> Tensor:
        return self.critic(observations, actions).mean(0)


# --- Training


def train(cfg: Config, run: Run, task: Task, name: str, learner: OfflineLearner) -> dict[str, float]:
    """Trains one learner; what `evaluate` finds at the end. The batch of a step is the same for every learner."""
    last: dict[str, float] = {}
    state = learner.state | {"last": last} | task.limit
    for step in run.steps(cfg.steps, state, phase=f"{task.name}_{name}"):
        batch = task.steps.sample(cfg.continuous_batch, run.generator("batch", step))
        metrics = learner.update(batch, run.generator("update", step))
        if (step + 1) % cfg.eval_every == 0 or step + 1 == cfg.steps:
            last |= evaluate(cfg, run, task, learner)
            run.log(step, **metrics, **curve(last))
        elif (step + 1) % LOG_EVERY == 0:
            run.log(step, **metrics)
    return last or evaluate(cfg, run, task, learner)
