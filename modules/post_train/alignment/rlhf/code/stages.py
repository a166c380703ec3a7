"""The models of the three stages on one set of weights: the adapters "sft", "reward", "policy" and "value".

InstructGPT holds four models: policy, reference, reward and value model, each begun from the one before it. Here each
is an adapter on the weights that all share, begins as a copy of the adapter it comes from, and one is put on at a time:

    base ── sft ─┬─ policy          (reference: sft, which no one trains any more)
                 └─ reward ── value
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from finetune import optim
from finetune.peft import lora
from finetune.runs.run import Run

if TYPE_CHECKING:
    from .main import Config


def wear(model: nn.Module, name: str) -> None:
    """Puts the adapter of a stage on, and no other. "sft" of a model from scratch is in its weights."""
    lora.activate(model, {name: 1.0} if name in lora.names(model) else {})


def new_adapter(cfg: Config, run: Run, model: nn.Module, name: str, like: str) -> None:
    """An adapter that is trained, begins as the adapter `like` does if there is one, and is put on."""
    lora.apply_lora(
        model, cfg.rank, cfg.alpha, 0.0, lora.parse_targets(cfg.targets), run.generator("lora", name), name=name
    )
    for _, layer in lora.adapters(model):
        if like in layer.parts:
            layer.parts[name].load_state_dict(layer.parts[like].state_dict())


def parameters(model: nn.Module, *names: str) -> dict[str, nn.Parameter]:
    """The parameters of these adapters, which are trained from now on, and no others of the model."""
    model.requires_grad_(False)
    found = {at: p for at, p in model.named_parameters() if any(f".parts.{name}." in at for name in names)}
    for p in found.values():
        p.requires_grad_(True)
    return found


def frozen(model: nn.Module) -> list[tuple[str, Tensor]]:
    """What no stage changes any more once the policy is trained: shared weights, "sft" and "reward"."""
    return [(n, t) for n, t in model.state_dict().items() if not any(f".parts.{k}." in n for k in ("policy", "value"))]


def with_states(trained: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """An optimizer that has its states, as after a step, for parameters that it leaves as they are."""
    trained = list(trained)
    made = optim.AdamW(optim.decay_groups(trained, 0.0), lr=0.0)
    for p in trained:
        p.grad = torch.zeros_like(p)
    made.step()
    made.zero_grad()
    return made
