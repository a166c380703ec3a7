"""The loss of a batch of pairs, by name. Each is a few lines over the same four numbers of a pair.

With the log ratio of an answer y to a prompt x

    h(y) = log π(y | x) − log π_ref(y | x)          its implicit reward is β · h(y)

direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290, eq. 7) fits the model of Bradley and Terry to
the pairs (w: chosen, l: rejected):

    loss = −log σ(β · (h(w) − h(l)))

Names: σ is the logistic function, ε the share of labels that are expected to be wrong, |y| the tokens of an answer. All
functions return (B,) losses; means are taken by who calls them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]
MOST = 80.0  # of an exponent in fp32


@dataclass(frozen=True)
class Pairs:
    """Log-probabilities of the answers, summed over their tokens, (B,) each, and how many tokens they have."""

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor  # without gradients
    reference_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    @property
    def ratios(self) -> tuple[Tensor, Tensor]:
        """h(w), h(l)."""
        return self.chosen - self.reference_chosen, self.rejected - self.reference_rejected

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """log π of the answers, a token."""
        return self.chosen / self.chosen_tokens, self.rejected / self.rejected_tokens


@dataclass(frozen=True)
class Settings:
    """What the losses are told. `beta`: how strongly the policy is held to the reference."""

    beta: float = 0.1
    smoothing: float = 0.0  # ε
    gamma: float = 0.5  # SimPO's margin; ORPO's weight of the odds ratio is beta
    divergence: Divergence = "reverse_kl"
    alpha: float = 0.5  # of the α-divergence
    ipo_sum: bool = False  # IPO of sums over tokens, as in its paper's formula, instead of means


def scores(pairs: Pairs, s: Settings) -> tuple[Tensor, Tensor]:
    """f′(e^h) of both answers, where f is the divergence that holds the policy: h itself for the reverse KL of DPO
    (Wang et al. 2024, arXiv:2309.16240, table 1). Constants, which cancel in a pair, are those of the table."""
    return tuple(divergence_score(h, s) for h in pairs.ratios)  # type: ignore[return-value]


def divergence_score(h: Tensor, s: Settings) -> Tensor:
    if s.divergence == "forward_kl":
        return 1 - (-h).clamp(max=MOST).exp()
    if s.divergence == "js":
        return math.log(2) + F.logsigmoid(h)
    if s.divergence == "alpha" and abs(s.alpha - 1) > 1e-6:  # at 1 it is the reverse KL
        return (((s.alpha - 1) * h).clamp(max=MOST).exp() - 1) / (s.alpha - 1)
    return h


def margin(pairs: Pairs, s: Settings) -> Tensor:
    """β · (score of chosen − score of rejected)."""
    chosen, rejected = scores(pairs, s)
    return s.beta * (chosen - rejected)


# --- Losses of a margin


def sigmoid(pairs: Pairs, s: Settings) -> Tensor:
    """DPO; with ε conservative DPO (Mitchell 2023): the cross entropy with labels of which the share ε is flipped."""
    m = margin(pairs, s)
    return -(1 - s.smoothing) * F.logsigmoid(m) - s.smoothing * F.logsigmoid(-m)


def robust(pairs: Pairs, s: Settings) -> Tensor:
    """Chowdhury et al. 2024, arXiv:2403.00409, eq. 12: its mean over labels flipped with ε is DPO's over clean ones."""
    m = margin(pairs, s)
    return (-(1 - s.smoothing) * F.logsigmoid(m) + s.smoothing * F.logsigmoid(-m)) / (1 - 2 * s.smoothing)


def hinge(pairs: Pairs, s: Settings) -> Tensor:
    """SLiC's (Zhao et al. 2023, arXiv:2305.10425): nothing more to gain from a pair beyond the margin 1."""
    return (1 - margin(pairs, s)).relu()


def exo(pairs: Pairs, s: Settings) -> Tensor:
    """Ji et al. 2024, arXiv:2402.00856, eq. 16: the reverse KL from the policy's choice to the labels smoothed by ε."""
    m = margin(pairs, s)
    log_w, log_l = F.logsigmoid(m), F.logsigmoid(-m)
    return log_w.exp() * (log_w - math.log1p(-s.smoothing)) + log_l.exp() * (log_l - math.log(s.smoothing))


def discopop(pairs: Pairs, s: Settings) -> Tensor:
    """Lu et al. 2024, arXiv:2406.08414, eq. 5 (τ = 0.05), found by a search over programs: logistic for small margins,
    exponential for large ones."""
    m = margin(pairs, s)
    mix = torch.sigmoid(m / 0.05)
    return -F.logsigmoid(m) * (1 - mix) + torch.exp(-m) * mix


def ipo(pairs: Pairs, s: Settings) -> Tensor:
    """Azar et al. 2023, arXiv:2310.12036, eq. 17 (their τ is β): a squared loss with its optimum at a margin of
    1 / 2β, which a pair that is always ordered the same way does not push to infinity. Of means over tokens, as its
    authors ran it, or of sums (`ipo_sum`), as the formula has it."""
    chosen, rejected = scores(pairs, s)
    if not s.ipo_sum:
        chosen, rejected = chosen / pairs.chosen_tokens, rejected / pairs.rejected_tokens
    return (chosen - rejected - 1 / (2 * s.beta)).square()


def normed(pairs: Pairs, s: Settings) -> Tensor:
    """DPO of log ratios a token, so that a long answer counts as much as a short one."""
    chosen, rejected = scores(pairs, s)
    return -F.logsigmoid(s.beta * (chosen / pairs.chosen_tokens - rejected / pairs.rejected_tokens))


# --- Losses of the two answers apart


def nca(pairs: Pairs, s: Settings) -> Tensor:
    """Chen et al. 2024, arXiv:2402.05369: noise-contrastive, it also wants the chosen answer's log ratio high."""
    w, l = (s.beta * h for h in pairs.ratios)
    return -F.logsigmoid(w) - 0.5 * F.logsigmoid(-w) - 0.5 * F.logsigmoid(-l)


def sppo(pairs: Pairs, s: Settings) -> Tensor:
    """Wu et al. 2024, arXiv:2405.00675, eq. 4.7 with the chosen answer winning always: log ratios of ± 1 / 2β."""
    w, l = pairs.ratios
    return (w - 0.5 / s.beta).square() + (l + 0.5 / s.beta).square()


def apo_zero(pairs: Pairs, s: Settings) -> Tensor:
    """D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7: chosen answers better than the model's become likelier."""
    w, l = (s.beta * h for h in pairs.ratios)
    return 1 - torch.sigmoid(w) + torch.sigmoid(l)


def apo_down(pairs: Pairs, s: Settings) -> Tensor:
    """Ibid., eq. 8: chosen answers worse than the model's become less likely too, rejected ones more so."""
    w, l = (s.beta * h for h in pairs.ratios)
    return torch.sigmoid(w) + 1 - torch.sigmoid(w - l)


def bco(pairs: Pairs, s: Settings) -> Tensor:
    """Jung et al. 2024, arXiv:2404.04656, of pairs and without its moving shift: a classifier of good and bad."""
    w, l = (s.beta * h for h in pairs.ratios)
    return -F.logsigmoid(w) - F.logsigmoid(-l)


# --- Losses of the whole batch


def aot(pairs: Pairs, s: Settings) -> Tensor:
    """Melnyk et al. 2024, arXiv:2406.05882: the margins of the policy, sorted, dominate those of the reference."""
    difference = (pairs.chosen - pairs.rejected).sort().values
    reference = (pairs.reference_chosen - pairs.reference_rejected).sort().values
    return smoothed(s.beta * (difference - reference), s)


def aot_unpaired(pairs: Pairs, s: Settings) -> Tensor:
    """Ibid.: the sorted log ratios of good answers dominate those of bad ones, whichever prompt they answer."""
    w, l = (h.sort().values for h in pairs.ratios)
    return smoothed(s.beta * (w - l), s)


def smoothed(m: Tensor, s: Settings) -> Tensor:
    return -(1 - s.smoothing) * F.logsigmoid(m) - s.smoothing * F.logsigmoid(-m)


# --- Losses without a reference


def simpo(pairs: Pairs, s: Settings) -> Tensor:
    """Meng et al. 2024, arXiv:2405.14734, eq. 6: log-probabilities a token and a margin γ."""
    chosen, rejected = pairs.means
    return smoothed(s.beta * (chosen - rejected) - s.gamma, s)


def orpo(pairs: Pairs, s: Settings) -> Tensor:
    """Hong et al. 2024, arXiv:2403.07691, eq. 6–7: the chosen answer's cross entropy a token, and β times the log of
    the odds ratio of the answers, odds = p / (1 − p) with p of a token on average."""
    chosen, rejected = pairs.means
    odds = log_odds(chosen) - log_odds(rejected)
    return -chosen - s.beta * F.logsigmoid(odds)


def log_odds(mean: Tensor) -> Tensor:
    """log (p / (1 − p)) of log p < 0."""
    return mean - torch.log1p(-mean.exp())


def sft(pairs: Pairs, s: Settings) -> Tensor:
    """The chosen answer's cross entropy a token: the term that RPO adds (Pang et al. 2024, arXiv:2404.19733)."""
    return -pairs.means[0]


LOSSES: dict[str, tuple[str, Callable[[Pairs, Settings], Tensor]]] = {
    "sigmoid": ("DPO; with --smoothing conservative DPO", sigmoid),
    "robust": ("DPO, unbiased where a known share of the labels is wrong", robust),
    "hinge": ("SLiC's hinge on the margin", hinge),
    "ipo": ("squared distance of the margin from 1 / 2β", ipo),
    "exo": ("reverse KL to the labels; needs --smoothing", exo),
    "nca": ("noise-contrastive, holds the chosen answer up", nca),
    "sppo": ("squared distance of log ratios from ± 1 / 2β", sppo),
    "apo_zero": ("chosen up, rejected down", apo_zero),
    "apo_down": ("chosen down, rejected further down", apo_down),
    "bco": ("a classifier of good and bad answers", bco),
    "aot": ("sorted margins against the reference's", aot),
    "aot_unpaired": ("sorted log ratios, good against bad", aot_unpaired),
    "discopop": ("found by a search over programs", discopop),
    "sigmoid_norm": ("DPO of log ratios a token", normed),
    "simpo": ("no reference: log-probabilities a token with a margin", simpo),
    "orpo": ("no reference: cross entropy and an odds ratio", orpo),
}
REFERENCE_FREE = {"simpo", "orpo", "sft"}


# --- Single judgments


def kto(h: Tensor, good: Tensor, kl: Tensor, beta: float, weights: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8: answers that are good or bad, no pairs.

        good: λ_D · (1 − σ(β (h − z))),   bad: λ_U · (1 − σ(β (z − h)))

    h (B,): log ratios; good (B,) bool; kl: z, an estimate of KL(π ‖ π_ref), at least 0, through which no gradient runs;
    weights: λ_D, λ_U, which balance unequal numbers of the two."""
    value = torch.where(good, h - kl, kl - h)
    weight = torch.where(good, weights[0], weights[1])
    return weight * (1 - torch.sigmoid(beta * value))


def kto_kl(mismatched: Tensor) -> Tensor:
    """z of a batch: the mean log ratio of answers to other prompts than theirs, not below 0."""
    return mismatched.detach().mean().clamp(min=0)


# --- Weights and sums over tokens


def length_desensitized(values: Tensor, places: Tensor, shared: Tensor, alpha: float) -> Tensor:
    """LD-DPO (Liu et al. 2024, arXiv:2409.06411): tokens (n,) behind the shorter answer's length count α instead of 1.
    places (n,): which token of its answer each is, from 0; shared (n,): tokens of the shorter answer of its pair."""
    return torch.where(places < shared, values, alpha * values)


def wpo_weight(logprobs: Tensor, squares: Tensor) -> Tensor:
    """WPO (Zhou et al. 2024, arXiv:2406.11827, eq. 2): how likely an answer is for the policy, exp of the mean over its
    tokens of log p − log Σ_v p(v)². Of (tokens,) each; no gradient."""
    return (logprobs - squares).mean().exp().detach()
