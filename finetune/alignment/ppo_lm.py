"""PPO of a language model's answers: the reward of each token, its advantage, and the losses of policy and critic.

Ziegler et al. 2019 (arXiv:1909.08593), InstructGPT (arXiv:2203.02155). An answer is an episode, its tokens are the
actions. The score of the answer comes at its last token, and every token pays for its distance from the reference:

    r_t = −β (log π_old − log π_ref)(y_t) + [t is the last token] · score         E[Σ r] = E[score] − β KL(π ‖ π_ref)
    A, G = A + V = GAE(r, V)                                                      V(s_t): before token t is chosen
    L = −mean(min(ρ A, clip(ρ, 1 ± ε) A)) + c_v ½ mean(max((V − G)², (V_old ± ε_v − G)²)),    ρ = π / π_old

Tokens of all answers lie end to end, with `owner` (rising) for the answer that each belongs to: prompts and padding are
not among them, so one mask holds for losses, KL, whitening and metrics. β is fixed or adaptive (kl.py), and V is
`reward_model.ValueModel`'s.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from finetune import ops
from finetune.rl.advantages import token_rewards, whitened
from finetune.rl.agents import surrogate


@dataclass(frozen=True)
class Experience:
    """What is fixed over the passes of an update: n tokens of N answers, as the policy that sampled them left them."""

    owner: Tensor  # (n,) int64, rising
    old: Tensor  # (n,) log π_old
    values: Tensor  # (n,) V before the update
    advantages: Tensor  # (n,) whitened, times the sampler's importance weight
    targets: Tensor  # (n,) G
    kl: float  # mean over the answers of Σ (log π_old − log π_ref), nats, for the controller of β

    def rows(self, answers: Tensor) -> Experience:
        """That of some answers (their numbers, (m,)), in this order; they are then numbered from 0."""
        lengths = torch.bincount(self.owner, minlength=int(answers.max()) + 1)
        starts, lengths = (lengths.cumsum(0) - lengths)[answers], lengths[answers]
        owner = torch.repeat_interleave(torch.arange(len(answers)), lengths)
        tokens = torch.arange(len(owner)) - (lengths.cumsum(0) - lengths)[owner] + starts[owner]
        old, values, advantages, targets = (x[tokens] for x in (self.old, self.values, self.advantages, self.targets))
        return Experience(owner, old, values, advantages, targets, self.kl)


@dataclass(frozen=True)
class Losses:
    """Losses of tokens, with gradients, and what was seen on the way."""

    policy: Tensor
    value: Tensor
    clip_fraction: float  # of the ratios outside 1 ± ε
    value_clip_fraction: float  # tokens at which the clipped value has the larger error
    approximate_kl: float  # mean of ρ − 1 − log ρ


def ends(owner: Tensor) -> Tensor:
    """(n,) bool: the last token of each answer."""
    last = torch.ones_like(owner, dtype=torch.bool)
    last[:-1] = owner[1:] != owner[:-1]
    return last


@torch.no_grad()
def experience(
    scores: Tensor,
    old: Tensor,
    reference: Tensor,
    values: Tensor,
    owner: Tensor,
    beta: float,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    whiten: bool = True,
    sampler: Tensor | None = None,
    sampler_cap: float = 2.0,
) -> Experience:
    """Rewards, GAE through the op and whitening of a batch: scores (N,), the rest (n,). An answer without tokens has
    no reward. sampler: log-probabilities that the tokens were drawn with, where that was not quite π_old's (bf16 or
    int8 products); the truncated weight π_old / π_sampler corrects it (Yao et al. 2025), as in policy_loss.py."""
    last = ends(owner)
    rewards = token_rewards(scores[owner], old, reference, last, beta)
    following = torch.cat([values[1:], torch.zeros_like(values[:1])])  # behind a last token it does not count
    columns = (x[:, None] for x in (rewards, values, following, last, torch.zeros_like(last)))
    advantages, targets = (x[:, 0] for x in ops.gae(*columns, gamma=gamma, lam=lam))
    if whiten:
        advantages = whitened(advantages)
    if sampler is not None:
        advantages = advantages * (old - sampler).exp().clamp(max=sampler_cap)
    kl = float((old - reference).sum()) / max(1, int(last.sum()))
    return Experience(owner, old, values, advantages, targets, kl)


def losses(
    logprobs: Tensor,
    values: Tensor,
    e: Experience,
    *,
    clip: float = 0.2,
    value_clip: float | None = 0.2,
    tokens: int | None = None,
) -> Losses:
    """The losses of (n,) log π and V with gradients. `tokens`: of the whole batch, if this is a micro-batch of it: sums
    over micro-batches then give the gradient of the whole batch."""
    count = max(1, len(logprobs) if tokens is None else tokens)
    log_ratios = logprobs - e.old
    policy = surrogate.clipped_surrogate(log_ratios, e.advantages, clip).sum() / count
    plain = surrogate.value_loss(values, e.targets)
    errors = plain if value_clip is None else surrogate.value_loss(values, e.targets, e.values, value_clip)
    with torch.no_grad():
        outside = float((log_ratios.expm1().abs() > clip).sum()) / count
        kl = float(surrogate.approximate_kl(log_ratios).sum()) / count
        larger = float((errors > plain).sum()) / count
    return Losses(policy, 0.5 * errors.sum() / count, outside, larger, kl)
