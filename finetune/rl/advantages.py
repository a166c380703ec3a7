"""Estimates of the advantage from rollouts, besides GAE, which is the op `gae` (λ = 0: the TD error; λ = 1: the whole
return less V). Off-policy: `log_ratios` are log π(a|s) − log μ(a|s) of the actions that μ took.

As in the op: all (T, N); next_values is V of the state that each step reached; nothing crosses the end of an episode;
one that terminated is worth 0, one that was truncated what V says. No gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finetune import ops
from finetune.errors import UserError


def returns_to_go(rewards: Tensor, ends: Tensor, gamma: float) -> Tensor:
    """r_t + γ r_{t+1} + … up to the end of the episode, or of the rollout."""
    rewards = _floating(rewards)
    zeros = torch.zeros_like(rewards)
    return ops.gae(rewards, zeros, zeros, ends, torch.zeros_like(ends), gamma=gamma, lam=1.0)[1]


def td_errors(rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, gamma: float) -> Tensor:
    """δ_t = r_t + γ V(s_{t+1}) − V(s_t), without V(s_{t+1}) where nothing follows."""
    return rewards + (gamma * next_values).masked_fill(terminated, 0.0) - values


@torch.no_grad()
def n_step(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    *,
    n: int,
    gamma: float,
) -> Tensor:
    """Σ_{k<n} γ^k δ_{t+k}: n rewards, then the critic. Fewer where the episode or the rollout ends before."""
    deltas = td_errors(rewards, values, next_values, terminated, gamma)
    ends, total = terminated | truncated, torch.zeros_like(deltas)
    goes_on = torch.ones_like(ends)
    for k in range(min(n, len(deltas))):
        here = slice(0, len(deltas) - k)
        total[here] += (gamma**k * deltas[k:]).masked_fill(~goes_on[here], 0.0)
        goes_on[here] &= ~ends[k:]
    return total


@torch.no_grad()
def vtrace(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    log_ratios: Tensor,
    *,
    gamma: float,
    lam: float = 1.0,
    rho_bar: float = 1.0,
    c_bar: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """V-trace (Espeholt et al. 2018, arXiv:1802.01561): advantages, and targets of V.

        v_t = V_t + ρ_t δ_t + γ c_t (v_{t+1} − V_{t+1})     A_t = ρ_t (r_t + γ v_{t+1} − V_t)
        ρ = min(rho_bar, π/μ), c = λ min(c_bar, π/μ)

    The targets belong to a policy between μ and π unless rho_bar is no bound (inf); c_bar bounds the variance only.
    """
    ratios = log_ratios.exp()
    rho, c = ratios.clamp(max=rho_bar), lam * ratios.clamp(max=c_bar)
    ends = terminated | truncated
    corrections = _backwards(rho * td_errors(rewards, values, next_values, terminated, gamma), gamma * c, ends)
    targets = values + corrections
    following = torch.cat([targets[1:], next_values[-1:]])
    following = torch.where(ends, next_values, following)
    return rho * td_errors(rewards, values, following, terminated, gamma), targets


@torch.no_grad()
def retrace(
    rewards: Tensor,
    action_values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    log_ratios: Tensor,
    *,
    gamma: float,
    lam: float = 1.0,
) -> Tensor:
    """Retrace(λ) (Munos et al. 2016, arXiv:1606.02647): targets of Q(s_t, a_t); less V(s_t) they are advantages.

        q_t = Q_t + δ_t + γ c_{t+1} (q_{t+1} − Q_{t+1})     δ_t = r_t + γ Σ_a π(a|s_{t+1}) Q(s_{t+1}, a) − Q_t
        c = λ min(1, π/μ)

    action_values is Q of the actions taken, next_values the mean of Q under π in the state reached.
    """
    deltas = td_errors(rewards, action_values, next_values, terminated, gamma)
    traces = gamma * lam * _next(log_ratios.exp().clamp(max=1.0))
    return action_values + _backwards(deltas, traces, terminated | truncated)


@torch.no_grad()
def tree_backup(
    rewards: Tensor,
    action_values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    log_probs: Tensor,
    *,
    gamma: float,
    lam: float = 1.0,
) -> Tensor:
    """Tree-backup(λ) (Precup et al. 2000): Retrace's targets of Q(s_t, a_t) with the traces c = λ π(a|s).

    log_probs are log π(a|s) of the actions taken. How μ chose them need not be known, and no ratio can be large; the
    traces are short wherever π spreads over several actions, even if μ = π.
    """
    deltas = td_errors(rewards, action_values, next_values, terminated, gamma)
    return action_values + _backwards(deltas, gamma * lam * _next(log_probs.exp()), terminated | truncated)


@torch.no_grad()
def upgo(
    rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, truncated: Tensor, *, gamma: float
) -> Tensor:
    """Upgoing advantages (Vinyals et al. 2019, AlphaStar, methods): the return as long as it goes better than V says.

        A_t = G_t − V_t     G_t = r_t + γ (G_{t+1} if r_{t+1} + γ V_{t+2} ≥ V_{t+1}, else V_{t+1})

    With δ the TD error that is A_t = δ_t + γ 1[δ_{t+1} ≥ 0] A_{t+1}. Biased upwards: luck counts, bad luck does not.
    """
    deltas = td_errors(rewards, values, next_values, terminated, gamma)
    return _backwards(deltas, gamma * _next((deltas >= 0).to(deltas.dtype)), terminated | truncated)


def leave_one_out(returns: Tensor) -> Tensor:
    """(…, K) returns of one group → each less the mean of the others: unbiased, as the baseline knows nothing of it.
    UserError if K is below 2."""
    returns = _group(returns)
    k = returns.shape[-1]
    return (returns - returns.mean(-1, keepdim=True)) * (k / (k - 1))


def group_normalized(returns: Tensor, eps: float = 1e-4) -> Tensor:
    """(…, K) returns of one group → less their mean, over their standard deviation (n − 1) + eps, as GRPO does.

    Biased: the mean holds the return itself, and the deviation makes hard and easy groups alike. UserError if K is
    below 2: Shao et al. (2024, arXiv:2402.03300) compare the answers of a group, and one alone has no deviation.
    """
    returns = _group(returns)
    return (returns - returns.mean(-1, keepdim=True)) / (returns.std(-1, keepdim=True) + eps)


def _group(returns: Tensor) -> Tensor:
    """(…, K) in floating point, K at least 2."""
    count = returns.shape[-1] if returns.dim() else 1
    if count < 2:
        raise UserError(f"a group of {count} has no other return to be compared with: it needs at least 2")
    return _floating(returns)


def _floating(x: Tensor) -> Tensor:
    """Rewards may be counted in integers."""
    return x if x.is_floating_point() else x.to(torch.get_default_dtype())


def whitened(values: Tensor, mask: Tensor | None = None, *, center: bool = True, eps: float = 1e-8) -> Tensor:
    """Less the mean, over the standard deviation (n − 1), both of all values that `mask` (the same shape, bool) counts,
    as a loss sees them: a minibatch, or the tokens of its answers. 0 elsewhere, whatever stands there.

    center False: the mean is put back, for rewards, whose sign says something (Ziegler et al. 2019, arXiv:1909.08593).
    """
    values = _floating(values)
    counts = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    n = counts.sum()
    mean = values.masked_fill(~counts, 0.0).sum() / n.clamp(min=1)
    off = (values - mean).masked_fill(~counts, 0.0)
    white = off / ((off.square().sum() / (n - 1).clamp(min=1)).sqrt() + eps)
    return white if center else (white + mean).masked_fill(~counts, 0.0)


@torch.no_grad()
def token_rewards(scores: Tensor, log_probs: Tensor, reference: Tensor, mask: Tensor, beta: float) -> Tensor:
    """(T, N) rewards of the tokens of N answers: −β (log π − log π_ref) for each, and the score (N,) with the last one
    (Ziegler et al. 2019, arXiv:1909.08593, eq. 2; Ouyang et al. 2022). mask (T, N) bool: the tokens of the answer.
    """
    return (-beta * (log_probs - reference)).masked_fill(~mask, 0.0) + last_token(mask) * scores


def last_token(mask: Tensor) -> Tensor:
    """(T, N) bool: the last of the tokens that `mask` counts in each column."""
    return mask & (mask.flip(0).cumsum(0).flip(0) == 1)


def _next(x: Tensor) -> Tensor:
    """x_{t+1} at t, and 0 at the last."""
    return torch.cat([x[1:], torch.zeros_like(x[:1])])


def _backwards(terms: Tensor, factors: Tensor, ends: Tensor) -> Tensor:
    """x_t = terms_t + factors_t · x_{t+1}, without x_{t+1} at an end."""
    found, x = torch.empty_like(terms), torch.zeros_like(terms[0])
    for t in reversed(range(len(terms))):
        x = terms[t] + (factors[t] * x).masked_fill(ends[t], 0.0)
        found[t] = x
    return found
