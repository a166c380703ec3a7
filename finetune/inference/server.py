"""An OpenAI-compatible server: /v1/chat/completions, /v1/completions, /v1/models, /health, /metrics; at / a page to
chat and to watch the blocks.

Requests become sequences of the engine, which runs in a thread (worker.py); what they get is sent as it is made, or at
the end. A client that leaves frees its blocks. Errors are the API's own objects, {"error": {"message": …, "type": …}}.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import json
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from finetune.errors import UserError
from finetune.inference.api import Call, ChatCall, TextCall
from finetune.inference.beams import samples
from finetune.inference.engine import Engine
from finetune.inference.sampler import Sampling
from finetune.inference.scheduler import Sequence
from finetune.inference.text import TextStream
from finetune.inference.worker import Worker
from finetune.lm.tokenizer import Tokenizer

PAGE = Path(__file__).with_name("page.html")
MOST_BODY = 4 << 20  # bytes of a request
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)  # edges of the histograms


@dataclass
class News:
    """What one answer of a request got in a step."""

    index: int
    text: str
    tokens: list[int]
    logprobs: list[Any]
    finish_reason: str


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
        self.key, self.most_requests, self.most_new = key, most_requests, most_new
        self.active, self.began, self.seeds = 0, int(time.time()), itertools.count(secrets.randbits(32))
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
            ],
            exception_handlers={HTTPException: http_error, Refused: refusal},
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
        entry = {"id": self.model, "object": "model", "created": self.began, "owned_by": "finetune"}
        return JSONResponse({"object": "list", "data": [entry]})

    async def chat(self, request: Request) -> Response:
        call = await self.read(request, ChatCall)
        try:
            text, _ = self.tokenizer.render_text(call.conversation(), add_generation_prompt=True)
        except UserError as error:
            raise Refused(400, str(error)) from None
        return await self.answer(request, call, self.tokenizer.encode(text, add_special_tokens=False))

    async def complete(self, request: Request) -> Response:
        call = await self.read(request, TextCall)
        prompt = call.prompt if isinstance(call.prompt, list) else self.tokenizer.encode(call.prompt)
        return await self.answer(request, call, prompt)

    def authorize(self, request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.key is not None and not hmac.compare_digest(given.encode(), self.key.encode()):
            raise Refused(401, "the API key is missing or wrong", "invalid_api_key")

    async def read(self, request: Request, kind: type[Any]) -> Any:
        """The checked request."""
        self.authorize(request)
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > MOST_BODY:
                raise Refused(413, f"the request is larger than {MOST_BODY:,} bytes")
        try:
            call = msgspec.json.decode(body, type=kind)
        except (msgspec.ValidationError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Refused(400, str(error)) from None
        if call.model != self.model:
            raise Refused(404, f"the model {call.model!r} is not served; it is {self.model!r}", "model_not_found")
        return call

    async def answer(self, request: Request, call: Call, prompt: list[int]) -> Response:
        if self.worker.failure is not None:
            raise Refused(503, "the engine has stopped")
        if self.active >= self.most_requests:
            raise Refused(429, f"{self.active} requests are in work: try again later", "rate_limit_exceeded")
        work = Work(self, call, prompt)
        await work.begin()
        if call.stream:
            return StreamingResponse(work.stream(request), media_type="text/event-stream")
        return await work.whole(request)


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


class Refused(Exception):
    """A request that gets the API's error object."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code

    def response(self) -> Response:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": self.message, "type": kind, "param": None, "code": self.code}
        return JSONResponse({"error": error}, self.status, headers={"Retry-After": "1"} if self.status == 429 else None)


class Left(Exception):
    """The client has closed the connection."""


async def refusal(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return error.response()


async def http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return Refused(error.status_code, error.detail).response()


class Work:
    """One request in the engine. `begin`, then either `stream` or `whole`."""

    def __init__(self, server: Server, call: Call, prompt: list[int]) -> None:
        self.server, self.call, self.prompt = server, call, prompt
        self.id = f"{call.prefix}-{secrets.token_hex(12)}"
        self.created, self.began = int(time.time()), time.perf_counter()
        self.loop, self.news = asyncio.get_running_loop(), asyncio.Queue[News | None]()
        self.ended = False
        self.sequences: list[Sequence] = []
        self.sent: dict[int, tuple[int, int]] = {}  # answer → characters and tokens that were reported

    async def begin(self) -> None:
        """Queues the request; Refused if its settings or its length are out of range."""
        server, call = self.server, self.call
        tokenizer, room = server.tokenizer, server.worker.engine.model.config.max_length - len(self.prompt)
        most_new = call.most_new if call.most_new is not None else max(min(server.most_new, room), 1)
        seed = call.seed if call.seed is not None else next(server.seeds)
        accepted: asyncio.Future[None] = self.loop.create_future()

        def start() -> None:
            error = None
            try:
                how = Sampling(**call.sampling(), seed=seed % (1 << 63))
                self.sequences = samples(
                    server.worker.engine, self.prompt, how, most_new, call.n, server.stop_ids,
                    text=lambda: TextStream(tokenizer, call.stops),
                )  # fmt: skip
                server.worker.listeners[self.sequences[0]] = self.hear
            except UserError as refusal:
                error = Refused(400, str(refusal))
            self.loop.call_soon_threadsafe(settle, accepted, None, error)

        server.active += 1
        try:
            server.worker.call(start)
            await accepted
        except BaseException:
            self.end()
            raise

    def hear(self, sequence: Sequence) -> None:
        """Called in the engine's thread: passes on what is new."""
        for other in self.sequences[1:]:  # those that were split off in this step
            if not other.finish_reason:
                self.server.worker.listeners.setdefault(other, self.hear)
        index = next(i for i, one in enumerate(self.sequences) if one is sequence)
        assert sequence.text
        letters, tokens = self.sent.get(index, (0, 0))
        self.sent[index] = len(sequence.text.text), len(sequence.answer)
        news = News(index, sequence.text.text[letters:], sequence.answer[tokens:], sequence.logprobs[tokens:],
                    sequence.finish_reason)  # fmt: skip
        self.loop.call_soon_threadsafe(self.news.put_nowait, news)

    def end(self) -> None:
        """Frees what the request still holds."""
        if self.ended:
            return
        self.ended = True
        self.server.active -= 1
        self.server.worker.call(lambda: self.server.worker.cancel(self.sequences))

    async def arrivals(self, request: Request) -> AsyncIterator[News]:
        """All news, until every answer is finished. Left if the client goes; Refused if the engine failed."""
        finished, last = 0, None
        watching = asyncio.ensure_future(left(request))
        watching.add_done_callback(lambda task: None if task.cancelled() else self.news.put_nowait(None))
        try:
            while finished < self.call.n:
                news = await self.news.get()
                if news is None:
                    raise Left
                if news.finish_reason == "error":
                    raise Refused(500, "the engine has stopped")
                now = time.perf_counter()
                if last is None:
                    self.server.metrics.first.observe(now - self.began)
                else:
                    self.server.metrics.between.observe(now - last)
                last = now
                self.server.metrics.tokens.inc(len(news.tokens))
                finished += bool(news.finish_reason)
                yield news
            self.server.metrics.requests.inc()
        finally:
            watching.cancel()
            self.end()

    async def whole(self, request: Request) -> Response:
        """The finished answers in one object."""
        call, made = self.call, 0
        texts, reasons = [""] * call.n, [""] * call.n
        logprobs: list[list[Any]] = [[] for _ in range(call.n)]
        try:
            async for news in self.arrivals(request):
                texts[news.index] += news.text
                logprobs[news.index] += call.logprob_entries(self.server.tokenizer, news.tokens, news.logprobs)
                reasons[news.index] = news.finish_reason
                made += len(news.tokens)
        except Left:
            return Response(status_code=499)  # nobody reads it
        choices = [call.choice(i, texts[i], logprobs[i], reasons[i]) for i in range(call.n)]
        return JSONResponse(self.head(call.object) | {"choices": choices, "usage": self.usage(made)})

    async def stream(self, request: Request) -> AsyncIterator[str]:
        """Server-sent events: the pieces of each answer, its finish reason once, then usage if wanted, then [DONE]."""
        call, made = self.call, 0
        chunk = self.head(call.chunk)
        news_of = self.arrivals(request)
        try:
            for first in call.opening():
                yield event(chunk | {"choices": [first]})
            async for news in news_of:
                made += len(news.tokens)
                entries = call.logprob_entries(self.server.tokenizer, news.tokens, news.logprobs)
                if news.text or entries or news.finish_reason:
                    yield event(chunk | {"choices": [call.delta(news.index, news.text, entries, news.finish_reason)]})
            if call.stream_options and call.stream_options.include_usage:
                yield event(chunk | {"choices": [], "usage": self.usage(made)})
            yield "data: [DONE]\n\n"
        except Left:
            return
        except Refused as error:
            yield event({"error": {"message": error.message, "type": "server_error", "param": None, "code": None}})
        finally:
            await news_of.aclose()  # type: ignore[attr-defined]
            self.end()

    def head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.server.model}

    def usage(self, made: int) -> dict[str, int]:
        asked = len(self.prompt)
        return {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made}


async def left(request: Request) -> None:
    """Returns when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def settle(future: asyncio.Future[Any], value: Any, error: Exception | None = None) -> None:
    """The result or the error of a future, unless nobody waits for it any more."""
    if not future.cancelled():
        future.set_exception(error) if error else future.set_result(value)


def event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


class Metrics:
    """Prometheus' text: what the requests did, and the state of the engine when it is asked for."""

    def __init__(self, server: Server) -> None:
        self.server, self.registry = server, CollectorRegistry()
        self.requests = Counter("finetune_requests", "Requests answered to their end", registry=self.registry)
        self.tokens = Counter("finetune_generated_tokens", "Tokens generated", registry=self.registry)
        self.first = Histogram(
            "finetune_time_to_first_token_seconds",
            "From request to first token",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.between = Histogram(
            "finetune_time_per_token_seconds", "Between two tokens", buckets=SECONDS, registry=self.registry
        )
        self.registry.register(self)  # type: ignore[arg-type]

    def collect(self) -> Any:
        engine = self.server.worker.engine
        scheduler = engine.scheduler
        for name, text, value in (
            ("running_sequences", "Sequences in work", len(scheduler.running)),
            ("waiting_sequences", "Sequences that wait", len(scheduler.waiting)),
            ("used_blocks", "Cache blocks in use", engine.pool.used),
            ("blocks", "Cache blocks", engine.pool.count),
            ("preemptions", "Preemptions since the start", scheduler.preemptions),
            ("prefix_hit_tokens", "Prompt tokens found in the prefix cache", scheduler.hits),
            ("prefix_miss_tokens", "Prompt tokens computed", scheduler.misses),
            ("guessed_tokens", "Guesses of the drafter", engine.proposed),
            ("accepted_tokens", "Guesses accepted", engine.accepted),
        ):
            yield GaugeMetricFamily(f"finetune_{name}", text, value)

    async def page(self, _: Request) -> Response:
        return Response(generate_latest(self.registry), media_type="text/plain; version=0.0.4; charset=utf-8")
