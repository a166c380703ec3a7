"""A model folder and a prompt in, text out: what `python -m finetune generate` does."""

from typing import TYPE_CHECKING, Any

from finetune import hub, machine
from finetune.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console


def answer(
    source: str,
    prompts: list[str],
    chat: bool | None = None,
    *,
    seed: int = 0,
    threads: int = 0,
    console: "Console | None" = None,
    **sampling: Any,
) -> list[str]:
    """The answers to the prompts, in order; `sampling` as in `generate`. chat=None: by the template, if there is one.

    `source`: what `hub.resolve` takes, or the folder of a LoRA adapter, which names its base.
    """
    import torch

    from finetune import adapters, lora
    from finetune.generate import generate
    from finetune.gpt import GPT
    from finetune.llama import Llama
    from finetune.tokenizer import Tokenizer
    from finetune.weights import read_json

    torch.set_num_threads(threads or machine.physical_cores())
    path = base = hub.resolve(source, console)
    adapter = path.is_dir() and (path / adapters.CONFIG).exists()
    if adapter:
        named = read_json(path / adapters.CONFIG).get("base_model_name_or_path")
        if not named:
            raise UserError(f"{path / adapters.CONFIG} does not name its base model: fill in base_model_name_or_path")
        base = hub.resolve(str(named), console)
    kind = read_json(base / "config.json").get("model_type") if base.is_dir() else "llama"
    kinds: dict[Any, type[Llama] | type[GPT]] = {"llama": Llama, "gpt2": GPT}
    if kind not in kinds:
        raise UserError(f"{base} is a model of type {kind}: only {' and '.join(kinds)} can be run")
    tokenizer = Tokenizer.from_pretrained(path if (path / "tokenizer.json").exists() else base)
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
    model = kinds[kind].from_pretrained(base).eval()
    if adapter:
        adapters.load_adapter(model, path)
        lora.merge(model)
    stops = [tokenizer.backend.token_to_id(name) for name in (tokenizer.eos, "<|im_end|>") if name]
    new = generate(
        model,
        rows,
        stop_ids=[i for i in stops if i is not None],
        generator=torch.Generator().manual_seed(seed),
        **sampling,
    )
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in new]
