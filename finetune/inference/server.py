"""An OpenAI-compatible server: /v1/chat/completions, /v1/completions, /v1/embeddings, /v1/models, /health,
/metrics; at / a page to chat and to watch the blocks.

Requests become sequences of the engine, which runs in a thread (worker.py); what they get is sent as it is made, or at
the end. A client that leaves frees its blocks. Errors are the API's own objects, {"error": {"message": …, "type": …}}.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import secrets
import threading
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from finetune.errors import UserError
from finetune.inference import embeddings
from finetune.inference.api import Call, ChatCall, TextCall
from finetune.inference.embeddings import EmbeddingCall
from finetune.inference.engine import Engine
from finetune.inference.grammar import Matcher, Vocabulary
from finetune.inference.metrics import Metrics
from finetune.inference.tools import Dialect
from finetune.inference.work import Refused, Work, settle
from finetune.inference.worker import Worker
from finetune.lm.tokenizer import Tokenizer

PAGE = Path(__file__).with_name("page.html")
MOST_BODY = 4 << 20  # bytes of a request
BODY_SECONDS = 60.0  # for all of them


class Server:
    """The application of one model. `most_requests`: those in work or waiting; further ones get status 429."""

    def __init__(
        self,
        worker: Worker,
        tokenizer: Tokenizer,
        model: str,
        stop_ids: set[int],
        *,
        key: str | None = None,
        most_requests: int = 256,
        most_new: int = 512,
    ) -> None:
        self.worker, self.tokenizer, self.model, self.stop_ids = worker, tokenizer, model, stop_ids
        self.adapters: dict[str, str | None] = {model: None}  # by each name that a request may call it
        for name in worker.engine.adapters.digests:
            for called in (name, f"{model}:{name}"):
                if called in self.adapters:
                    raise UserError(f"the adapter {name} has the name of the model or of another: call it otherwise")
                self.adapters[called] = name
        self.key, self.most_requests, self.most_new = key, most_requests, most_new
        self.active, self.began, self.seeds = 0, int(time.time()), itertools.count(secrets.randbits(32))
        self.compiling = threading.Lock()
        self.metrics = Metrics(self)
        self.app = Starlette(
            routes=[
                Route("/", self.page),
                Route("/state", self.state),
                Route("/health", self.health),
                Route("/metrics", self.metrics.page),
                Route("/v1/models", self.models),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/completions", self.complete, methods=["POST"]),
                Route("/v1/embeddings", self.embed, methods=["POST"]),
            ],
            exception_handlers={
                HTTPException: http_error,
                ClientDisconnect: nobody,
                Refused: refusal,
                RecursionError: too_deep,
                Exception: unexpected,
            },
        )

    async def page(self, _: Request) -> Response:
        return FileResponse(PAGE)

    async def state(self, request: Request) -> Response:
        """Every sequence and block, as the page draws them."""
        self.authorize(request)
        loop = asyncio.get_running_loop()
        found: asyncio.Future[dict[str, Any]] = loop.create_future()

        def look() -> None:
            value = snapshot(self.worker.engine)
            loop.call_soon_threadsafe(settle, found, value)

        self.worker.call(look)
        return JSONResponse(await found)

    async def health(self, _: Request) -> Response:
        failed = self.worker.failure is not None
        return JSONResponse({"status": "the engine has stopped" if failed else "ok"}, 503 if failed else 200)

    async def models(self, request: Request) -> Response:
        self.authorize(request)
        common = {"object": "model", "created": self.began, "owned_by": "finetune"}
        served = [{"id": self.model} | common]
        for name in self.worker.engine.adapters.digests:
            served.append({"id": f"{self.model}:{name}"} | common | {"parent": self.model})
        return JSONResponse({"object": "list", "data": served})

    async def chat(self, request: Request) -> Response:
        call = await self.read(request, ChatCall)
        try:
            call.check_tools()
            dialect = self.dialect if call.callable else None
            messages = call.conversation()
            used = any(message["role"] == "tool" or message.get("tool_calls") for message in messages)
            if used and (lost := self.tokenizer.renderer.losses(messages)):
                raise UserError(f"the model's chat template does not write {lost[0][1]}")
            text, _ = self.tokenizer.render_text(messages, add_generation_prompt=True)
        except UserError as error:
            raise Refused(400, str(error)) from None
        return await self.answer(request, call, self.tokenizer.encode(text, add_special_tokens=False), dialect)

    async def complete(self, request: Request) -> Response:
        call = await self.read(request, TextCall)
        prompt = call.prompt if isinstance(call.prompt, list) else self.tokenizer.encode(call.prompt)
        return await self.answer(request, call, prompt)

    async def embed(self, request: Request) -> Response:
        call = await self.read(request, EmbeddingCall)
        self.check_room()
        return await embeddings.answer(self, call, request)

    def authorize(self, request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.key is not None and not hmac.compare_digest(given.encode(), self.key.encode()):
            raise Refused(401, "the API key is missing or wrong", "invalid_api_key")

    async def read(self, request: Request, kind: type[Any]) -> Any:
        """The checked request."""
        self.authorize(request)
        try:
            body = await asyncio.wait_for(whole_body(request), BODY_SECONDS)
        except asyncio.TimeoutError:
            raise Refused(408, f"the request did not arrive in {BODY_SECONDS:g} s") from None
        try:
            call = msgspec.json.decode(body, type=kind)
        except (msgspec.ValidationError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Refused(400, str(error)) from None
        if call.model not in self.adapters:
            served = ", ".join(repr(name) for name in self.adapters)
            raise Refused(404, f"the model {call.model!r} is not served; it is {served}", "model_not_found")
        return call

    @cached_property
    def dialect(self) -> Dialect:
        """How the model calls tools; UserError if it does not."""
        return Dialect.of(self.tokenizer)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What grammars see of the model."""
        return Vocabulary(self.tokenizer, self.worker.engine.model.config.vocab_size, self.stop_ids)

    def matcher(self, source: str) -> Matcher:
        """Of a grammar; called in a thread, one after the other. UserError if it cannot be enforced."""
        with self.compiling:
            return self.vocabulary.matcher(source)

    def check_room(self) -> None:
        """Refused if no request can be taken."""
        if self.worker.failure is not None:
            raise Refused(503, "the engine has stopped")
        if self.active >= self.most_requests:
            raise Refused(429, f"{self.active} requests are in work: try again later", "rate_limit_exceeded")

    async def answer(self, request: Request, call: Call, prompt: list[int], dialect: Dialect | None = None) -> Response:
        self.check_room()
        work = Work(self, call, prompt, dialect)
        await work.begin()
        if call.stream:
            return StreamingResponse(work.stream(request), media_type="text/event-stream")
        return await work.whole(request)


async def whole_body(request: Request) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MOST_BODY:
            raise Refused(413, f"the request is larger than {MOST_BODY:,} bytes")
    return bytes(body)


def snapshot(engine: Engine) -> dict[str, Any]:
    """Sequences with their blocks, and for each block how many hold it; `cached`: blocks of the prefix cache."""
    scheduler = engine.scheduler
    rows = [
        {"id": one.arrival, "state": state, "prompt": len(one.prompt), "answer": len(one.answer),
         "cached": one.table.tokens, "blocks": one.table.blocks}
        for state, group in (("running", scheduler.running), ("waiting", scheduler.waiting))
        for one in group
    ]  # fmt: skip
    return {"sequences": rows, "references": engine.pool.references, "cached": sorted(engine.pool.key_of)}


async def refusal(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return error.response()


async def nobody(_: Request, error: Exception) -> Response:
    """The client left before its request had arrived."""
    return Response(status_code=499)


async def too_deep(_: Request, error: Exception) -> Response:
    return Refused(400, "the request is nested too deeply").response()


async def unexpected(_: Request, error: Exception) -> Response:
    """The client learns that it is not at fault; the error itself is in the server's log."""
    return Refused(500, "an error of the server").response()


async def http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return Refused(error.status_code, error.detail).response()
