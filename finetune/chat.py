"""A model folder and a prompt in, text out: what `python -m finetune generate` does."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError
from finetune.lm.io import hub
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
    """The answers to the prompts, in order; `sampling` as in `generate`. chat=None: by the template, if there is one.

    `source`: what `hub.resolve` takes, or the folder of a LoRA adapter, which names its base; `base` names another,
    such as where it has moved to.
    """
    import torch

    from finetune import memory
    from finetune.lm import gpt
    from finetune.lm.generate import check_sampling, generate, said, stop_ids
    from finetune.lm.gpt import GPT
    from finetune.lm.llama import Llama, config_of, read_raw
    from finetune.lm.tokenizer import Tokenizer
    from finetune.peft import adapters, lora

    check_sampling(**sampling)
    torch.set_num_threads(threads or machine.physical_cores())
    path = origin = hub.resolve(source, console)
    adapter = path.is_dir() and (path / adapters.CONFIG).exists()
    if adapter:
        origin = base_folder(path, base, console)
    elif base:
        raise UserError(f"--base {base}: {path} is no adapter, so it has no base model")
    kind = read_raw(origin).get("model_type") if origin.is_dir() else "llama"
    kinds: dict[Any, type[Llama] | type[GPT]] = {"llama": Llama, "gpt2": GPT}
    if not isinstance(kind, str) or kind not in kinds:
        raise UserError(f"{origin} is a model of type {kind}: only {' and '.join(kinds)} can be run")
    tokenizer = Tokenizer.from_pretrained(path if (path / "tokenizer.json").exists() else origin)
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
    shape = config_of(origin) if kind == "llama" else gpt.read_config(read_raw(origin), origin / "config.json")
    longest = max(map(len, rows), default=1) + sampling.get("max_new_tokens", 0)
    if longest <= shape.max_length:  # `generate` has words for the other case
        room = memory.Setup(batch=max(len(rows), 1), seq=max(longest, 1), optimizer="none")
        memory.check_memory(shape, room, "--max-new-tokens, or fewer prompts at once")
    model = kinds[kind].from_pretrained(origin).eval()
    if adapter:
        adapters.load_adapter(model, path)
        lora.merge(model)
    stops = stop_ids(model, tokenizer)
    new = generate(model, rows, stop_ids=stops, generator=torch.Generator().manual_seed(seed), **sampling)
    return [said(tokenizer, ids, stops) for ids in new]


def base_folder(adapter: Path, base: str | None, console: "Console | None") -> Path:
    """The base model of an adapter's folder: `base`, or the one that it names."""
    from finetune.peft import adapters

    name = base or adapters.base_of(adapter)
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
