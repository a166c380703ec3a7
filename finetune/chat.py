"""Answers of a model to prompts, and of its adapters: what `python -m finetune generate` runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from finetune.errors import UserError
from finetune.runs import machine

if TYPE_CHECKING:
    from rich.console import Console

    from finetune.lm.llama import Llama
    from finetune.lm.tokenizer import Tokenizer

BASE = "base"  # the name of the model without adapters


@dataclass
class Voice:
    """The base model or an adapter on it, with its own tokenizer and template, and the prompts for it."""

    name: str  # BASE, or the adapter as it was given
    adapter: Path | None
    tokenizer: "Tokenizer"
    rows: list[list[int]]


def answer(source: str, prompts: list[str], chat: bool | None = None, **given: Any) -> list[str]:
    """The answers of one model or adapter to the prompts, in order; `given` as in `answers`."""
    return next(iter(answers(source, prompts, chat, **given).values()))


def answers(
    source: str | None,
    prompts: list[str],
    chat: bool | None = None,
    *,
    adapters: Sequence[str] = (),
    compare: bool = False,
    system: str | None = None,
    base: str | None = None,
    quantize: str | None = None,
    seed: int = 0,
    threads: int = 0,
    console: "Console | None" = None,
    **sampling: Any,
) -> dict[str, list[str]]:
    """The answers to the prompts, in order, of each adapter, or of the model if there is none; with `compare` of the
    model first. `sampling` as in `generate`.

    `source`: a model folder, a .gguf file, `smollm2`, a hub id, the folder of an adapter, or that of a run; None: the
    base model of the first adapter. An adapter names its base model; `base` overrides it. `chat`: whether to use the
    chat template; None: if there is one. `system`: a message before each prompt. `quantize`: a format of the weights
    (ops.quantized_linear), after one adapter is merged.
    """
    import torch

    from finetune import memory
    from finetune.inference.generate import check_sampling, generate
    from finetune.lm.io import hub, load
    from finetune.lm.tokenizer import answer_text, stop_ids
    from finetune.peft import bases, lora
    from finetune.peft.adapters import kind, load_adapter, load_prompt
    from finetune.peft.virtual_tokens import Prefix, Prompt

    check_sampling(**sampling)
    torch.set_num_threads(threads or machine.physical_cores())
    if source is not None:
        origin = hub.resolve(source, console)
        if bases.is_adapter(origin):
            adapters, source = [source, *adapters], None
        elif base:
            raise UserError(f"--base {base}: {origin} is not an adapter, so it has no base model")
    if twice := next((name for name in adapters if list(adapters).count(name) > 1), None):
        raise UserError(f"--adapter {twice} is given twice")
    if quantize and len(adapters) + compare > 1:
        raise UserError("--quantize packs the weights of one model: give one --adapter, without --compare")
    folders: list[Path | None] = [bases.adapter_folder(name, console) for name in adapters]
    if source is None:
        if not folders or folders[0] is None:
            raise UserError("which model? give --model, or an adapter with --adapter")
        origin = bases.base_folder(folders[0], base, console)
    if compare and not folders:
        raise UserError("--compare shows adapters next to their base model: give one with --adapter")
    shape, known = load.config(origin), dict(zip(adapters, folders, strict=True))
    if compare or not known:
        known = {BASE: None, **known}
    voices = []
    for name, folder in known.items():
        own = load.tokenizer(bases.tokenizer_source(origin, folder))
        voices.append(Voice(name, folder, own, tokens(own, prompts, chat, system, folder or origin)))
    longest = max((len(row) for v in voices for row in v.rows), default=1) + sampling.get("max_new_tokens", 0)
    if longest <= shape.max_length:  # else `generate` explains the error
        setup = memory.Setup(batch=max(len(prompts), 1), seq=max(longest, 1), optimizer="none")
        memory.check_memory(shape, setup, "--max-new-tokens, or fewer prompts at once")
    model = load.model(origin).eval()
    virtual: dict[str, Prompt | Prefix] = {}  # trained tokens of the voices that have them
    for i, voice in enumerate(voices):
        if voice.adapter:
            with bases.of(origin):
                if kind(voice.adapter) == "LORA":
                    load_adapter(model, voice.adapter, f"adapter{i}")
                else:
                    virtual[voice.name] = load_prompt(cast("Llama", model), voice.adapter)
                if voice.tokenizer.vocab_size > model.config.vocab_size:
                    raise UserError(
                        f"{voice.adapter}: its tokenizer has {voice.tokenizer.vocab_size} tokens, the model "
                        f"{model.config.vocab_size}"
                    )
    if len(voices) == 1:
        lora.merge(model)
    if quantize:
        from finetune.inference.packed import pack

        pack(model, quantize)
    found = {}
    for i, voice in enumerate(voices):
        if len(voices) > 1:
            lora.activate(model, {f"adapter{i}": 1.0} if voice.adapter and voice.name not in virtual else {})
        stops, before = stop_ids(model, voice.tokenizer), virtual.get(voice.name)
        random = torch.Generator().manual_seed(seed)
        new = generate(model, voice.rows, stop_ids=stops, generator=random, virtual=before, **sampling)
        found[voice.name] = [answer_text(voice.tokenizer, ids, stops) for ids in new]
    return found


def tokens(
    tokenizer: "Tokenizer", prompts: list[str], chat: bool | None, system: str | None, source: Path
) -> list[list[int]]:
    """The prompts as ids, by the chat template if there is one and `chat` is not False."""
    if chat and not tokenizer.chat_template:
        raise UserError(f"{source} has no chat template: use --no-chat")
    if chat is False or not tokenizer.chat_template:
        if system is not None:
            raise UserError("--system needs a chat template" + (f", and {source} has none" if chat is None else ""))
        return [tokenizer.encode(prompt) for prompt in prompts]
    before = [] if system is None else [{"role": "system", "content": system}]
    rows = []
    for prompt in prompts:
        messages = [*before, {"role": "user", "content": prompt}]
        if before and (lost := tokenizer.renderer.losses(messages)):
            raise UserError(f"--system: the chat template does not write {lost[0][1]}")
        rows.append(tokenizer.encode(tokenizer.render_text(messages, add_generation_prompt=True)[0], False))
    return rows
