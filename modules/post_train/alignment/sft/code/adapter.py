"""Training an adapter further (--adapter): its base model and its shape take the place of the run's settings."""

import os
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console

from finetune.errors import UserError
from finetune.lm.io import hub, load
from finetune.lm.llama import Llama, LlamaConfig
from finetune.peft import adapters, bases, lora
from finetune.runs import reading
from finetune.runs.run import Run

if TYPE_CHECKING:
    from .main import Config

C = TypeVar("C", bound="Config")


def settled(cfg: C, console: Console | None = None) -> C:
    """The settings of the run: with --adapter the model is its base, and rank, alpha and targets are its own.

    UserError for settings that contradict it. A setting that has its default value does not.
    """
    if cfg.adapter is None:
        here = os.path.isdir(reading.home_path(cfg.model))
        if here and bases.is_adapter(place := hub.resolve(cfg.model)):
            named = load.adapter_base(place) or "which it does not name"
            raise UserError(
                f"--model {cfg.model} is an adapter, not a model: give its base model ({named}), or train it further "
                f"with --adapter {cfg.model}"
            )
        return cfg
    if cfg.method != "lora" or cfg.model == "scratch":
        what = "--model scratch" if cfg.model == "scratch" else f"--method {cfg.method}"
        raise UserError(f"--adapter trains LoRA weights on their base model: omit {what}")
    if cfg.modules_to_save:
        raise UserError("--modules-to-save: an adapter that is trained further keeps its own; omit it")
    default = {field.name: field.default for field in fields(cfg)}
    folder = bases.adapter_folder(cfg.adapter, console)
    base = None if cfg.model == default["model"] else cfg.model
    found = adapters.describe(folder)
    own: dict[str, Any] = {"rank": found.rank, "alpha": found.alpha, "targets": ",".join(found.targets)}
    for name, value in own.items():
        given = getattr(cfg, name)
        if given not in (default[name], value):
            raise UserError(
                f"--{name} {given}: the adapter {folder} has {value}, and is trained with that; omit --{name}"
            )
    return replace(cfg, model=str(bases.base_folder(folder, base, console, option="--model")), **own)


def planned(cfg: "Config", shape: LlamaConfig) -> tuple[LlamaConfig, dict[str, Any]]:
    """The shape of the base with the adapter's vocabulary, and what the memory formulas need to know of the adapter."""
    assert cfg.adapter
    found = adapters.describe(bases.adapter_folder(cfg.adapter))
    apart = shape.tied and not found.joint and any(table in found.whole for table in ("embed", "head"))
    own = {"adapter": found.kind, "whole": ",".join(found.whole), "untied": apart}
    return replace(shape, vocab_size=found.rows or shape.vocab_size), own


def tokenizer_folder(cfg: "Config", model: Path) -> Path:
    """Where the tokenizer is: in the adapter's folder if it holds one, else with the model."""
    if cfg.adapter is None:
        return model
    return bases.tokenizer_source(model, bases.adapter_folder(cfg.adapter))


def put(cfg: "Config", run: Run, model: Llama, added: Sequence[str]) -> None:
    """Puts the adapter on its base, to be trained; the run's result depends on its files. `added`: tokens that a
    template of the run needs and the model lacks."""
    assert cfg.adapter
    if added:
        raise UserError(f"--template {cfg.template} needs the tokens {', '.join(added)}, for which the adapter "
                        f"{cfg.adapter} has no embeddings: omit --template, or train a new adapter")  # fmt: skip
    folder = bases.adapter_folder(cfg.adapter)
    run.depends_on("adapter", folder)
    with bases.of(Path(cfg.model)):
        adapters.load_adapter(model, folder, train=True)
    for _, layer in lora.adapters(model):
        layer.part("default").dropout = cfg.dropout
    run.print(f"training {folder} further: rank {cfg.rank}, alpha {cfg.alpha:g}, {cfg.targets}, on {cfg.model}")
