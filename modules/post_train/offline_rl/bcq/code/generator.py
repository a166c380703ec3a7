"""What proposes continuous actions: a conditional VAE of the data's actions, and a small learned correction."""

import torch
from torch import Tensor, nn

from finetune.rl.agents.networks import relu_mlp

CLIP = 0.5  # |z| of a proposal: the decoder is trusted near the center of the latents only


class CVAE(nn.Module):
    """p(a|s) = ∫ N(z; 0, 1) decode(s, z); actions are within −1 and 1, latents are twice as many as actions."""

    def __init__(self, observations: int, actions: int, hidden: int) -> None:
        super().__init__()
        self.latents = 2 * actions
        self.encoder = relu_mlp([observations + actions, hidden, hidden, 2 * self.latents])
        self.decoder = relu_mlp([observations + self.latents, hidden, hidden, actions])

    def encode(self, observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, log deviation) of q(z|s, a), each (N, latents)"""
        mean, log_deviation = self.encoder(torch.cat([observations, actions], -1)).chunk(2, -1)
        return mean, log_deviation.clamp(-4, 15)

    def decode(self, observations: Tensor, z: Tensor) -> Tensor:
        return self.decoder(torch.cat([observations, z], -1)).tanh()

    def propose(self, observations: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """(N, D) → (N, count, A)"""
        z = torch.randn(len(observations), count, self.latents, generator=generator).clamp(-CLIP, CLIP)
        return self.decode(observations[:, None].expand(-1, count, -1), z)


class Perturbation(nn.Module):
    """a → a + Φ tanh ξ(s, a), clipped to −1 and 1"""

    def __init__(self, observations: int, actions: int, hidden: int, phi: float) -> None:
        super().__init__()
        self.phi = phi
        self.net = relu_mlp([observations + actions, hidden, hidden, actions])

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        moved = self.phi * self.net(torch.cat([observations, actions], -1)).tanh()
        return (actions + moved).clamp(-1, 1)


def candidates(
    cvae: CVAE, perturbation: Perturbation, observations: Tensor, count: int, generator: torch.Generator
) -> Tensor:
    """(N, D) → (N, count, A): proposals, each moved a little."""
    proposed = cvae.propose(observations, count, generator)
    return perturbation(observations[:, None].expand(-1, count, -1), proposed)
