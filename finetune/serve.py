"""A model behind a server: what `python -m finetune serve` runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError
from finetune.runs import machine

if TYPE_CHECKING:
    from rich.console import Console

    from finetune.inference.worker import Worker
    from finetune.lm.tokenizer import Tokenizer

BLOCK = 16  # tokens of a cache block


def started(
    source: str,
    *,
    base: str | None = None,
    cache_tokens: int = 16_384,
    dtype: str | None = None,
    lookup: int = 0,
    adapter: tuple[str, ...] = (),
    threads: int = 0,
    console: "Console",
) -> tuple["Worker", "Tokenizer", str, set[int]]:
    """A running engine of the model at `source`, its tokenizer and name, and the tokens that end an answer.

    source, base: as in `finetune.export.opened`. cache_tokens: what the key–value cache holds, of all requests
    together. dtype: of weights and cache, float32 or bfloat16; None: that of the model. lookup: this many tokens are
    guessed from the text (speculative decoding). adapter: NAME=DIR of LoRA adapters that requests may choose. UserError
    if the model or an adapter is not found, and if the model has no chat template or does not fit into memory.
    """
    import torch

    from finetune.export import opened
    from finetune.inference.engine import Engine
    from finetune.inference.speculative import PromptLookup
    from finetune.inference.worker import Worker
    from finetune.lm.generate import stop_ids
    from finetune.memory import room

    torch.set_num_threads(threads or machine.physical_cores())
    folders = adapter_folders(adapter, console)
    model, tokenizer, name = opened(source, base, console)
    if dtype:
        model = model.to(getattr(torch, dtype))
    if not tokenizer.chat_template:
        raise UserError(f"{source} has no chat template, which turns messages into text")
    shape = model.config
    needed = 2 * shape.layers * shape.kv_heads * shape.head_dim * model.embed.weight.element_size() * cache_tokens
    free = machine.available_memory_bytes()
    if free is not None and needed > free:
        raise UserError(
            f"--cache-tokens {cache_tokens} needs {room.size(needed)} of memory, {room.size(free)} are free: use fewer"
        )
    drafter = PromptLookup(lookup) if lookup else None
    engine = Engine(model.eval(), -(-cache_tokens // BLOCK), BLOCK, drafter=drafter, adapters=folders)
    worker = Worker(engine)
    worker.start()
    return worker, tokenizer, name, stop_ids(model, tokenizer)


def serve(
    source: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    max_requests: int = 256,
    console: "Console",
    **engine: Any,
) -> None:
    """Serves until it is told to stop; requests in work are answered first. `engine`: as in `started`, whose errors
    this has too; UserError also if the port is taken."""
    import signal
    import socket

    import uvicorn

    from finetune.inference.server import Server

    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror or error}") from None
    worker, tokenizer, name, stops = started(source, console=console, **engine)
    server = Server(worker, tokenizer, name, stops, key=api_key, most_requests=max_requests)
    address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
    console.print(f"{name} answers at {address} (a page to chat) and {address}/v1 (OpenAI's API); Ctrl-C stops it",
                  markup=False, highlight=False, soft_wrap=True)  # fmt: skip
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn drains, then raises the signal again: that is the end
        signal.signal(number, lambda *_: None)
    try:
        uvicorn.Server(uvicorn.Config(server.app, log_level="warning")).run(sockets=[listening])
    finally:
        worker.stop()
        worker.join()


def adapter_folders(given: tuple[str, ...], console: "Console") -> dict[str, Path]:
    """The folders of `--adapter NAME=DIR`, by name. UserError for one that is given twice, malformed or not there."""
    from finetune.peft import bases

    found: dict[str, Path] = {}
    for one in given:
        name, equals, source = one.partition("=")
        if not (name and equals and source):
            raise UserError(f"--adapter {one}: give a name and a folder, NAME=DIR")
        if name in found:
            raise UserError(f"--adapter {name} is given twice")
        found[name] = bases.adapter_folder(source, console)
    return found
