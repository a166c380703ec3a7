"""Chat templates: Jinja in a sandbox, with Hugging Face's `{% generation %}` … `{% endgeneration %}` markers."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from finetune.errors import UserError


class Generation(Extension):
    """Notes the character span of what stands between the markers; the text itself is unchanged."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own interface)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("note"), [], [], body).set_lineno(line)

    def note(self, caller: Callable[[], str]) -> str:
        text = caller()
        template: ChatTemplate = self.environment.chat  # type: ignore[attr-defined]
        start = sum(map(len, template.written))  # what the template has written before this block
        template.spans.append((start, start + len(text)))
        return text


class ChatTemplate:
    """A compiled template; `marked` tells whether it has generation markers. UserError if it does not compile."""

    def __init__(self, source: str) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
        )
        environment.extend(chat=self)  # not a global: a template from elsewhere must not reach it
        environment.filters["tojson"] = to_json
        environment.globals |= {"raise_exception": complain, "strftime_now": lambda form: datetime.now().strftime(form)}
        self.marked = "{% generation" in source or "{%- generation" in source
        self.written: list[str] = []
        self.spans: list[tuple[int, int]] = []
        try:
            self.template = environment.from_string(source)
        except TemplateError as error:
            raise UserError(f"the chat template does not compile: {error}") from None

    def render(self, **values: Any) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the character spans between generation markers. UserError if the template refuses."""
        self.written, self.spans = [], []
        try:
            for piece in self.template.generate(**values):
                self.written.append(piece)
        except TemplateError as error:
            raise UserError(f"the chat template refuses these messages: {error}") from None
        return "".join(self.written), self.spans


def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """As Hugging Face has it: Jinja's own filter would escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def complain(message: str) -> NoReturn:
    raise TemplateError(message)


def same_text(one: str, other: str) -> bool:
    """Whether two templates write the same text for conversations with and without a system message."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": " b\n"}]
    chats = [turns, [{"role": "system", "content": "s"}, *turns], turns[:1] * 2]
    first, second = ChatTemplate(one), ChatTemplate(other)
    return all(
        first.render(messages=chat, add_generation_prompt=prompt)[0]
        == second.render(messages=chat, add_generation_prompt=prompt)[0]
        for chat in chats
        for prompt in (False, True)
    )
