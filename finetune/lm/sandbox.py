"""The process in which chat templates run (started by chat_template.py): a sandbox bounded in time and memory.

A template comes from elsewhere. Jinja's sandbox keeps it from Python's objects, but not from computing without end or
from asking for all memory in one multiplication; only the operating system stops that, and only for a whole process.
Requests and answers are lines of JSON.
"""

from __future__ import annotations

import json
import re
import secrets
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MOST_CHARACTERS = 1 << 24  # of a rendering
Span = tuple[int, int]


class Generation(Extension):
    """Hugging Face's `{% generation %}` … `{% endgeneration %}`. While `marks` is set, what stands between the two is
    put between these characters: they travel with the text through macros, set blocks, calls and filters."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own interface)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        self.environment.marked = True  # type: ignore[attr-defined]
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("note"), [], [], body).set_lineno(line)

    def note(self, caller: Callable[[], str]) -> str:
        marks: tuple[str, str] | None = self.environment.marks  # type: ignore[attr-defined]
        return f"{marks[0]}{caller()}{marks[1]}" if marks else caller()


class PlainNamespace(Namespace):
    """Jinja's, without names that begin with an underscore, as transformers has it."""

    def __init__(*args: Any, **values: Any) -> None:  # a template may call one of its values `self`
        self, *given = args
        found = dict(*given, **values)
        for name in found:
            refuse_private(name)
        Namespace.__init__(self, found)

    def __setitem__(self, name: str, value: Any) -> None:
        refuse_private(name)
        Namespace.__setitem__(self, name, value)


def refuse_private(name: Any) -> None:
    """SecurityError for a name that begins with an underscore."""
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold the name {name!r}")


class PlainDict:
    """`dict(…)` and no other attribute of the class."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)


def to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As Hugging Face has it: Jinja's own filter would escape HTML. json's other options reach into Python."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def complain(message: str) -> NoReturn:
    """Hugging Face's `raise_exception`."""
    raise TemplateError(message)


@lru_cache(maxsize=16)
def compiled(source: str) -> Template:
    """The template with its extensions, filters and functions. TemplateError if it does not compile."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.extend(marked=False, marks=None)  # not globals: a template must not reach them
    environment.filters["tojson"] = to_json
    del environment.globals["lipsum"]
    environment.globals |= {"dict": PlainDict(), "namespace": PlainNamespace, "raise_exception": complain}
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


class TooLong(Exception):
    pass


def render(source: str, values: dict[str, Any]) -> tuple[str, list[Span]]:
    """The text, and the character spans between generation markers. TemplateError if marking the spans changes the
    text: then something computes with what stands between the markers, and whose characters they are is not known."""
    template = compiled(source)
    environment: Any = template.environment
    text = written(template, values)
    if not environment.marked:
        return text, []
    number = secrets.randbits(64)  # whatever the messages hold, it is not this
    environment.marks = f"\ue000{number}\ue001", f"\ue002{number}\ue003"
    try:
        found = unmarked(written(template, values), environment.marks)
    except Exception:
        found = None
    finally:
        environment.marks = None
    if found is None or found[0] != text:
        raise TemplateError(
            "something in it computes with the text between its {% generation %} markers, so which characters are the "
            "assistant's cannot be told: move the markers out of the filter or function"
        )
    return found


def written(template: Template, values: dict[str, Any]) -> str:
    """The text of a rendering. TooLong beyond MOST_CHARACTERS."""
    pieces, size = [], 0
    for piece in template.generate(**values):
        size += len(piece)
        if size > MOST_CHARACTERS:
            raise TooLong
        pieces.append(piece)
    return "".join(pieces)


def unmarked(text: str, marks: tuple[str, str]) -> tuple[str, list[Span]] | None:
    """The text without the marks, and the outermost spans between them; None if they are not pairs."""
    pieces: list[str] = []
    spans: list[Span] = []
    place = depth = start = 0
    for piece in re.split(f"({'|'.join(map(re.escape, marks))})", text):
        if piece == marks[0]:
            start, depth = (place if depth == 0 else start), depth + 1
        elif piece == marks[1]:
            depth -= 1
            if depth < 0:
                return None
            if depth == 0 and place > start:
                spans.append((start, place))
        else:
            pieces.append(piece)
            place += len(piece)
    return None if depth else ("".join(pieces), spans)


def answer(line: bytes) -> dict[str, Any]:
    """{"marked"} of {"source"}; {"text", "spans"} of {"source", "values"}; {"error"} where the template is at fault."""
    try:
        request = json.loads(line)
        if "values" not in request:
            environment: Any = compiled(request["source"]).environment
            return {"marked": environment.marked}
        text, spans = render(request["source"], request["values"])
        return {"text": text, "spans": spans}
    except TooLong:
        return {"error": f"it writes more than {MOST_CHARACTERS:,} characters"}
    except MemoryError:
        return {"error": "it needs too much memory"}
    except RecursionError:
        return {"error": "it is nested too deeply, or calls itself without end"}
    except TemplateError as error:
        return {"error": str(error.message or type(error).__name__)}
    except Exception as error:  # a template can raise whatever Python's operators do
        return {"error": f"{type(error).__name__}: {error}"}


def serve(seconds: float, memory: int) -> None:
    """Answers requests on standard input until it ends. The kernel ends this process if one takes longer than `seconds`
    of CPU time, and refuses it more than `memory` bytes (on Linux)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF, which nobody handles here, ends the process
        found = json.dumps(answer(line)).encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(found + b"\n")
        sys.stdout.buffer.flush()
