"""The losses of the on-policy methods, and the eligibility traces, which replace a loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def a2c_loss(
    log_probs: Tensor,
    advantages: Tensor,
    values: Tensor,
    targets: Tensor,
    entropies: Tensor,
    value_weight: float = 0.5,
    entropy_weight: float = 0.01,
) -> tuple[Tensor, dict[str, Tensor]]:
    """−mean(log π · A) + value_weight · mean((V − target)²) − entropy_weight · mean(H); A and targets are constants."""
    parts = {
        "policy_loss": -(log_probs * advantages).mean(),
        "value_loss": (values - targets).square().mean(),
        "entropy": entropies.mean(),
    }
    total = parts["policy_loss"] + value_weight * parts["value_loss"] - entropy_weight * parts["entropy"]
    return total, {name: part.detach() for name, part in parts.items()}


class Traces:
    """z ← γ λ z + ∇ of each row, one z for log π and one for V; 0 where an episode begins (Sutton & Barto 2018, 13.5).

    The gradient of row n by the weight of a linear layer is the outer product of what came back to its output and
    what went in, so no row needs a backward pass of its own.
    """

    def __init__(self, model: nn.Module, rows: int) -> None:
        self.model = model
        self.policy, self.value = (
            {name: torch.zeros(rows, *p.shape, dtype=p.dtype) for name, p in model.named_parameters()} for _ in range(2)
        )
        self.names = {layer: name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}

    def add(self, observations: Tensor, actions: Tensor, decay: float) -> tuple[Tensor, Tensor]:
        """One step of each row; what the model said of it, still with its graph."""
        passed: list[tuple[nn.Module, Tensor, Tensor]] = []  # (layer, what went in, what came out)
        hooks = [layer.register_forward_hook(lambda *x: passed.append((x[0], x[1][0], x[2]))) for layer in self.names]
        params, values = self.model(observations)
        for hook in hooks:
            hook.remove()
        log_probs = self.model.policy.log_prob(params, actions)  # type: ignore[union-attr, operator]
        for goal, traces in ((log_probs, self.policy), (values, self.value)):
            reached = [*(out for _, _, out in passed), params]
            back = torch.autograd.grad(goal.sum(), reached, retain_graph=True, allow_unused=True)
            for (layer, into, _), g in zip(passed, back[:-1], strict=True):
                if g is not None:
                    name = self.names[layer]
                    traces[f"{name}.weight"].baddbmm_(g[:, :, None], into.detach()[:, None, :], beta=decay)
                    traces[f"{name}.bias"].mul_(decay).add_(g)
            if goal is log_probs and "policy.log_std" in traces:  # the second half of a Gaussian's parameters
                traces["policy.log_std"].mul_(decay).add_(back[-1].chunk(2, -1)[1])
        return params, values

    def direction(self, deltas: Tensor, value_weight: float) -> list[Tensor]:
        """mean over the rows of δ (z_π + 2 · value_weight · z_V), which is to be followed upwards; δ (N,)."""
        weights = deltas / len(deltas)
        return [
            torch.tensordot(weights, p, 1).add_(torch.tensordot(weights, v, 1), alpha=2 * value_weight)
            for p, v in zip(self.policy.values(), self.value.values(), strict=True)
        ]

    def end(self, ends: Tensor) -> None:
        """ends (N,) bool: the next step of these rows begins an episode."""
        if ends.any():
            for z in (*self.policy.values(), *self.value.values()):
                z[ends] = 0.0

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return {"policy": self.policy, "value": self.value}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        for kind, saved in state.items():
            for name, z in getattr(self, kind).items():
                z.copy_(saved[name])
