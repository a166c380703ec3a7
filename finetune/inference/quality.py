"""What fewer bits cost: a model's loss on text and the divergence of its predictions from those of another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from finetune.lm.gpt import GPT
from finetune.lm.llama import Llama


@dataclass(frozen=True)
class Quality:
    """Means over the tokens of a text, in nats."""

    tokens: int
    loss: float  # of the model
    reference: float  # of the model that it is compared with
    divergence: float  # KL(reference ‖ model) of the next token's distributions
    same: float  # share of positions at which both have the same most likely token

    @property
    def change(self) -> float:
        """By how much the loss is larger than the reference's."""
        return self.loss - self.reference


@torch.no_grad()
def quality(model: Llama | GPT, reference: Llama | GPT, rows: Iterable[Sequence[int]]) -> Quality:
    """How `model` predicts each token of the rows from those before it, next to `reference`; rows of one token count
    nothing."""
    sums, count = torch.zeros(4, dtype=torch.float64), 0
    for row in rows:
        if len(row) < 2:
            continue
        tokens = torch.tensor([row], device=reference.norm.weight.device)
        p = reference(tokens[:, :-1])[0].float().log_softmax(-1)  # (T − 1, V)
        q = model(tokens[:, :-1])[0].float().log_softmax(-1)
        sums[0] += F.nll_loss(q, tokens[0, 1:], reduction="sum").double().cpu()
        sums[1] += F.nll_loss(p, tokens[0, 1:], reduction="sum").double().cpu()
        sums[2] += (p.exp() * (p - q)).sum().double().cpu()
        sums[3] += (p.argmax(-1) == q.argmax(-1)).sum().cpu()
        count += len(row) - 1
    loss, base, divergence, same = (sums / max(count, 1)).tolist()
    return Quality(count, loss, base, divergence, same)
