"""Around the training: what is refused, the model, its files, and the memory that a run will need."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from rich.console import Console

from finetune import memory
from finetune.alignment import rewards
from finetune.alignment.toy_writer import learn_to_write, toy_tokenizer
from finetune.data import preview
from finetune.data.toy_directory import small_config, small_llama
from finetune.errors import UserError
from finetune.lm.io import hub, load
from finetune.lm.llama import Llama, LlamaConfig
from finetune.lm.tokenizer import Tokenizer
from finetune.peft import bases, lora
from finetune.runs import display
from finetune.runs.run import Run

from . import data

if TYPE_CHECKING:
    from .main import Config

SMOOTHED = ("sigmoid", "robust", "exo", "aot", "aot_unpaired", "simpo")
DIVERGENT = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo", "robust", "discopop")


def check(cfg: Config) -> None:
    """UserError for settings that cannot be, or that would change nothing."""
    lora.parse_targets(cfg.targets)
    if cfg.accumulate > cfg.batch:
        raise UserError(f"--accumulate {cfg.accumulate} exceeds the batch of {cfg.batch} pairs")
    if cfg.accumulate > 1 and cfg.loss in ("aot", "aot_unpaired", "kto"):
        raise UserError(f"--loss {cfg.loss} looks at the whole batch at once: omit --accumulate")
    if cfg.weighted and cfg.loss in ("aot", "aot_unpaired", "kto"):
        raise UserError(f"--weighted is for losses of single pairs, which {cfg.loss} is not: omit it")
    if cfg.loss == "exo" and not cfg.smoothing:
        raise UserError("--loss exo compares with smoothed labels: give --smoothing 0.01, for example")
    if cfg.smoothing and cfg.loss not in SMOOTHED:
        raise UserError(f"--smoothing changes nothing in --loss {cfg.loss}: it is for {', '.join(SMOOTHED)}")
    if cfg.divergence != "reverse_kl" and cfg.loss not in DIVERGENT:
        raise UserError(
            f"--divergence {cfg.divergence} is for losses of a pair's difference ({', '.join(DIVERGENT)}), "
            f"not for {cfg.loss}: its constant would not cancel"
        )
    if cfg.loss == "kto" and (cfg.sft_weight or cfg.length_alpha < 1):
        raise UserError("--sft-weight and --length-alpha are for pairs: --loss kto has single answers; omit them")
    if cfg.loss == "kto" and cfg.batch < 2:
        raise UserError("--loss kto takes its KL from answers to the batch's other prompts: --batch 2 or more")
    if cfg.sync_every and cfg.reference != "live":
        raise UserError("--sync-every moves the reference: give --reference live too")
    if cfg.sync_mix < 1 and cfg.method == "lora":
        raise UserError("--sync-mix: a mix of two adapters is no adapter of the same rank: omit it, or --method full")
    if cfg.reward is not None:
        rewards.find(cfg.reward)


def load_model(cfg: Config, run: Run) -> tuple[Tokenizer, Llama]:
    """Tokenizer and reference model."""
    if cfg.model != "scratch":
        source = bases.model_of(run, cfg.model)
        return load.tokenizer(source), load.llama(source, getattr(torch, cfg.dtype))
    tokenizer = toy_tokenizer()
    model = small_llama(small_config(tokenizer.vocab_size, cfg.max_length)).to(getattr(torch, cfg.dtype))
    learn_to_write(run, model, tokenizer, cfg.sft_steps)
    return tokenizer, model


def memory_plan(cfg: Config) -> tuple[LlamaConfig, memory.Setup]:
    """What is trained and how, for the memory formulas; nothing is loaded. Sampled answers end after --new-tokens."""
    if cfg.model == "scratch":
        shape = small_config(toy_tokenizer().vocab_size, cfg.max_length)
    else:
        shape = load.llama_config(cfg.model)
    longest = cfg.max_length if cfg.data else min(cfg.max_length, cfg.new_tokens + 24)
    return shape, memory.Setup(
        batch=1,
        seq=2 * longest * -(-cfg.batch // cfg.accumulate),  # the answers of a micro-batch lie end to end in one
        dtype="fp32" if cfg.dtype == "float32" else "bf16",
        lora_rank=cfg.rank if cfg.method == "lora" else 0,
        lora_targets=",".join(lora.parse_targets(cfg.targets)),
        checkpointing="block" if cfg.checkpointing else "none",
        algorithm="dpo",
        loss="logprobs",
    )


def dry_run(cfg: Config, console: Console) -> None:
    """`--dry-run`: shows three answers of --data as the model sees them, and counts; reads no weights."""
    if cfg.data is None:
        raise UserError("--dry-run shows the rows of --data: without it the pairs are sampled by the model")
    tokenizer = toy_tokenizer() if cfg.model == "scratch" else load.tokenizer(hub.resolve(cfg.model, console))
    sets = data.read_pairs(cfg, tokenizer, lambda text: display.say(console, text))
    shown = {"train": data.flat(data.both(sets.train)), "held_out": data.flat(data.both(sets.held_out))}
    preview.show(console, shown, tokenizer, cfg.max_length, False, 2 * cfg.batch * cfg.steps)
