"""Answers of a model to prompts: what `python -m finetune generate` runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError
from finetune.runs import machine

if TYPE_CHECKING:
    from rich.console import Console


def answer(
    source: str,
    prompts: list[str],
    chat: bool | None = None,
    *,
    base: str | None = None,
    seed: int = 0,
    threads: int = 0,
    console: "Console | None" = None,
    **sampling: Any,
) -> list[str]:
    """The answers to the prompts, in order; `sampling` as in `generate`.

    `source`: a model folder, a .gguf file, `smollm2`, a hub id, or the folder of a LoRA adapter. An adapter names its
    base model; `base` overrides it. `chat`: whether to use the chat template; None: if the model has one.
    """
    import torch

    from finetune import memory
    from finetune.lm.generate import answer_text, check_sampling, generate, stop_ids
    from finetune.lm.io import hub, load
    from finetune.peft import adapters, lora

    check_sampling(**sampling)
    torch.set_num_threads(threads or machine.physical_cores())
    path = origin = hub.resolve(source, console)
    adapter = path.is_dir() and (path / load.ADAPTER_CONFIG).exists()
    if adapter:
        origin = base_folder(path, base, console)
    elif base:
        raise UserError(f"--base {base}: {path} is not an adapter, so it has no base model")
    shape = load.config(origin)
    tokenizer = load.tokenizer(path if (path / "tokenizer.json").exists() else origin)
    if chat and not tokenizer.chat_template:
        raise UserError(f"{path} has no chat template: use --no-chat")
    if chat is None:
        chat = tokenizer.chat_template is not None
    texts = prompts
    if chat:
        texts = [
            tokenizer.render_text([{"role": "user", "content": p}], add_generation_prompt=True)[0] for p in prompts
        ]
    rows = [tokenizer.encode(text, add_special_tokens=not chat) for text in texts]
    longest = max(map(len, rows), default=1) + sampling.get("max_new_tokens", 0)
    if longest <= shape.max_length:  # else `generate` explains the error
        setup = memory.Setup(batch=max(len(rows), 1), seq=max(longest, 1), optimizer="none")
        memory.check_memory(shape, setup, "--max-new-tokens, or fewer prompts at once")
    model = load.model(origin).eval()
    if adapter:
        adapters.load_adapter(model, path)
        lora.merge(model)
    stops = stop_ids(model, tokenizer)
    new = generate(model, rows, stop_ids=stops, generator=torch.Generator().manual_seed(seed), **sampling)
    return [answer_text(tokenizer, ids, stops) for ids in new]


def base_folder(adapter: Path, base: str | None, console: "Console | None") -> Path:
    """The base model of an adapter's folder: `base`, or the one that it names."""
    from finetune.lm.io import hub, load

    name = base or load.adapter_base(adapter)
    if not name:
        raise UserError(f"the adapter {adapter} does not name its base model: give it with --base")
    try:
        return hub.resolve(name, console)
    except UserError as error:
        if base:
            raise
        raise UserError(
            f"the base model of the adapter {adapter} is not found ({error}): give it with --base"
        ) from None
