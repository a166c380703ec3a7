"""Calls of tools in answers: which form a chat template has for them, how they are read out of a text while it is made,
and the grammar of an answer that has to be one.

    Hermes, Qwen 2.5 and 3   <tool_call>{"name": …, "arguments": {…}}</tool_call>, several, and text before them
    Llama 3.1 to 3.3         {"name": …, "parameters": {…}} as the whole answer

What is not a well-formed call of a tool that the request has stays text, to the letter.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from finetune.errors import UserError
from finetune.inference import grammar
from finetune.inference.text import begun
from finetune.lm.tokenizer import Tokenizer

NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}  # of a function without parameters


@dataclass
class ToolCall:
    """One call of a tool."""

    name: str
    arguments: dict[str, Any]
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")

    def shown(self) -> dict[str, Any]:
        """As the API has it."""
        function = {"name": self.name, "arguments": json.dumps(self.arguments, ensure_ascii=False)}
        return {"id": self.id, "type": "function", "function": function}


class Reader:
    """Parts an answer into what is said and the calls in it, piece by piece; any split gives the same. `names`: of the
    tools that may be called. A subclass is a form of calls."""

    name: ClassVar[str]
    markers: ClassVar[tuple[str, ...]]  # what stands around a call; a vocabulary may have tokens for these
    key: ClassVar[str]  # of the arguments

    def __init__(self, names: Collection[str]) -> None:
        self.names, self.pending = names, ""

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """What is certain now: text that is said, and calls."""
        raise NotImplementedError

    def finish(self) -> tuple[str, list[ToolCall]]:
        """What was held back."""
        raise NotImplementedError

    def call(self, value: Any) -> ToolCall | None:
        """The call that a JSON value is; None if it is another value."""
        if not isinstance(value, dict) or set(value) != {"name", self.key}:
            return None
        name, arguments = value["name"], value[self.key]
        known = isinstance(name, str) and name in self.names and isinstance(arguments, dict)
        return ToolCall(name, arguments) if known else None

    @classmethod
    def frame(cls, many: bool, free: bool, special: dict[str, int]) -> str:
        """The rule `calls`, of `call`: an answer that calls tools, several if `many` and the form has them; `free`: it
        may be a text, and have texts around the calls. `special`: the ids of markers that are special tokens."""
        raise NotImplementedError


class Hermes(Reader):
    """Calls between two markers, behind a text or not (NousResearch's Hermes 2 Pro and 3, Qwen 2.5 and 3)."""

    name = "hermes"
    markers = ("<tool_call>", "</tool_call>")
    key = "arguments"
    called = False  # whether nothing is said since a call

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        before, after = self.markers
        self.pending += text
        said, calls = "", []
        while (at := self.pending.find(before)) >= 0:
            end = self.pending.find(after, at)
            found, value = "open", None
            while end >= 0:
                found, value = self.value(self.pending[at + len(before) : end])
                if found != "open":
                    break
                end = self.pending.find(after, end + 1)
            if found == "open":  # no end yet, or one within a text in the arguments
                break
            end += len(after)
            if value:
                said += self.pending[:at].rstrip()
                calls.append(value)
                self.called = True
            else:
                said += self.pending[:end]
                self.called = False
            self.pending = self.pending[end:]
        certain = at if at >= 0 else len(self.pending) - begun(self.pending, before)
        keep = len(self.pending[:certain].rstrip())  # the white space before a call is not said
        said, self.pending, self.called = said + self.pending[:keep], self.pending[keep:], self.called and not keep
        return said, calls

    def finish(self) -> tuple[str, list[ToolCall]]:
        rest, self.pending = self.pending, ""
        return "" if self.called and not rest.strip() else rest, []

    def value(self, text: str) -> tuple[str, ToolCall | None]:
        """("open", None) of a text that ends within a string, else ("closed", the call or None)."""
        try:
            return "closed", self.call(json.loads(text))
        except (json.JSONDecodeError, RecursionError) as error:
            return "open" if str(error).startswith("Unterminated string") else "closed", None

    @classmethod
    def frame(cls, many: bool, free: bool, special: dict[str, int]) -> str:
        before, after = (f"<[{special[m]}]>" if m in special else grammar.literal(m) for m in cls.markers)
        one = f'one: opening "\\n" call "\\n" {after}'
        if not free:
            more = ' ("\\n" one)*' if many else ""
            return f"calls: one{more}\n{one}\nopening: {before}"
        lazy = "" if cls.markers[0] in special else "[lazy]"  # the first marker ends the text before it
        calls = "one* TEXT" if many else "one | TEXT"
        return f"calls: {calls}\n{one}\nopening{lazy}: TEXT {before}\nTEXT: /(.|\\n)*/"


class Llama(Reader):
    """An answer that is a call, or several with semicolons between them (Llama 3.1 to 3.3)."""

    name = "llama"
    markers = ("<|python_tag|>",)
    key = "parameters"
    plain = False  # whether the answer is a text

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        self.pending += text
        start = self.pending.lstrip()
        marker = self.markers[0]
        if not self.plain and (marker.startswith(start) or start.startswith(("{", marker))):
            return "", []
        self.plain = True
        said, self.pending = self.pending, ""
        return said, []

    def finish(self) -> tuple[str, list[ToolCall]]:
        rest, self.pending = self.pending, ""
        calls: list[ToolCall] = []
        text = rest.strip().removeprefix(self.markers[0]).strip()
        while text:
            try:
                value, end = json.JSONDecoder().raw_decode(text)
            except (json.JSONDecodeError, RecursionError):
                return rest, []
            call = self.call(value)
            if call is None:
                return rest, []
            calls.append(call)
            text = text[end:].lstrip().removeprefix(";").lstrip()
        return ("", calls) if calls else (rest, [])

    @classmethod
    def frame(cls, many: bool, free: bool, special: dict[str, int]) -> str:
        return "calls: call | TEXT\nTEXT: /([^{](.|\\n)*)?/" if free else "calls: call"


FORMS: tuple[type[Reader], ...] = (Hermes, Llama)
PROBE: dict[str, Any] = {"name": "probe_weather", "description": "tells the weather", "parameters": NOTHING}


@dataclass(frozen=True)
class Dialect:
    """How a model calls tools. `special`: the ids of those markers that are special tokens, which texts are decoded
    without."""

    form: type[Reader]
    special: dict[str, int]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Dialect:
        form, added = form_of(tokenizer), tokenizer.backend.get_added_tokens_decoder()
        return cls(form, {t.content: i for i, t in added.items() if t.special and t.content in form.markers})

    def rules(self, tools: Sequence[dict[str, Any]], many: bool, free: bool = False) -> str:
        """The rule `calls` of a grammar, as in `Reader.frame`. Arguments satisfy the schema of their tool; where the
        answer is `free`, only those of tools that are strict."""
        names = " | ".join(f"call{i}" for i in range(len(tools)))
        lines = [self.form.frame(many, free, self.special), f"call: {names}"]
        for i, tool in enumerate(tools):
            function = tool["function"]
            if free and not function.get("strict"):
                function = function | {"parameters": {"type": "object"}}
            head = grammar.literal(json.dumps({"name": function["name"]})[:-1] + f', "{self.form.key}": ')
            lines.append(f'call{i}: {head} arguments{i} "}}"')
            lines.append(f"arguments{i}: {grammar.json_value(function.get('parameters') or NOTHING)}")
        return "\n".join(lines)


def form_of(tokenizer: Tokenizer) -> type[Reader]:
    """The form in which a model's chat template writes calls: the one that reads an example back. UserError if the
    template does not write tools, or calls in no known form."""
    tools = [{"type": "function", "function": PROBE}]
    asked = {"role": "user", "content": "x", "tools": tools}
    function = {"name": PROBE["name"], "arguments": {"place": "here"}}
    called = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    before, _ = tokenizer.render_text([asked], add_generation_prompt=True)
    if PROBE["description"] not in before:
        raise UserError("the model's chat template does not write tools")
    whole, _ = tokenizer.render_text([asked, called])
    same = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
    said = whole[same:]
    for form in FORMS:
        text = said
        for token in tokenizer.backend.get_added_tokens_decoder().values():
            if token.content not in form.markers:
                text = text.partition(token.content)[0]
        reader = form({PROBE["name"]})
        calls = reader.push(text)[1] + reader.finish()[1]
        if [call.arguments for call in calls] == [function["arguments"]]:
            return form
    names = ", ".join(form.name for form in FORMS)
    raise UserError(f"the model's chat template writes calls of tools in a form that is not known here ({names} are)")
