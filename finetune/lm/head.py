"""The output projection of a language model: logits and loss from the state after the last norm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from finetune import ops

if TYPE_CHECKING:
    from finetune.lm.gpt import GPT
    from finetune.lm.llama import Llama

CHUNK = 1 << 24  # logits at once where they have a soft cap: 64 MiB in fp32
IGNORED = -100


def logits(model: Llama | GPT, hidden: Tensor, added: Tensor | None = None) -> Tensor:
    """hidden (…, C) → (…, V), plus `added` (…, V): an adapter's share. With a soft cap c (Gemma 2) logits l are
    c · tanh(l / c), computed in fp32."""
    packed, cap = packed_head(model), softcap(model)
    scores = F.linear(hidden, model.head_weight) if packed is None else packed(hidden)
    if added is not None:
        scores = (scores.to(added.dtype) + added).to(scores.dtype)
    return (cap * (scores.float() / cap).tanh()).to(scores.dtype) if cap else scores


def cross_entropy(
    model: Llama | GPT, hidden: Tensor, targets: Tensor, reduction: Literal["mean", "sum"] = "mean"
) -> Tensor:
    """Loss (nats, scalar fp32) of hidden (N, C) and targets (N,), of which −100 are ignored; the logits never exist at
    once. With a soft cap or a packed head, which ops.linear_cross_entropy does not have, they are made chunk by chunk,
    and again in the backward pass."""
    if not softcap(model) and packed_head(model) is None:
        return ops.linear_cross_entropy(hidden, model.head_weight, targets, reduction=reduction)
    counted = targets != IGNORED
    hidden, targets = hidden[counted], targets[counted]
    rows = max(1, CHUNK // model.config.vocab_size)
    total = torch.zeros((), device=hidden.device)
    for some, wanted in zip(hidden.split(rows), targets.split(rows), strict=True):
        total = total + checkpoint(chunk_loss, model, some, wanted, use_reentrant=False)
    return total / max(len(targets), 1) if reduction == "mean" else total


def chunk_loss(model: Llama | GPT, hidden: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits(model, hidden).float(), targets, reduction="sum")


def softcap(model: Llama | GPT) -> float:
    """That of the model's logits; 0: none."""
    return getattr(model.config, "logit_softcap", 0.0)


def packed_head(model: Llama | GPT) -> nn.Module | None:
    """The projection of a model whose weights are packed (finetune/inference/packed.py), C → V."""
    return getattr(model, "packed_head", None)
