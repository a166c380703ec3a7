"""One request in the engine: from its queue to the answer, whole or as a stream."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from finetune.errors import UserError
from finetune.inference.api import Call
from finetune.inference.beams import samples
from finetune.inference.grammar import Matcher
from finetune.inference.sampler import Sampling
from finetune.inference.scheduler import Sequence
from finetune.inference.text import TextStream
from finetune.inference.tools import Dialect, ToolCall

if TYPE_CHECKING:
    from finetune.inference.server import Server


@dataclass
class News:
    """What one answer of a request got in a step."""

    index: int
    text: str
    tokens: list[int]
    logprobs: list[Any]
    finish_reason: str
    error: str = ""
    calls: list[tuple[int, ToolCall]] = field(default_factory=list)  # of tools, with their number in the answer


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


class Work:
    """One request in the engine. `begin`, then either `stream` or `whole`. `dialect`: as in `Call.structure`."""

    def __init__(self, server: Server, call: Call, prompt: list[int], dialect: Dialect | None = None) -> None:
        self.server, self.call, self.prompt, self.dialect = server, call, prompt, dialect
        self.readers = [call.reader(dialect) for _ in range(call.n)]
        self.called = [0] * call.n
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
        keep = self.dialect.special.values() if self.dialect else ()
        accepted: asyncio.Future[None] = self.loop.create_future()
        matcher: Matcher | None = None

        def start() -> None:
            error = None
            try:
                how = Sampling(**call.sampling(), seed=seed % (1 << 63))
                self.sequences = samples(
                    server.worker.engine, self.prompt, how, most_new, call.n, server.stop_ids,
                    text=lambda: TextStream(tokenizer, call.stops, keep), adapter=server.adapters[call.model],
                    grammar=matcher,
                )  # fmt: skip
                server.worker.listeners[self.sequences[0]] = self.hear
            except UserError as refusal:
                error = Refused(400, str(refusal))
            self.loop.call_soon_threadsafe(settle, accepted, None, error)

        server.active += 1
        try:
            if source := call.structure(self.dialect):
                matcher = await asyncio.to_thread(server.matcher, source)
            server.worker.call(start)
            await accepted
        except UserError as error:
            self.end()
            raise Refused(400, str(error)) from None
        except BaseException:
            self.end()
            raise

    def hear(self, sequence: Sequence) -> None:
        """Called in the engine's thread: passes on what is new."""
        if not self.sent:  # the first step: the others were split off in it, and may be finished
            self.server.worker.listeners.update(dict.fromkeys(self.sequences[1:], self.hear))
        index = next(i for i, one in enumerate(self.sequences) if one is sequence)
        assert sequence.text
        letters, tokens = self.sent.get(index, (0, 0))
        self.sent[index] = len(sequence.text.text), len(sequence.answer)
        news = News(index, sequence.text.text[letters:], sequence.answer[tokens:], sequence.logprobs[tokens:],
                    sequence.finish_reason, sequence.error)  # fmt: skip
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
        finished, first = 0, True
        last: dict[int, float] = {}  # when each answer got its latest tokens
        watching = asyncio.ensure_future(left(request))
        watching.add_done_callback(lambda task: None if task.cancelled() else self.news.put_nowait(None))
        try:
            while finished < self.call.n:
                news = await self.news.get()
                if news is None:
                    raise Left
                if news.finish_reason == "error":
                    raise Refused(500, news.error or "the engine has stopped")
                self.find_calls(news)
                now = time.perf_counter()
                if first:
                    self.server.metrics.first.observe(now - self.began)
                    first = False
                elif news.index in last:
                    for _ in news.tokens:  # of one step: with guesses several
                        self.server.metrics.between.observe((now - last[news.index]) / len(news.tokens))
                last[news.index] = now
                self.server.metrics.tokens.inc(len(news.tokens))
                finished += bool(news.finish_reason)
                yield news
            self.server.metrics.requests.inc()
        finally:
            watching.cancel()
            self.end()

    def find_calls(self, news: News) -> None:
        """Takes the calls of tools out of the text."""
        reader = self.readers[news.index]
        if reader is None:
            return
        news.text, calls = reader.push(news.text)
        if news.finish_reason:
            rest, more = reader.finish()
            news.text, calls = news.text + rest, calls + more
        for call in calls:
            if self.call.several or not self.called[news.index]:
                news.calls.append((self.called[news.index], call))
                self.called[news.index] += 1
        if self.called[news.index] and news.finish_reason == "stop":
            news.finish_reason = "tool_calls"

    async def whole(self, request: Request) -> Response:
        """The finished answers in one object."""
        call, made = self.call, 0
        texts, reasons = [""] * call.n, [""] * call.n
        calls: list[list[ToolCall]] = [[] for _ in range(call.n)]
        logprobs: list[list[Any]] = [[] for _ in range(call.n)]
        try:
            async for news in self.arrivals(request):
                texts[news.index] += news.text
                logprobs[news.index] += call.logprob_entries(self.server.tokenizer, news.tokens, news.logprobs)
                reasons[news.index] = news.finish_reason
                calls[news.index] += [one for _, one in news.calls]
                made += len(news.tokens)
        except Left:
            return Response(status_code=499)  # nobody reads it
        choices = [call.choice(i, texts[i], logprobs[i], reasons[i], calls[i]) for i in range(call.n)]
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
                if news.text or entries or news.calls or news.finish_reason:
                    piece = call.delta(news.index, news.text, entries, news.finish_reason, news.calls)
                    yield event(chunk | {"choices": [piece]})
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
        return {"id": self.id, "object": kind, "created": self.created, "model": self.call.model}

    def usage(self, made: int) -> dict[str, int]:
        asked = len(self.prompt)
        return {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made}


async def left(request: Request) -> None:
    """Returns when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def settle(future: asyncio.Future[Any], value: Any, error: Exception | None = None) -> None:
    """The result or the error of a future, unless it has one, or nobody waits for it any more."""
    if not future.done():
        future.set_exception(error) if error else future.set_result(value)


def event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
