"""A server of a small model in this process, and its answers without it."""

import contextlib
import threading
import time

import torch
import uvicorn
from small_served import llama

from finetune.inference.beams import samples
from finetune.inference.engine import Engine
from finetune.inference.server import Server
from finetune.inference.text import TextStream
from finetune.inference.worker import Worker
from finetune.lm.tokenizer import Tokenizer

TEXT = "the quick brown fox jumps over the lazy dog 🙂 süß <|im_start|>user assistant\n"


def trained_tokenizer():
    return Tokenizer.train([TEXT] * 3, vocab_size=300)


@contextlib.contextmanager
def serving(tokenizer, *, blocks=60, key=None, model=None, engine=None, **given):
    """(base address, server) of a server in this process; `engine`: further arguments of its engine."""
    torch.set_num_threads(1)
    model = model or llama(vocab_size=tokenizer.vocab_size)
    worker = Worker(Engine(model, blocks=blocks, block_size=4, **(engine or {})))
    worker.start()
    server = Server(worker, tokenizer, "small", {tokenizer.eos_id}, key=key, **given)
    with listening(server) as base:
        yield base, server


@contextlib.contextmanager
def listening(server):
    """Base address of a server whose worker runs; afterwards both have ended."""
    running = uvicorn.Server(uvicorn.Config(server.app, port=0, log_level="warning"))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
    finally:
        running.should_exit = True
        thread.join(10)
        server.worker.stop()
        server.worker.join(10)
        assert not server.worker.is_alive()


def alone(server, prompt, how, most_new, stops=(), count=1):
    """Texts and finish reasons of a request in an engine without others."""
    engine = Engine(server.worker.engine.model, blocks=60, block_size=4)
    found = samples(engine, prompt, how, most_new, count, server.stop_ids, lambda: TextStream(server.tokenizer, stops))
    engine.run()
    return [(one.text.text, one.finish_reason) for one in found]
