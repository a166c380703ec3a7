"""The requests and answers of OpenAI's API, as far as they are served. What would change an answer and is not supported
is refused by name; other unknown keys are ignored, as clients send many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from finetune.data.conversations import check_message
from finetune.errors import UserError
from finetune.inference import grammar
from finetune.inference.tools import Dialect, Reader, ToolCall
from finetune.lm.tokenizer import Tokenizer

Count = Annotated[int, Meta(ge=1, le=1 << 20)]
Few = Annotated[int, Meta(ge=1, le=64)]


class StreamOptions(msgspec.Struct):
    include_usage: bool = False


class PlainText(msgspec.Struct, tag_field="type", tag="text"):
    """An answer without a structure."""


class JsonObject(msgspec.Struct, tag_field="type", tag="json_object"):
    """Any JSON object."""


class NamedSchema(msgspec.Struct):
    schema: dict[str, Any]  # it is enforced whatever `strict` says


class JsonSchema(msgspec.Struct, tag_field="type", tag="json_schema"):
    """A JSON value that satisfies a schema."""

    json_schema: NamedSchema


class Structured(msgspec.Struct, forbid_unknown_fields=True):
    """vLLM's ways to say what an answer must be."""

    json: dict[str, Any] | str | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None


class Named(msgspec.Struct):
    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct):
    """A function that the model may call."""

    type: Literal["function"]
    function: Named


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
    response_format: PlainText | JsonObject | JsonSchema | None = None
    structured_outputs: Structured | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: None = None

    prefix: ClassVar[str]
    object: ClassVar[str]
    chunk: ClassVar[str]

    @property
    def most_new(self) -> int | None:
        return self.max_tokens

    @property
    def several(self) -> bool:
        """Whether an answer may call several tools."""
        return True

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    def wanted_logprobs(self) -> int | None:
        """How many of the most likely tokens are reported with each; None: nothing is."""
        raise NotImplementedError

    def choice(
        self, index: int, text: str, logprobs: list[Any], reason: str, calls: Sequence[ToolCall] = ()
    ) -> dict[str, Any]:
        """A finished answer."""
        raise NotImplementedError

    def opening(self) -> list[dict[str, Any]]:
        """What a stream begins with."""
        raise NotImplementedError

    def delta(
        self, index: int, text: str, logprobs: list[Any], reason: str, calls: Sequence[tuple[int, ToolCall]] = ()
    ) -> dict[str, Any]:
        """A piece of an answer. `calls`: new ones, with their number in the answer."""
        raise NotImplementedError

    def structure(self, dialect: Dialect | None = None) -> str | None:
        """The grammar of what the answer must be. UserError if it is said twice, or malformed. `dialect`: how the model
        calls tools; None: it may call none."""
        given = self.structured_outputs or Structured()
        form = self.response_format
        said: dict[str, Any] = {
            "response_format": form.json_schema.schema if isinstance(form, JsonSchema)
            else {"type": "object"} if isinstance(form, JsonObject) else None,
            "guided_json": self.guided_json, "structured_outputs.json": given.json,
            "structured_outputs.json_object": {"type": "object"} if given.json_object else None,
            "guided_regex": self.guided_regex, "structured_outputs.regex": given.regex,
            "guided_choice": self.guided_choice, "structured_outputs.choice": given.choice,
        }  # fmt: skip
        found = [name for name, value in said.items() if value is not None]
        if len(found) > 1:
            raise UserError(f"{found[0]} and {found[1]} both say what the answer must be: give one of them")
        if not found:
            return None
        name, value = found[0], said[found[0]]
        if name.endswith("regex"):
            return grammar.regex(value)
        if name.endswith("choice"):
            return grammar.choice(value)
        return grammar.json_schema(schema_of(name, value))

    def reader(self, dialect: Dialect | None) -> Reader | None:
        """What finds the calls of tools in one answer; None: nothing is looked for."""
        return None

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


def schema_of(name: str, value: Any) -> dict[str, Any]:
    """A schema that is an object or its JSON."""
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except (msgspec.DecodeError, RecursionError):
            raise UserError(f"{name} is a text that is not JSON") from None
    if not isinstance(value, dict):
        raise UserError(f"{name} must be a schema, a JSON object")
    return value


class ChatCall(Call, kw_only=True):
    """/v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] = 0
    tools: Annotated[list[dict[str, Any]], Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | Tool | None = None
    parallel_tool_calls: bool = True
    functions: None = None  # what tools were called before
    function_call: None = None
    chat_template_kwargs: dict[str, Any] | None = None  # vLLM's name

    prefix: ClassVar[str] = "chatcmpl"
    object: ClassVar[str] = "chat.completion"
    chunk: ClassVar[str] = "chat.completion.chunk"

    @property
    def most_new(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def callable(self) -> list[dict[str, Any]]:
        """The tools that the answer may call."""
        if not self.tools or self.tool_choice == "none":
            return []
        named = self.tool_choice.function.name if isinstance(self.tool_choice, Tool) else None
        return [tool for tool in self.tools if named is None or tool["function"]["name"] == named]

    @property
    def several(self) -> bool:
        return self.parallel_tool_calls

    @property
    def forced(self) -> bool:
        """Whether the answer has to call a tool."""
        return isinstance(self.tool_choice, Tool) or self.tool_choice == "required"

    def check_tools(self) -> None:
        """UserError for malformed tools, and for a choice that they do not have."""
        try:
            names = [tool.function.name for tool in msgspec.convert(self.tools or [], list[Tool])]
        except msgspec.ValidationError as error:
            raise UserError(str(error).replace("`$", "`$.tools")) from None
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f"tools: the function {twice!r} is given twice")
        if self.forced and not self.callable:
            wanted = self.tool_choice.function.name if isinstance(self.tool_choice, Tool) else self.tool_choice
            raise UserError(f"tool_choice: {wanted!r} needs a tool of that kind in tools")

    def conversation(self) -> list[dict[str, Any]]:
        """The messages in our words, what holds for all of them in the first (finetune/data/conversations.py).
        UserError says which one is wrong."""
        try:
            found = [
                check_message(i, {key: value for key, value in message.items() if value is not None})
                for i, message in enumerate(self.messages)
            ]
        except ValueError as error:
            raise UserError(str(error)) from None
        calls = (call for message in found for call in message.get("tool_calls", ()))
        names = {call.get("id"): call["function"]["name"] for call in calls}
        for message in found:  # templates write a result with the name of its tool
            if message["role"] == "tool" and message.get("tool_call_id") in names:
                message.setdefault("name", names[message["tool_call_id"]])
        shown = {} if self.tool_choice == "none" else {"tools": self.tools}
        whole = shown | {"chat_template_kwargs": self.chat_template_kwargs}
        first, *rest = found
        return [first | {key: value for key, value in whole.items() if value}, *rest]

    def structure(self, dialect: Dialect | None = None) -> str | None:
        plain = super().structure()
        strict = any(tool["function"].get("strict") for tool in self.callable)
        if not dialect or not (self.forced or plain or strict):
            return plain
        rules = dialect.rules(self.callable, self.parallel_tool_calls, free=not (self.forced or plain))
        if plain is None:
            return f"start: calls\n{rules}"
        if self.forced or not plain.startswith("start: %json"):
            raise UserError("tool_choice and the structure of the answer exclude each other: give one of them")
        return f"start: calls | answer\nanswer: {plain.removeprefix('start: ')}\n{rules}"

    def reader(self, dialect: Dialect | None) -> Reader | None:
        return dialect.form({tool["function"]["name"] for tool in self.callable}) if dialect else None

    def wanted_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    def choice(
        self, index: int, text: str, logprobs: list[Any], reason: str, calls: Sequence[ToolCall] = ()
    ) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if calls:
            message |= {"content": text or None, "tool_calls": [call.shown() for call in calls]}
        shown = {"content": logprobs} if self.logprobs else None
        return {"index": index, "message": message, "logprobs": shown, "finish_reason": reason}

    def opening(self) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [{"index": i, "delta": delta, "logprobs": None, "finish_reason": None} for i in range(self.n)]

    def delta(
        self, index: int, text: str, logprobs: list[Any], reason: str, calls: Sequence[tuple[int, ToolCall]] = ()
    ) -> dict[str, Any]:
        shown = {"content": logprobs} if logprobs else None
        delta: dict[str, Any] = {"content": text} if text else {}
        if calls:
            delta["tool_calls"] = [{"index": number} | call.shown() for number, call in calls]
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

    def choice(
        self, index: int, text: str, logprobs: list[Any], reason: str, calls: Sequence[ToolCall] = ()
    ) -> dict[str, Any]:
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

    def delta(
        self, index: int, text: str, logprobs: list[Any], reason: str, calls: Sequence[tuple[int, ToolCall]] = ()
    ) -> dict[str, Any]:
        return self.choice(index, text, logprobs, reason) | {"finish_reason": reason or None}
