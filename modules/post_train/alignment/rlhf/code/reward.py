"""Stage 2, the reward model: one number for an answer, from pairs of a better and a worse one.

    P(y_w ≻ y_l) = σ(r(x, y_w) − r(x, y_l)),        loss = −log σ(r_w − r_l − margin) + centering · (r_w + r_l)²

Bradley and Terry 1952; InstructGPT (arXiv:2203.02155, eq. 1). The model is that of stage 1 with an adapter for itself
and a number for a head (finetune/alignment/reward_model.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from finetune import ops, optim
from finetune.alignment import logprobs
from finetune.alignment.reward_model import RewardModel, calibration, pair_loss
from finetune.data import packing
from finetune.data.packing import Document
from finetune.runs.run import Run

from .data import Pair
from .stages import wear

if TYPE_CHECKING:
    from .main import Config

CLEAR = 1.5  # a gap of the gold reward at which a pair is clear


def train(cfg: Config, run: Run, reward: RewardModel, pairs: Sequence[Pair]) -> None:
    """Trains the adapter "reward" and the head. --flipped turns some pairs round, always the same ones."""
    trained = {name: p for name, p in reward.named_parameters() if p.requires_grad}
    optimizer = optim.AdamW(optim.decay_groups(trained.values(), 0.0), lr=cfg.reward_lr)
    flipped = torch.rand(len(pairs), generator=run.generator("flipped")) < cfg.flipped
    for step in run.steps(cfg.reward_steps, {"trained": trained, "optimizer": optimizer}, phase="reward"):
        chosen = packing.batch_indices(len(pairs), cfg.reward_batch, step, lambda epoch: run.generator("reward", epoch))
        some = [turned(pairs[i]) if flipped[i] else pairs[i] for i in chosen]
        loss, margins = loss_of(cfg, reward, some)
        loss.backward()
        norm = ops.clip_grad_norm_([p.grad for p in trained.values() if p.grad is not None], cfg.clip)
        lr = optim.cosine(step, cfg.reward_steps, cfg.warmup, cfg.reward_lr, cfg.reward_lr / 10)
        optimizer.step(lr=lr)
        optimizer.zero_grad()
        run.log(step, loss=loss, accuracy=right(margins), margin=margins.mean(), grad_norm=norm, lr=lr)


def turned(pair: Pair) -> Pair:
    return Pair(pair.rejected, pair.chosen, pair.gap)


def loss_of(cfg: Config, reward: RewardModel, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """(mean loss with gradients, (B,) margins) of pairs; chosen ones first, end to end in one batch. Each head of an
    ensemble has its own loss."""
    found = reward(packing.collate([p.chosen for p in pairs] + [p.rejected for p in pairs]))  # (2B, heads)
    chosen, rejected = found.chunk(2)
    gaps = torch.tensor([p.gap or 0.0 for p in pairs], device=found.device)
    loss = pair_loss(chosen, rejected, cfg.margin * gaps[:, None], cfg.centering)
    return loss, (chosen - rejected).mean(1).detach()


def right(margins: Tensor) -> Tensor:
    """Share of margins above 0; one of exactly 0 is half right."""
    return ((margins.sign() + 1) / 2).mean()


@torch.no_grad()
def scores(reward: RewardModel, documents: Sequence[Document], caution: float = 0.0) -> Tensor:
    """(N,): the rewards of documents, about 2,048 tokens at a time. The adapter "reward" is put on for it."""
    wear(reward.model, "reward")
    parts = [reward.score(packing.collate(part), caution) for part in logprobs.chunks(documents, 2048)]
    return torch.cat(parts)


@dataclass(frozen=True)
class Quality:
    """How well a reward model orders held-out pairs: of all, and of those with a clear gap (NaN without one); its
    calibration (mean predicted, share right, pairs); the mean distance between the two, weighted by pairs."""

    accuracy: float
    clear_accuracy: float
    calibration: list[tuple[float, float, int]]
    calibration_error: float


def quality(reward: RewardModel, pairs: Sequence[Pair]) -> Quality:
    """Of held-out pairs."""
    found = scores(reward, [d for p in pairs for d in (p.chosen, p.rejected)]).view(-1, 2)
    margins = found[:, 0] - found[:, 1]
    clear = torch.tensor([p.gap is not None and p.gap >= CLEAR for p in pairs])
    rows = calibration(margins)
    error = sum(abs(predicted - share) * count for predicted, share, count in rows) / len(pairs)
    return Quality(right(margins).item(), right(margins[clear]).item(), rows, error)
