"""/v1/embeddings: a text as one vector of length 1, pooled from the states of its tokens after the last norm.

    mean   the average over the tokens (Reimers and Gurevych 2019, arXiv:1908.10084)
    last   the state of the last token, which has seen all others

Texts are prompts of the engine without an answer: they wait, are cut into parts, and share steps like any others. The
prefix cache holds keys and values, but no states; so all tokens of a text are computed.
"""

from __future__ import annotations

import asyncio
import base64
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import torch
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from torch import Tensor

from finetune.errors import UserError
from finetune.inference.engine import Engine
from finetune.inference.sampler import Sampling
from finetune.inference.scheduler import Sequence
from finetune.inference.work import Refused, left, settle
from finetune.lm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from finetune.inference.server import Server

Ids = Annotated[list[int], Meta(min_length=1)]
Pooling = Literal["mean", "last"]


class EmbeddingCall(msgspec.Struct, kw_only=True):
    """A request: one text, its ids, or a list of either."""

    model: str
    input: str | Annotated[list[str | int | Ids], Meta(min_length=1, max_length=2048)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    pooling: Pooling = "mean"  # not OpenAI's

    def rows(self, tokenizer: Tokenizer) -> list[list[int]]:
        """The ids of each text. UserError for a list of several kinds."""
        given: Any = [self.input] if isinstance(self.input, str) else self.input
        if len(kinds := {type(one) for one in given}) > 1:
            raise UserError("input must be texts, ids, or lists of ids: not several of these")
        if kinds == {int}:
            return [given]
        return [tokenizer.encode(one) for one in given] if kinds == {str} else given


class Embedding:
    """The vector of one text, while its tokens are computed. `value` (C,) fp32 has the length 1, once it is there."""

    def __init__(self, engine: Engine, ids: list[int], pooling: Pooling, adapter: str | None = None) -> None:
        self.engine, self.pooling = engine, pooling
        self.value = torch.zeros(0)
        self.sequence = engine.add(ids, Sampling(), 0, adapter=adapter, watch=self.watch)

    def watch(self, sequence: Sequence, start: int, states: Tensor) -> None:
        """states (T, C): those of the tokens from `start` on; from 0 on again after a preemption."""
        sums = states.double().sum(0) if self.pooling == "mean" else states[-1].double()
        self.value = self.value + sums if start and self.pooling == "mean" else sums
        if sequence.left <= 0:
            self.value = (self.value / self.value.norm().clamp(min=1e-12)).float().cpu()
            sequence.finish_reason = "stop"
            self.engine.changed.append(sequence)
            self.engine.end(sequence)


async def answer(server: Server, call: EmbeddingCall, request: Request) -> Response:
    """The embeddings of a request. Refused for what the engine does not take."""
    worker, loop = server.worker, asyncio.get_running_loop()
    width = worker.engine.model.config.dim
    if call.dimensions not in (None, width):
        raise Refused(400, f"dimensions: this model's embeddings have {width}, and no other number")
    try:
        rows = call.rows(server.tokenizer)
    except UserError as error:
        raise Refused(400, str(error)) from None
    finished: asyncio.Future[None] = loop.create_future()
    found: list[Embedding] = []

    def hear(sequence: Sequence) -> None:
        if sequence.finish_reason == "error":
            loop.call_soon_threadsafe(settle, finished, None, Refused(500, "the engine has stopped"))
        elif all(one.sequence.finish_reason for one in found):
            loop.call_soon_threadsafe(settle, finished, None)

    def start() -> None:
        try:
            for row in rows:
                found.append(Embedding(worker.engine, row, call.pooling, server.adapters[call.model]))
                worker.listeners[found[-1].sequence] = hear
        except UserError as error:
            loop.call_soon_threadsafe(settle, finished, None, Refused(400, f"input {len(found)}: {error}"))

    server.active += 1
    gone = asyncio.ensure_future(left(request))
    try:
        worker.call(start)
        await asyncio.wait((finished, gone), return_when=asyncio.FIRST_COMPLETED)
        if not finished.done():
            return Response(status_code=499)  # nobody reads it
        finished.result()
    finally:
        gone.cancel()
        finished.cancel()
        server.active -= 1
        worker.call(lambda: worker.cancel([one.sequence for one in found]))
    server.metrics.requests.inc()
    data = [
        {"object": "embedding", "index": i, "embedding": shown(one.value, call.encoding_format)}
        for i, one in enumerate(found)
    ]
    count = sum(map(len, rows))
    usage = {"prompt_tokens": count, "total_tokens": count}
    return JSONResponse({"object": "list", "data": data, "model": call.model, "pooling": call.pooling, "usage": usage})


def shown(value: Tensor, form: str) -> list[float] | str:
    """A vector as numbers, or its fp32 bytes (little endian) in base64."""
    return value.tolist() if form == "float" else base64.b64encode(value.numpy().astype("<f4").tobytes()).decode()
