"""Training and evaluation, the same for all methods."""

from time import perf_counter
from typing import TYPE_CHECKING, Literal

import torch

from finetune import ops, optim
from finetune.data import packing
from finetune.data.packing import Document
from finetune.lm import head
from finetune.runs.run import Run

from .methods import Adapted

if TYPE_CHECKING:
    from .main import Config


def batch_of(
    cfg: "Config", run: Run, documents: list[Document], rows: list[list[int]], step: int, order: str
) -> packing.Batch:
    """The packed batch of a step, a function of (seed, order, step)."""
    chosen = packing.batch_indices(len(rows), cfg.batch, step, lambda epoch: run.generator(order, epoch))
    return packing.collate([documents[i] for row in chosen for i in rows[row]])


def packed(cfg: "Config", documents: list[Document]) -> list[list[int]]:
    """Rows of documents, at most max_length tokens each."""
    return packing.pack([len(d) for d in documents], cfg.max_length)


def loss_of(adapted: Adapted, batch: packing.Batch, reduction: Literal["mean", "sum"] = "mean") -> torch.Tensor:
    """Cross entropy (nats) of the learned tokens; scalar fp32. The logits never exist at once."""
    return head.cross_entropy(adapted.model, adapted.forward(batch), batch.targets[0], reduction)


def train(
    cfg: "Config", run: Run, adapted: Adapted, documents: list[Document], lr: float, phase: str, steps: int, order: str
) -> tuple[optim.AdamW, float | None]:
    """Trains a method; returns the optimizer and the median seconds of a step. All methods of one `order` see the same
    batches."""
    rows, parameters = packed(cfg, documents), list(adapted.trained.values())
    optimizer = optim.AdamW(optim.decay_groups(parameters, 0.0), lr=lr)
    clock = {"seconds": torch.zeros(steps)}
    for step in run.steps(steps, {"trained": adapted.trained, "optimizer": optimizer, "clock": clock}, phase=phase):
        began = perf_counter()
        loss = loss_of(adapted, batch_of(cfg, run, documents, rows, step, order))
        loss.backward()
        ops.clip_grad_norm_([p.grad for p in parameters if p.grad is not None], cfg.clip)
        optimizer.step(lr=optim.cosine(step, steps, steps // 10, lr, lr / 10))
        optimizer.zero_grad()
        clock["seconds"][step] = perf_counter() - began
        run.log(step, loss=loss)
    return optimizer, clock["seconds"].median().item() if steps else None


@torch.no_grad()
def evaluate(cfg: "Config", adapted: Adapted, documents: list[Document]) -> float:
    """Mean loss (nats) of the learned tokens."""
    adapted.model.eval()
    batches = [packing.collate([documents[i] for i in row]) for row in packed(cfg, documents)]
    total = sum(loss_of(adapted, batch, "sum").item() for batch in batches)
    adapted.model.train()
    return total / sum(batch.learned for batch in batches)
