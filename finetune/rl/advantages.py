"""Advantage estimators (n-step, UPGO, V-trace, Retrace, tree-backup, RLOO, GRPO), whitening, and KL rewards by token.

GAE is the op `finetune.ops.gae` (λ = 0: the TD error; λ = 1: the return minus V). Conventions are the op's: tensors are
(T, N); `next_values` is V of the state that each step reached, before any reset; no sum crosses the end of an episode;
a terminated episode has value 0 behind its end, a truncated one bootstraps from `next_values`. Off-policy, `log_ratios`
are log π(a|s) − log μ(a|s) of the actions that the behavior policy μ took. Nothing here is differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finetune import ops
from finetune.errors import UserError


def returns_to_go(rewards: Tensor, ends: Tensor, gamma: float) -> Tensor:
    """G_t = r_t + γ r_{t+1} + … up to the end of the episode, or of the rollout."""
    rewards = _floating(rewards)
    zeros = torch.zeros_like(rewards)
    return ops.gae(rewards, zeros, zeros, ends, torch.zeros_like(ends), gamma=gamma, lam=1.0)[1]


def td_errors(rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, gamma: float) -> Tensor:
    """δ_t = r_t + γ V(s_{t+1}) − V(s_t), where V(s_{t+1}) of a terminated episode is 0."""
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
    """n-step advantages Σ_{k<n} γ^k δ_{t+k}: n rewards, then the critic; fewer if the episode or rollout ends first."""
    deltas = td_errors(rewards, values, next_values, terminated, gamma)
    ends, advantages = terminated | truncated, torch.zeros_like(deltas)
    alive = torch.ones_like(ends)  # the episode of step t still runs at t + k
    for k in range(min(n, len(deltas))):
        rows = slice(0, len(deltas) - k)
        advantages[rows] += (gamma**k * deltas[k:]).masked_fill(~alive[rows], 0.0)
        alive[rows] &= ~ends[k:]
    return advantages


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
    """V-trace (Espeholt et al. 2018, arXiv:1802.01561): the advantages and the targets of V.

        v_t = V_t + ρ_t δ_t + γ c_t (v_{t+1} − V_{t+1})     A_t = ρ_t (r_t + γ v_{t+1} − V_t)
        ρ = min(rho_bar, π/μ), c = λ min(c_bar, π/μ)

    rho_bar decides whose values the targets are: those of π only without a bound (inf), otherwise those of a policy
    between μ and π. c_bar limits the variance and does not move the fixed point.
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
    """Retrace(λ) (Munos et al. 2016, arXiv:1606.02647): targets of Q(s_t, a_t). Minus V(s_t) they are advantages.

        q_t = Q_t + δ_t + γ c_{t+1} (q_{t+1} − Q_{t+1})     δ_t = r_t + γ Σ_a π(a|s_{t+1}) Q(s_{t+1}, a) − Q_t
        c = λ min(1, π/μ)

    action_values are Q(s_t, a_t) of the actions taken, next_values E_{a~π} Q(s_{t+1}, a).
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

    log_probs are log π(a|s) of the actions taken. μ need not be known and no ratio can be large, but the traces decay
    fast wherever π spreads over several actions, even if μ = π.
    """
    deltas = td_errors(rewards, action_values, next_values, terminated, gamma)
    return action_values + _backwards(deltas, gamma * lam * _next(log_probs.exp()), terminated | truncated)


@torch.no_grad()
def upgo(
    rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, truncated: Tensor, *, gamma: float
) -> Tensor:
    """UPGO, upgoing policy advantages (Vinyals et al. 2019, AlphaStar, methods): the return while it beats the critic.

        A_t = G_t − V_t     G_t = r_t + γ (G_{t+1} if r_{t+1} + γ V_{t+2} ≥ V_{t+1}, else V_{t+1})

    In TD errors: A_t = δ_t + γ 1[δ_{t+1} ≥ 0] A_{t+1}. Biased upwards: good luck is kept, bad luck is replaced by V.
    """
    deltas = td_errors(rewards, values, next_values, terminated, gamma)
    return _backwards(deltas, gamma * _next((deltas >= 0).to(deltas.dtype)), terminated | truncated)


def leave_one_out(returns: Tensor) -> Tensor:
    """RLOO: each of (…, K) returns of a group minus the mean of the others. Unbiased, as that baseline is independent
    of the return it is subtracted from. UserError if K is below 2."""
    returns = _group(returns)
    k = returns.shape[-1]
    return (returns - returns.mean(-1, keepdim=True)) * (k / (k - 1))


def group_normalized(returns: Tensor, eps: float = 1e-4) -> Tensor:
    """GRPO (Shao et al. 2024, arXiv:2402.03300): (returns − mean) / (standard deviation + eps) of a group (…, K).

    The deviation is that of n − 1. Biased: the mean contains the return itself, and the deviation gives hard and easy
    groups the same scale. UserError if K is below 2.
    """
    returns = _group(returns)
    return (returns - returns.mean(-1, keepdim=True)) / (returns.std(-1, keepdim=True) + eps)


def _group(returns: Tensor) -> Tensor:
    """The returns (…, K) of groups in floating point, K at least 2."""
    count = returns.shape[-1] if returns.dim() else 1
    if count < 2:
        raise UserError(f"a group of {count} has no other return to compare with: it needs at least 2")
    return _floating(returns)


def _floating(x: Tensor) -> Tensor:
    """Rewards may be integers."""
    return x if x.is_floating_point() else x.to(torch.get_default_dtype())


def whitened(values: Tensor, mask: Tensor | None = None, *, center: bool = True, eps: float = 1e-8) -> Tensor:
    """Whitening: (values − mean) / standard deviation (n − 1), over the values that `mask` (same shape, bool) selects,
    such as the tokens of a minibatch. Masked values are ignored, NaN included, and return 0.

    center=False adds the mean back, for rewards, whose sign matters (Ziegler et al. 2019, arXiv:1909.08593).
    """
    values = _floating(values)
    if mask is None:
        count = values.numel()
        mean = values.sum() / max(count, 1)
        off = values - mean
        white = off / ((off.square().sum() / max(count - 1, 1)).sqrt() + eps)
        return white if center else white + mean
    n = mask.sum()
    mean = values.masked_fill(~mask, 0.0).sum() / n.clamp(min=1)
    off = (values - mean).masked_fill(~mask, 0.0)
    white = off / ((off.square().sum() / (n - 1).clamp(min=1)).sqrt() + eps)
    return white if center else (white + mean).masked_fill(~mask, 0.0)


@torch.no_grad()
def token_rewards(scores: Tensor, log_probs: Tensor, reference: Tensor, last: Tensor, beta: float) -> Tensor:
    """Rewards of the tokens of answers with a KL penalty: −β (log π − log π_ref) at each, plus the answer's score at
    its last one (Ziegler et al. 2019, arXiv:1909.08593, eq. 2). last: bool; scores: broadcast to the tokens."""
    return -beta * (log_probs - reference) + last * scores


def last_token(mask: Tensor) -> Tensor:
    """(T, N) bool: the last token that `mask` selects in each column."""
    return mask & (mask.flip(0).cumsum(0).flip(0) == 1)


def _next(x: Tensor) -> Tensor:
    """Shifts by one step: x_{t+1} at t, 0 at the last step."""
    return torch.cat([x[1:], torch.zeros_like(x[:1])])


def _backwards(terms: Tensor, factors: Tensor, ends: Tensor) -> Tensor:
    """The recursion x_t = terms_t + factors_t · x_{t+1}, which starts again at the end of an episode."""
    result, x = torch.empty_like(terms), torch.zeros_like(terms[0])
    for t in reversed(range(len(terms))):
        x = terms[t] + (factors[t] * x).masked_fill(ends[t], 0.0)
        result[t] = x
    return result
