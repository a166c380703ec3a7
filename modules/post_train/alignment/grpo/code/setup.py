"""Around the training: what is refused, the model, and the memory that a run will need."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from finetune import memory
from finetune.alignment import rewards, shared_prompts
from finetune.alignment.rollouts import Sampler, rollouts
from finetune.alignment.shared_prompts import Layout
from finetune.alignment.toy_writer import imitate
from finetune.data.toy_directory import small_config, small_llama
from finetune.errors import UserError
from finetune.lm.io import load
from finetune.lm.llama import Llama, LlamaConfig
from finetune.lm.tokenizer import Tokenizer
from finetune.peft import bases, lora
from finetune.runs.run import Run

from . import tasks
from .tasks import Task

if TYPE_CHECKING:
    from .main import Config


def check(cfg: Config) -> None:
    """UserError for settings that cannot be, or that would change nothing."""
    lora.parse_targets(cfg.targets)
    for name in cfg.reward:
        rewards.find(name)
    if cfg.updates * cfg.accumulate > cfg.prompts:
        raise UserError(
            f"--updates {cfg.updates} of --accumulate {cfg.accumulate} parts are more than the "
            f"{cfg.prompts} groups of a step: raise --prompts"
        )
    if 0 < cfg.dual_clip <= 1:
        raise UserError(f"--dual-clip {cfg.dual_clip:g} must be above 1, or 0 for none")
    settings = cfg.settings()
    if 0 < cfg.two_sided <= 1 + settings.clip_high:
        raise UserError(f"--two-sided {cfg.two_sided:g} must be above 1 + the clip of {settings.clip_high:g}")
    if settings.loss != "clipped" and (cfg.dual_clip or cfg.two_sided):
        raise UserError(f"--dual-clip and --two-sided are for losses that clip, not for {cfg.loss}: omit them")
    if settings.loss in ("sapo", "vespo") and (cfg.clip_low is not None or cfg.clip_high is not None):
        raise UserError(f"--loss {cfg.loss} does not clip: omit --clip-low and --clip-high")
    if settings.loss == "cispo" and cfg.clip_low is not None:
        raise UserError("--loss cispo bounds ρ from above only: omit --clip-low")
    if cfg.loss in ("luspo", "gspo") and cfg.ratio == "token":
        raise UserError(f"--loss {cfg.loss} has a ratio of the whole answer: omit --ratio token")
    if cfg.loss == "vespo" and cfg.ratio is not None:
        raise UserError("--loss vespo has a weight of the whole answer: omit --ratio")
    if cfg.kl_target and not cfg.kl_weight:
        raise UserError("--kl-target adapts the weight of the KL term: give --kl-weight, which it starts from")
    if cfg.kl_in == "reward" and not cfg.kl_weight:
        raise UserError("--kl-in reward needs --kl-weight")
    if cfg.overlong == "penalty" and cfg.overlong_margin > cfg.new_tokens:
        raise UserError(f"--overlong-margin {cfg.overlong_margin} exceeds --new-tokens {cfg.new_tokens}")


def load_model(cfg: Config, run: Run) -> tuple[Tokenizer, Llama]:
    """Tokenizer and the model to begin with."""
    if cfg.model != "scratch":
        source = bases.model_of(run, cfg.model)
        return load.tokenizer(source), load.llama(source, getattr(torch, cfg.dtype))
    tokenizer = tasks.parity_tokenizer()
    model = small_llama(small_config(tokenizer.vocab_size, cfg.max_length)).to(getattr(torch, cfg.dtype))
    # Of a teacher who makes mistakes: imitation stops at what the teacher can, (1 − cfg.careless)⁵.
    imitate(run, model, cfg.sft_steps, lambda rng: tasks.parity_documents(tokenizer, cfg.careless, rng))
    return tokenizer, model


def check_vocabulary(task: Task, model: Llama) -> None:
    largest = max(max(prompt.ids) for prompt in (*task.train, *task.held_out))
    if largest >= model.config.vocab_size:
        raise UserError(
            f"the prompts have token {largest}, the model has {model.config.vocab_size}: its tokenizer is another's"
        )


def memory_plan(cfg: Config) -> tuple[LlamaConfig, memory.Setup]:
    """What is trained and how, for the memory formulas; nothing is loaded."""
    if cfg.model == "scratch":
        shape, prompt = small_config(tasks.parity_tokenizer().vocab_size, cfg.max_length), tasks.BITS + 1
    else:
        shape = load.llama_config(cfg.model)
        prompt = cfg.max_length - cfg.new_tokens if cfg.data else 16 + 12 * cfg.shots
    groups = -(-cfg.prompts // (cfg.updates * cfg.accumulate))
    return shape, memory.Setup(
        batch=1,
        seq=groups * (prompt + cfg.samples * (cfg.new_tokens - 1)),  # a prompt lies in the row once
        dtype="fp32" if cfg.dtype == "float32" else "bf16",
        lora_rank=cfg.rank if cfg.method == "lora" else 0,
        lora_targets=",".join(lora.parse_targets(cfg.targets)),
        algorithm="grpo",
        loss="logprobs",
    )


def measure_memory(
    cfg: Config, run: Run, shape: LlamaConfig, setup: memory.Setup, model: Llama, optimizer: torch.optim.Optimizer,
    sampler: Sampler, tokenizer: Tokenizer, task: Task, stops: frozenset[int],
) -> None:  # fmt: skip
    """The memory of a step in which every group has spread, next to its prediction."""
    count = -(-cfg.prompts // (cfg.updates * cfg.accumulate))
    prompts = (task.train * count)[:count]
    groups = rollouts(
        sampler, tokenizer, [prompt.ids for prompt in prompts], cfg.samples, cfg.new_tokens,
        temperature=cfg.temperature, stop_ids=stops, generator=run.generator("memory"),
    )  # fmt: skip
    layout = Layout([group.group for group in groups])
    weights = torch.linspace(-1, 1, len(layout.targets))
    memory.record_step(
        run, shape, replace(setup, batch=1, seq=layout.tokens.shape[1]), model=model, optimizer=optimizer,
        loss=lambda: (shared_prompts.token_logprobs(model, layout, cfg.temperature)[0] * weights).mean(),
    )  # fmt: skip
