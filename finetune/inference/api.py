"""The requests and answers of OpenAI's API, as far as they are served. What would change an answer and is not supported
is refused by name; other unknown keys are ignored, as clients send many."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from finetune.lm.tokenizer import Tokenizer

Count = Annotated[int, Meta(ge=1, le=1 << 20)]
Few = Annotated[int, Meta(ge=1, le=64)]


class StreamOptions(msgspec.Struct):
    include_usage: bool = False


class Format(msgspec.Struct):
    """Only plain text: structured output has no grammar here."""

    type: Literal["text"] = "text"


class Call(msgspec.Struct, kw_only=True):
    """What both kinds of request have. The bounds of the sampling settings are those of `Sampling`."""

    model: str
    max_tokens: Count | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    n: Few = 1
    stop: str | Annotated[list[str], Meta(max_length=16)] | None = None
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    # not OpenAI's, but vLLM's names
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0

    prefix: ClassVar[str]
    object: ClassVar[str]
    chunk: ClassVar[str]

    @property
    def most_new(self) -> int | None:
        return self.max_tokens

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    def wanted_logprobs(self) -> int | None:
        """How many of the most likely tokens are reported with each; None: nothing is."""
        raise NotImplementedError

    def choice(self, index: int, text: str, logprobs: list[Any], reason: str) -> dict[str, Any]:
        """A finished answer."""
        raise NotImplementedError

    def opening(self) -> list[dict[str, Any]]:
        """What a stream begins with."""
        raise NotImplementedError

    def delta(self, index: int, text: str, logprobs: list[Any], reason: str) -> dict[str, Any]:
        """A piece of an answer."""
        raise NotImplementedError

    def sampling(self) -> dict[str, Any]:
        names = ("temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty", "presence_penalty",
                 "frequency_penalty")  # fmt: skip
        return {name: getattr(self, name) for name in names} | {
            "logit_bias": self.logit_bias or {}, "logprobs": self.wanted_logprobs(),
        }  # fmt: skip

    def logprob_entries(self, tokenizer: Tokenizer, tokens: list[int], logprobs: list[Any]) -> list[Any]:
        """One entry for each token whose log-probabilities were wanted."""
        return [
            entry(tokenizer, token, found.chosen)
            | {"top_logprobs": [entry(tokenizer, other, value) for other, value in found.top.items()]}
            for token, found in zip(tokens, logprobs, strict=False)
        ]


def entry(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    text = tokenizer.decode([token])
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


class ChatCall(Call, kw_only=True):
    """/v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] = 0
    tools: list[dict[str, Any]] | None = None
    response_format: Format | None = None

    prefix: ClassVar[str] = "chatcmpl"
    object: ClassVar[str] = "chat.completion"
    chunk: ClassVar[str] = "chat.completion.chunk"

    @property
    def most_new(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def conversation(self) -> list[dict[str, Any]]:
        """The messages, with the tools in the first (finetune/data/conversations.py)."""
        first, *rest = self.messages
        return [first | ({"tools": self.tools} if self.tools else {}), *rest]

    def wanted_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    def choice(self, index: int, text: str, logprobs: list[Any], reason: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        shown = {"content": logprobs} if self.logprobs else None
        return {"index": index, "message": message, "logprobs": shown, "finish_reason": reason}

    def opening(self) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [{"index": i, "delta": delta, "logprobs": None, "finish_reason": None} for i in range(self.n)]

    def delta(self, index: int, text: str, logprobs: list[Any], reason: str) -> dict[str, Any]:
        shown = {"content": logprobs} if logprobs else None
        delta = {"content": text} if text else {}
        return {"index": index, "delta": delta, "logprobs": shown, "finish_reason": reason or None}


class TextCall(Call, kw_only=True):
    """/v1/completions."""

    prompt: str | list[int]
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    echo: Literal[False] = False
    best_of: Literal[1] | None = None

    prefix: ClassVar[str] = "cmpl"
    object: ClassVar[str] = "text_completion"
    chunk: ClassVar[str] = "text_completion"

    def wanted_logprobs(self) -> int | None:
        return self.logprobs

    def choice(self, index: int, text: str, logprobs: list[Any], reason: str) -> dict[str, Any]:
        shown = None
        if self.logprobs is not None:
            shown = {
                "tokens": [one["token"] for one in logprobs],
                "token_logprobs": [one["logprob"] for one in logprobs],
                "top_logprobs": [{top["token"]: top["logprob"] for top in one["top_logprobs"]} for one in logprobs],
            }
        return {"index": index, "text": text, "logprobs": shown, "finish_reason": reason}

    def opening(self) -> list[dict[str, Any]]:
        return []

    def delta(self, index: int, text: str, logprobs: list[Any], reason: str) -> dict[str, Any]:
        return self.choice(index, text, logprobs, reason) | {"finish_reason": reason or None}
