"""What makes Q-learning conservative, as plain functions; Kumar et al. 2020 (arXiv:2006.04779), Nakamoto et al. 2023
(Cal-QL, arXiv:2303.05479)."""

import math

import torch
from torch import Tensor

from finetune.rl.agents.networks import SquashedGaussian, TwinQ
from finetune.rl.agents.targets import gather_actions

# --- Discrete actions


def cql_h(values: Tensor, actions: Tensor) -> Tensor:
    """CQL(H): log Σ_a exp Q(s, a) − Q(s, a_data), (N,). values (N, A). Never below 0."""
    return values.logsumexp(-1) - gather_actions(values, actions)


def cql_rho(values: Tensor, actions: Tensor, log_prior: Tensor) -> Tensor:
    """CQL(ρ): log Σ_a ρ(a|s) exp Q(s, a) − Q(s, a_data), (N,): the maximum over μ of E_μ Q − KL(μ ‖ ρ).

    log_prior (N, A) is log ρ; under the uniform ρ it is CQL(H) less log A.
    """
    return (values + log_prior.detach()).logsumexp(-1) - gather_actions(values, actions)


# --- Continuous actions: the integral over actions by samples


def sampled_actions(
    policy: SquashedGaussian, params: Tensor, next_params: Tensor, uniform: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """n actions each, uniform within the bounds, of π(s) and of π(s'), all for the state s, and their log densities.

    uniform (n, N, A) within 0 and 1, noise (2, n, N, A) normal; params of π at s and s'. → (3 n, N, A), (3 n, N).
    """
    with torch.no_grad():
        here, log_here = policy.rsample(params, noise[0])
        after, log_after = policy.rsample(next_params, noise[1])
        anywhere = policy.center + policy.scale * (2 * uniform - 1)
        density = torch.full_like(log_here, -float((2 * policy.scale).log().sum()))
        return torch.cat([anywhere, here, after]), torch.cat([density, log_here, log_after])


def importance_logsumexp(values: Tensor, log_density: Tensor) -> Tensor:
    """log Σ_i exp(Q(s, a_i)) / density(a_i) (C, N) of samples (C, 3 n, N): log ∫ exp Q da, plus log 3 n."""
    return (values - log_density).logsumexp(-2)


def mean_logsumexp(values: Tensor) -> Tensor:
    """log E_π exp Q (C, N) of samples (C, n, N) from π: CQL(ρ) with the policy for ρ."""
    return values.logsumexp(-2) - math.log(values.shape[-2])


def conservative_gap(
    q: TwinQ,
    observations: Tensor,
    actions: Tensor,
    candidates: Tensor,
    log_density: Tensor,
    *,
    rho: bool = False,
    returns_to_go: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(the gap (C,): what Q is of `sampled_actions` more than of the data's, Q of the data's (C, N)).

    rho: of the policy's own actions at s only, unweighted. returns_to_go (N,), Cal-QL: the policy's actions are pushed
    down no further than to what the behavior earned from here.
    """
    every = q(observations, torch.cat([actions[None], candidates]))  # (C, 1 + 3 n, N), in one pass
    data, values = every[:, 0], every[:, 1:]
    n = len(candidates) // 3
    if returns_to_go is not None:
        values = torch.cat([values[:, :n], values[:, n:].maximum(returns_to_go)], 1)
    soft = mean_logsumexp(values[:, n : 2 * n]) if rho else importance_logsumexp(values, log_density)
    return (soft - data).mean(-1), data


# --- How much of it


def dual_loss(log_alpha: Tensor, gap: Tensor, threshold: float) -> Tensor:
    """−α (gap − τ), to be minimized in log α: α rises while the gap is above the threshold, and falls below it."""
    return -(weight(log_alpha) * (gap.detach() - threshold)).mean()


def weight(log_alpha: Tensor) -> Tensor:
    """α, at most a million."""
    return log_alpha.exp().clamp(max=1e6)


def max_backup(values: Tensor) -> Tensor:
    """V(s') = max_i min_c Q_c(s', a_i) (N,) over samples (C, n, N): the backup that is least afraid."""
    return values.amin(0).amax(0)
