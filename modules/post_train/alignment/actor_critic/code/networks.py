"""Policy and value in one module, with a trunk of their own each or a shared one."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from finetune.rl.agents import networks


class ActorCritic(nn.Module):
    """observations → (the policy's parameters, V). `shared`: both read the features of one trunk."""

    def __init__(
        self, observations: int, actions: int, continuous: bool, hidden: int, shared: bool, value_scale: float = 1.0
    ) -> None:
        super().__init__()
        widths, seen, self.value_scale = [hidden, hidden], observations, value_scale
        self.trunk: nn.Module = nn.Identity()
        if shared:
            self.trunk = nn.Sequential(networks.tanh_mlp([seen, *widths], last_scale=math.sqrt(2)), nn.Tanh())
            widths, seen = [], hidden
        kind = networks.Gaussian if continuous else networks.Categorical
        self.policy, self.value = kind(seen, actions, widths), networks.Value(seen, widths)

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        *steps, _ = observations.shape
        features = self.trunk(observations.flatten(0, -2))  # in rows: a linear layer's backward is shorter so
        params, values = self.policy(features), self.value_scale * self.value(features)
        return params.view(*steps, -1), values.view(steps)

    def distribution(self, observations: Tensor) -> Tensor:
        """The policy's parameters alone."""
        return self.policy(self.trunk(observations))

    def values(self, observations: Tensor) -> Tensor:
        return self.value_scale * self.value(self.trunk(observations))


def flat(model: nn.Module) -> Tensor:
    """A copy of all parameters in one row."""
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@torch.no_grad()
def assign(model: nn.Module, parameters: Tensor) -> None:
    """The inverse of `flat`; the row is copied."""
    start = 0
    for p in model.parameters():
        p.copy_(parameters[start : start + p.numel()].view_as(p))
        start += p.numel()
