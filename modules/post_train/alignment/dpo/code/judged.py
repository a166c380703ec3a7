"""KTO: single answers that are good or bad, instead of pairs (Ethayarajh et al. 2024, arXiv:2402.01306)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from finetune.alignment.logprobs import Reference
from finetune.data.packing import Document
from finetune.lm.llama import Llama

from .batch import Rows
from .losses import kto, kto_kl
from .reference import MovingReference

if TYPE_CHECKING:
    from .data import Sets
    from .main import Config


def kto_losses(
    cfg: Config, model: Llama, documents: Sequence[Document], good: Tensor, reference: Reference | MovingReference
) -> tuple[Tensor, Tensor]:
    """((B,) losses, (B,) log ratios) of single answers; the KL is estimated by answers to the batch's other prompts."""
    rows, crossed = (Rows([[one] for one in some]) for some in (documents, mismatched(documents)))
    with torch.no_grad():
        apart = crossed.sums(crossed.logprobs(model))
        with reference.standing() as standing:
            apart -= crossed.sums(crossed.logprobs(standing))
            start = rows.sums(rows.logprobs(standing))
    h = rows.sums(rows.logprobs(model)) - start
    return kto(h, good, kto_kl(apart), cfg.beta, (cfg.good_weight, cfg.bad_weight)), h


def mismatched(documents: Sequence[Document]) -> list[Document]:
    """Each prompt with the answer to the next one."""
    cuts = [list(d.mask).index(1) for d in documents]
    found = []
    for i, (d, cut) in enumerate(zip(documents, cuts, strict=True)):
        j = (i + 1) % len(documents)
        other = documents[j]
        answer, mask = list(other.ids)[cuts[j] :], list(other.mask)[cuts[j] :]
        found.append(Document(list(d.ids)[:cut] + answer, [0] * cut + mask))
    return found


def judgments(sets: Sets) -> tuple[list[Document], Tensor]:
    """What KTO's steps draw from: documents, and (N,) whether each is good. A pair is two."""
    rows = sets.judged or [(d, good) for p in sets.train for d, good in ((p.chosen, True), (p.rejected, False))]
    return [d for d, _ in rows], torch.tensor([good for _, good in rows])


def accumulate_kto(
    cfg: Config, model: Llama, documents: Sequence[Document], good: Tensor, reference: Reference | MovingReference
) -> dict[str, float]:
    """Adds the gradient of the mean loss; returns it, and the implicit rewards of good and bad answers of the batch,
    where it has any."""
    loss, h = kto_losses(cfg, model, documents, good, reference)
    loss.mean().backward()
    found = {"loss": loss.mean().item()}
    for name, which in (("chosen_reward", good), ("rejected_reward", ~good)):
        if which.any():
            found[name] = cfg.beta * h[which].mean().item()
    return found
