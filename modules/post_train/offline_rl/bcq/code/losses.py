"""BCQ's filter, targets and losses, and those of TD3+BC, IQL and AWAC, on plain tensors."""

import math

import torch.nn.functional as F
from torch import Tensor

from finetune.rl.agents.offline import cloning_loss

# --- Discrete


def allowed(logits: Tensor, tau: float) -> Tensor:
    """(…, A) bool: the actions with G(a|s) ≥ τ max G(·|s), G the softmax of the imitator's logits.

    Exact at both ends: τ = 0 allows every action, τ = 1 the imitator's favorite alone (with all that equal it).
    """
    threshold = math.log(tau) if tau > 0 else -math.inf
    return logits - logits.amax(-1, keepdim=True) >= threshold


def filtered(q: Tensor, logits: Tensor, tau: float) -> Tensor:
    """Q, and −∞ where the imitator does not allow the action: its argmax is BCQ's action."""
    return q.masked_fill(~allowed(logits, tau), -math.inf)


def imitation_loss(logits: Tensor, actions: Tensor, beta: float) -> Tensor:
    """− log G(a|s) + β mean(logit²)"""
    return cloning_loss(logits, actions) + beta * logits.square().mean()


# --- Continuous


def vae_loss(actions: Tensor, decoded: Tensor, mean: Tensor, log_deviation: Tensor, weight: float) -> Tensor:
    """Squared error + weight · KL(N(mean, deviation²) ‖ N(0, 1)), both averaged over rows and numbers."""
    kl = 0.5 * ((2 * log_deviation).exp() + mean.square() - 1) - log_deviation
    return F.mse_loss(decoded, actions) + weight * kl.mean()


def soft_minimum(values: Tensor, lam: float) -> Tensor:
    """(K, …) estimates by K networks → λ min + (1 − λ) max over them."""
    return lam * values.amin(0) + (1 - lam) * values.amax(0)


def best_candidate(values: Tensor, lam: float) -> Tensor:
    """(K, N, n) values of n candidate actions in N states → (N,): the largest soft minimum."""
    return soft_minimum(values, lam).amax(-1)


def td3_bc_loss(q: Tensor, taken: Tensor, actions: Tensor, alpha: float) -> Tensor:
    """− α Q/mean|Q| + (π(s) − a)²: Q's scale is divided out, so that α means the same for any reward."""
    return -alpha / q.abs().mean().detach() * q.mean() + cloning_loss(taken, actions)


def expectile_loss(difference: Tensor, expectile: float) -> Tensor:
    """|τ − 1(u < 0)| u²: the expectile of what is estimated; 0.5 is half the squared error."""
    return ((expectile - (difference < 0).to(difference)).abs() * difference.square()).mean()


def iql_weights(advantages: Tensor, temperature: float, most: float = 100.0) -> Tensor:
    """min(e^{β A}, most): how much a step of the data is imitated."""
    return (temperature * advantages).exp().clamp(max=most)


def awac_weights(advantages: Tensor, lam: float) -> Tensor:
    """e^{A/λ}, scaled so that they average 1 over the batch."""
    return (advantages / lam).softmax(0) * len(advantages)
