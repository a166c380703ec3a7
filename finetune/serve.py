"""What `python -m finetune serve` runs: a model, its engine, and the server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.errors import UserError
from finetune.runs import machine

if TYPE_CHECKING:
    from rich.console import Console

BLOCK = 16  # tokens of a cache block


def serve(
    source: str,
    *,
    base: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    cache_tokens: int = 16_384,
    max_requests: int = 256,
    dtype: str = "float32",
    lookup: int = 0,
    threads: int = 0,
    console: Console | None = None,
) -> None:
    """Serves until it is told to stop; requests in work are answered first.

    `source`, `base`: as in `finetune.chat.answer`. `cache_tokens`: what the key–value cache holds, of all requests
    together. `lookup`: this many tokens are guessed from the text (speculative decoding). UserError if the model is
    not found, or if it does not fit into memory.
    """
    import torch
    import uvicorn

    from finetune import chat, memory
    from finetune.inference.engine import Engine
    from finetune.inference.server import Server
    from finetune.inference.speculative import PromptLookup
    from finetune.inference.worker import Worker
    from finetune.lm.generate import stop_ids
    from finetune.lm.io import load

    torch.set_num_threads(threads or machine.physical_cores())
    model, tokenizer, name = chat.load(source, base, getattr(torch, dtype), console)
    del memory, load
    if not tokenizer.chat_template:
        raise UserError(f"{source} has no chat template")
    engine = Engine(model, -(-cache_tokens // BLOCK), BLOCK, drafter=PromptLookup(lookup) if lookup else None)
    worker = Worker(engine)
    server = Server(worker, tokenizer, name, stop_ids(model, tokenizer), key=api_key, most_requests=max_requests)
    worker.start()
    try:
        uvicorn.run(server.app, host=host, port=port, log_level="warning")
    finally:
        worker.stop()
        worker.join()
