"""Stage 1, supervised fine-tuning: learn to answer as the demonstrations do.

loss = − Σ_t log π(y_t | x, y_<t) / Σ_t 1        over the tokens of the demonstrations' answers and their ends
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from finetune import ops, optim
from finetune.data import packing
from finetune.data.packing import Document
from finetune.lm import head
from finetune.lm.llama import Llama
from finetune.runs.run import Run

if TYPE_CHECKING:
    from .main import Config


def train(cfg: Config, run: Run, model: Llama, demonstrations: Sequence[Document]) -> None:
    """Trains what of `model` can be trained: the adapter "sft", or all weights of a model from scratch."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = optim.AdamW(optim.decay_groups(trained.values(), 0.0), lr=cfg.sft_lr)
    for step in run.steps(cfg.sft_steps, {"trained": trained, "optimizer": optimizer}, phase="sft"):
        chosen = packing.batch_indices(
            len(demonstrations), cfg.sft_batch, step, lambda epoch: run.generator("sft", epoch)
        )
        batch = packing.collate([demonstrations[i] for i in chosen])
        hidden = model(batch.tokens, positions=batch.positions, cu_seqlens=batch.cu_seqlens, hidden=True)  # (1, T, C)
        loss = head.cross_entropy(model, hidden[0], batch.targets[0])
        loss.backward()
        norm = ops.clip_grad_norm_([p.grad for p in trained.values() if p.grad is not None], cfg.clip)
        lr = optim.cosine(step, cfg.sft_steps, cfg.warmup, cfg.sft_lr, cfg.sft_lr / 10)
        optimizer.step(lr=lr)
        optimizer.zero_grad()
        run.log(step, loss=loss, grad_norm=norm, lr=lr)
