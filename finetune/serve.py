"""A model behind a server: what `python -m finetune serve` runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError
from finetune.runs import machine

if TYPE_CHECKING:
    from rich.console import Console

    from finetune.inference.worker import Worker
    from finetune.lm.tokenizer import Tokenizer
    from finetune.memory.setup import Shape

BLOCK = 16  # tokens of a cache block
CACHES = {"bf16": "bfloat16", "int8": "int8", "fp8": "float8_e4m3fn"}  # what `--cache` takes → torch's dtype
FORMATS = {"float32": "fp32", "bfloat16": "bf16"}  # torch's dtype → that of the memory formulas, and of packed weights


def started(
    source: str,
    *,
    base: str | None = None,
    cache_tokens: int = 16_384,
    dtype: str | None = None,
    quantize: str | None = None,
    cache: str | None = None,
    lookup: int = 0,
    adapter: tuple[str, ...] = (),
    batch_invariant: bool = False,
    threads: int = 0,
    console: "Console",
) -> tuple["Worker", "Tokenizer", str, set[int]]:
    """A running engine of the model at `source`, its tokenizer and name, and the tokens that end an answer.

    source, base: as in `finetune.export.opened`. cache_tokens: what the key–value cache holds, of all requests
    together, in numbers of `cache` (of CACHES; None: dtype). dtype: of weights and activations, float32 or bfloat16;
    None: that of the model. quantize: a format of the weights, or `file` for a GGUF's own; activations are then
    bfloat16 unless dtype says otherwise. lookup: this many tokens are guessed from the text (speculative decoding).
    adapter: NAME=DIR of LoRA adapters that requests may choose. batch_invariant: answers have the same bits in any
    company, those of adapters too. UserError if the model or an adapter is not found, and if the model has no chat
    template, does not fit into memory, or cannot be batch-invariant on its device.
    """
    import torch

    from finetune.inference.engine import Engine
    from finetune.inference.speculative import PromptLookup
    from finetune.inference.worker import Worker
    from finetune.lm.tokenizer import stop_ids

    torch.set_num_threads(threads or machine.physical_cores())
    folders = adapter_folders(adapter, console)
    model, tokenizer, name = packed_model(source, base, quantize, dtype, cache, cache_tokens, console)
    if not tokenizer.chat_template:
        raise UserError(f"{source} has no chat template, which turns messages into text")
    numbers = getattr(torch, CACHES[cache]) if cache else None
    drafter = PromptLookup(lookup) if lookup else None
    blocks = -(-cache_tokens // BLOCK)
    engine = Engine(
        model.eval(), blocks, BLOCK, cache_dtype=numbers, drafter=drafter, adapters=folders,
        batch_invariant=batch_invariant,
    )  # fmt: skip
    if why := engine.cache.why_not_native:
        console.print(f"The model's modules compute the steps, not the native call: {why}", highlight=False)
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


def packed_model(
    source: str,
    base: str | None,
    quantize: str | None,
    dtype: str | None,
    cache: str | None,
    tokens: int,
    console: "Console",
) -> tuple[Any, "Tokenizer", str]:
    """The model with its weights packed, its tokenizer and its name; before anything is loaded the formulas must find
    room for it, and for a cache of `tokens`. Arguments and errors as of `started`."""
    import torch

    from finetune.export import opened
    from finetune.inference.packed import from_gguf, pack
    from finetune.lm.io import hub, load, smollm2
    from finetune.lm.io.gguf import GGUFModel
    from finetune.memory.counts import parameters
    from finetune.memory.packed import packed_bytes
    from finetune.memory.setup import BYTES, shape_of
    from finetune.merge import base_dtype
    from finetune.peft import bases

    path = hub.resolve(source, console)
    if quantize == "file":
        if source == "smollm2" and path.is_dir():
            path = smollm2.gguf(console)
        if path.suffix != ".gguf" or base:
            raise UserError(f"--quantize file serves a .gguf file in its own types; {source} is none")
        file = GGUFModel(path)
        dtype = dtype or "bfloat16"
        stored = sum(info.nbytes for info in file.tensor_infos.values())
        check_room(shape_of(file.llama_config()), stored, 0, dtype, cache, tokens)
        other: dict[str, int] = {}
        model = from_gguf(
            file, getattr(torch, dtype), report=lambda _, kind: other.update({kind: other.get(kind, 0) + 1})
        )
        for kind, count in other.items():
            console.print(f"{count} matrices of type {kind} are served as int8", highlight=False)
        return model, load.tokenizer(path), Path(source).name.removesuffix(".gguf")
    adapted = bases.is_adapter(path)
    origin = bases.base_folder(path, base, console) if adapted else path
    loaded = "float32" if adapted else base_dtype(origin)
    dtype = dtype or ("bfloat16" if quantize or loaded == "bfloat16" else "float32")
    format, shape = quantize or FORMATS[dtype], shape_of(load.config(origin))
    dense = parameters(shape) * (4 if loaded == "float32" else 2)
    check_room(shape, packed_bytes(shape, format, element=BYTES[FORMATS[dtype]]), dense, dtype, cache, tokens)
    model, tokenizer, name = opened(source, base, console)
    return pack(model.to(getattr(torch, dtype)), format), tokenizer, name


def check_room(shape: "Shape", weights: int, dense: int, dtype: str, cache: str | None, tokens: int) -> None:
    """UserError unless the packed weights with the cache fit into memory, and before them the dense weights."""
    from finetune.memory import room
    from finetune.memory.setup import Setup
    from finetune.memory.states import kv_cache

    kinds: dict[str, Any] = {"dtype": FORMATS[dtype], "kv_dtype": cache or "same"}
    kept = kv_cache(shape, Setup(optimizer="none", seq=tokens, kv_block=BLOCK, **kinds)).bytes
    needed, free = max(weights + kept, dense), machine.available_memory_bytes()
    if free is not None and needed > free:
        raise UserError(
            f"serving needs {room.size(needed)} of memory by the formulas ({room.size(weights)} of weights, "
            f"{room.size(kept)} for --cache-tokens {tokens}), {room.size(free)} are free: use fewer tokens or bits"
        )


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
