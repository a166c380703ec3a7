"""Policy-gradient losses of sampled answers: what GRPO and its relatives minimize.

Tokens of all answers lie end to end, with `owner` for the answer that each belongs to. With the ratio of the policy to
the one that sampled, of a token or of a whole answer (GSPO)

    ρ_t = π(y_t | y_<t) / π_old(y_t | y_<t),        s = exp(mean over the answer's tokens of log ρ_t)

and the advantage A of the answer, a token's loss is

    clipped   −min(ρ A, clip(ρ, 1 − ε_low, 1 + ε_high) A)        PPO (Schulman et al. 2017, arXiv:1707.06347, eq. 7)
    cispo     −clip(ρ, max 1 + ε_high) A · log π, no gradient of ρ       MiniMax 2025, arXiv:2506.13585, eq. 4
    sapo      −σ(τ (ρ − 1)) · 4 / τ · A, with τ by the sign of A         Gao et al. 2025, arXiv:2511.20347
    vespo     −φ(w) A · log π, no gradient of φ(w) = e^λ w^k e^(−λ w), w = Π ρ_t of the answer, k and λ by the sign of A
                                                                          arXiv:2602.10693

and the batch's loss is a sum over tokens divided by

    grpo      the answer's tokens, then the number of answers: a long wrong answer costs no more than a short one, so
              that wrong answers grow (Liu et al. 2025, arXiv:2503.20783, §3.1)
    dapo      all tokens of the batch (Yu et al. 2025, arXiv:2503.14476, eq. 8); bnpo is the same of the tokens of one
              update, where a batch is several
    dr_grpo   answers · most tokens of an answer: a constant, without bias by length
    sum       the number of answers: for a ratio of the answer, whose mean over tokens is multiplied by their number
              (LUSPO, arXiv:2602.05261)

Sums over micro-batches with the totals of the whole batch give the gradient of the whole batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from finetune.alignment import kl

Loss = Literal["clipped", "cispo", "sapo", "vespo"]
Mean = Literal["grpo", "dapo", "dr_grpo", "sum"]
Level = Literal["token", "sequence"]


@dataclass(frozen=True)
class Settings:
    """Which loss. The names under which papers and libraries know a combination are in `NAMED`."""

    loss: Loss = "clipped"
    mean: Mean = "grpo"
    level: Level = "token"  # of the ratio
    clip_low: float = 0.2
    clip_high: float = 0.2  # DAPO's clip-higher: 0.28; CISPO: of the ratio above 1
    dual_clip: float = 0.0  # > 1: the loss of a negative advantage is at most this times −A (Ye et al. 2020)
    two_sided: float = 0.0  # > 1 + clip_high: largest ratio that counts (INTELLECT-2, arXiv:2505.07291)
    temperature_up: float = 1.0  # SAPO's τ of positive advantages
    temperature_down: float = 1.05  # … of negative ones
    vespo_up: tuple[float, float] = (2.0, 3.0)  # VESPO's k and λ of advantages from 0 up
    vespo_down: tuple[float, float] = (3.0, 2.0)  # … of negative ones
    kl_weight: float = 0.0  # coefficient of the KL term in the loss
    kl_kind: kl.Estimator = "k3"
    kl_ratio: bool = True  # the estimate times ρ, with which its gradient is right (finetune/alignment/kl.py)
    entropy: float = 0.0  # coefficient of an entropy bonus
    entropy_share: float = 1.0  # only this share of the tokens, those of the highest entropy, has a policy loss
    sampler_cap: float = 2.0  # truncated importance weight of the sampler's difference (Yao et al. 2025)


NAMED: dict[str, Settings] = {
    "grpo": Settings(),
    "bnpo": Settings(mean="dapo"),
    "dr_grpo": Settings(mean="dr_grpo"),
    "dapo": Settings(mean="dapo", clip_high=0.28),
    "gspo": Settings(level="sequence", clip_low=3e-4, clip_high=4e-4),
    "cispo": Settings(loss="cispo", mean="dapo", clip_high=4.0),
    "sapo": Settings(loss="sapo"),
    "luspo": Settings(mean="sum", level="sequence", clip_low=3e-4, clip_high=4e-4),
    "vespo": Settings(loss="vespo", mean="dapo"),
}


@dataclass(frozen=True)
class Answers:
    """Tokens of N answers end to end, n in all. The end token is one of them; what a mask hides is not among them."""

    logprobs: Tensor  # (n,) log π with gradients
    old: Tensor  # (n,) log π_old, of the trainer's forward when the batch began
    owner: Tensor  # (n,) int64
    advantages: Tensor  # (N,)
    entropies: Tensor | None = None  # (n,) with gradients
    reference: Tensor | None = None  # (n,) log π_ref
    sampler: Tensor | None = None  # (n,) log-probabilities that the sampler had
    # (n,) bool: tokens that have a policy loss, if these are a part of a batch; None: found by Settings.entropy_share
    chosen: Tensor | None = None


@dataclass(frozen=True)
class Totals:
    """Of the whole batch, of which the answers at hand may be a part."""

    answers: int
    tokens: float  # where a batch is divided into updates, an update's share of them
    most_tokens: int  # an answer may have

    @classmethod
    def of(cls, owner: Tensor, answers: int, most_tokens: int) -> Totals:
        return cls(answers, len(owner), most_tokens)


@dataclass(frozen=True)
class Parts:
    """A loss (scalar) and what was seen on the way, without gradients; sums, to be divided by the totals."""

    loss: Tensor
    kl: float  # Σ k3 over tokens, if there is a reference
    clipped: float  # tokens whose ratio was clipped, and so have no gradient
    ratio: float  # Σ ρ
    approximate_kl: float  # Σ (ρ − 1 − log ρ): from the old policy


def policy_loss(answers: Answers, totals: Totals, s: Settings) -> Parts:
    """The loss of some answers of a batch. No answers: a loss of 0 without gradient."""
    lengths = torch.bincount(answers.owner, minlength=len(answers.advantages))
    log_ratio = answers.logprobs - answers.old
    if s.level == "sequence":
        means = torch.zeros_like(lengths, dtype=log_ratio.dtype).index_add(0, answers.owner, log_ratio)
        log_ratio = (means / lengths.clamp(min=1))[answers.owner]
    ratio = log_ratio.exp()
    a = answers.advantages[answers.owner]
    # The sampler's policy is not quite the trainer's (bf16 or int8 products): weight, but never by much.
    weight = None if answers.sampler is None else (answers.old - answers.sampler).exp().clamp(max=s.sampler_cap)
    if s.loss == "vespo":
        apart = (answers.logprobs - answers.old).detach()
        loss = vespo(answers, apart if weight is None else apart + weight.log(), a, s)
        clipped = torch.zeros_like(a, dtype=torch.bool)
    else:
        loss, clipped = surrogate(ratio, a, answers.logprobs, s)
        loss = loss if weight is None else loss * weight
    if s.entropy_share < 1:
        chosen = most_uncertain(answers.entropies, s.entropy_share) if answers.chosen is None else answers.chosen
        loss = loss * chosen
    estimate = torch.zeros_like(loss)
    if answers.reference is not None:
        estimate = kl.estimate("k3", answers.logprobs.detach(), answers.reference)
        if s.kl_weight:
            with_gradient = ratio if s.kl_ratio else None
            loss = loss + s.kl_weight * kl.estimate(s.kl_kind, answers.logprobs, answers.reference, with_gradient)
    total = (loss * weights(s.mean, answers.owner, lengths, totals).to(loss.dtype)).sum()
    if s.entropy and answers.entropies is not None:
        total = total - s.entropy * answers.entropies.sum() / max(totals.tokens, 1)
    with torch.no_grad():
        approximate = (ratio - 1 - log_ratio).sum().item()
    return Parts(total, estimate.sum().item(), clipped.sum().item(), ratio.sum().item(), approximate)


def surrogate(ratio: Tensor, a: Tensor, logprobs: Tensor, s: Settings) -> tuple[Tensor, Tensor]:
    """(loss of each token, whether its ratio was clipped), (n,) each."""
    above, below = ratio > 1 + s.clip_high, ratio < 1 - s.clip_low
    if s.loss == "cispo":
        return -ratio.clamp(max=1 + s.clip_high).detach() * a * logprobs, above
    if s.loss == "sapo":
        temperature = torch.where(a > 0, s.temperature_up, s.temperature_down)
        return -torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature * a, torch.zeros_like(above)
    plain = ratio.clamp(max=s.two_sided) if s.two_sided else ratio
    loss = -torch.min(plain * a, ratio.clamp(1 - s.clip_low, 1 + s.clip_high) * a)
    if s.dual_clip:
        loss = torch.where(a < 0, torch.min(loss, -s.dual_clip * a), loss)
    return loss, (above & (a > 0)) | (below & (a < 0))


def vespo(answers: Answers, apart: Tensor, a: Tensor, s: Settings) -> Tensor:
    """VESPO's loss of each token (n,); `apart` (n,): log ratios, whose sum over an answer is log w."""
    sums = torch.zeros(len(answers.advantages), dtype=apart.dtype, device=apart.device)
    log_w = sums.index_add(0, answers.owner, apart.clamp(-20, 20)).clamp(math.log(1e-8), 20)[answers.owner]
    k, rate = (torch.where(a >= 0, up, down) for up, down in zip(s.vespo_up, s.vespo_down, strict=True))
    return -(rate + k * log_w - rate * log_w.exp()).exp() * a * answers.logprobs


def weights(mean: Mean, owner: Tensor, lengths: Tensor, totals: Totals) -> Tensor:
    """(n,): what the losses of the tokens are multiplied by before they are added."""
    if mean == "grpo":
        return 1.0 / (lengths[owner].double() * totals.answers)
    divisor = {
        "dapo": totals.tokens,
        "dr_grpo": totals.answers * totals.most_tokens,
        "sum": totals.answers,
    }[mean]
    return torch.full(owner.shape, 1.0 / max(divisor, 1), dtype=torch.float64, device=owner.device)


def most_uncertain(entropies: Tensor | None, share: float) -> Tensor:
    """(n,) bool: the share of the tokens with the highest entropies (Wang et al. 2025, arXiv:2506.01939)."""
    assert entropies is not None, "the entropies are needed to choose tokens by them"
    if not len(entropies):
        return torch.zeros_like(entropies, dtype=torch.bool)
    return entropies.detach() >= torch.quantile(entropies.detach().float(), 1 - share)
