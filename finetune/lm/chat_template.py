"""Chat templates: Jinja with Hugging Face's `{% generation %}` … `{% endgeneration %}` markers.

They run in a separate process (finetune/lm/sandbox.py), so that a template that does not end or allocates all memory
is one line of error."""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from typing import Any

from finetune.errors import UserError

SECONDS = 5.0  # of CPU time, for one rendering
MEMORY = 1 << 30  # bytes of address space
SERVE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from finetune.lm import sandbox; sandbox.serve(*map(json.loads, sys.argv[2:]))"
)
MOST_SOURCE = 1 << 20
SMOLLM_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


class ChatTemplate:
    """A compiled template; `marked` tells whether it has generation markers. UserError if it does not compile."""

    def __init__(self, source: str) -> None:
        if len(source) > MOST_SOURCE:
            raise UserError(f"the chat template has {len(source):,} characters: at most {MOST_SOURCE:,} are read")
        self.source = source
        found = worker.ask({"source": source})
        if "error" in found:
            raise UserError(f"the chat template does not compile: {found['error']}")
        self.marked: bool = found["marked"]

    def render(self, **values: Any) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the character spans between generation markers. UserError if the template refuses."""
        found = worker.ask({"source": self.source, "values": values})
        if "error" in found:
            raise UserError(f"the chat template refuses these messages: {found['error']}")
        return found["text"], [(start, stop) for start, stop in found["spans"]]


class Worker:
    """The process that renders, started with the first request and restarted after one that ended it."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.owner, self.lock = 0, threading.Lock()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        line = json.dumps(request).encode() + b"\n"
        with self.lock:
            if self.process is None or self.owner != os.getpid():  # a fork must not talk into its parent's pipe
                self.start()
            answered = False
            assert self.process is not None
            assert self.process.stdin is not None
            assert self.process.stdout is not None
            try:
                try:
                    self.process.stdin.write(line)
                    self.process.stdin.flush()
                    found = self.process.stdout.readline()
                except OSError:
                    found = b""
                answered = found.endswith(b"\n")
            finally:
                if not answered:  # Ctrl-C too: the next request must not read this one's answer
                    code = self.stop()
            if not answered:
                slow = code in (-signal.SIGPROF, -signal.SIGXCPU)
                return {"error": f"it takes longer than {SECONDS:g} s" if slow else "it ends the process that runs it"}
        read: dict[str, Any] = json.loads(found)
        if "error" in read:
            read["error"] = " ".join(str(read["error"]).split())[:300]
        return read

    def start(self) -> None:
        words = [json.dumps([os.path.abspath(place) for place in sys.path]), json.dumps(SECONDS), json.dumps(MEMORY)]
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-c", SERVE, *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.owner = os.getpid()

    def stop(self) -> int:
        """Ends the process, if it is this one's; its exit code."""
        process, self.process = self.process, None
        if process is None or self.owner != os.getpid():
            return 0
        for pipe in (process.stdin, process.stdout):
            if pipe:
                try:
                    pipe.close()
                except OSError:  # what was still to be written
                    continue
        try:
            return process.wait(timeout=0.5)  # it may be about to end
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


worker = Worker()
atexit.register(worker.stop)


def chatml(default_system: str = "") -> str:
    """The project's ChatML template (Jinja), with generation markers around what the assistant has to learn: each
    answer and its `<|im_end|>`. `default_system` precedes messages that do not begin with a system message."""
    first = ""
    if default_system:
        turn = json.dumps(f"<|im_start|>system\n{default_system}<|im_end|>\n", ensure_ascii=False)
        first = "{% if loop.first and messages[0]['role'] != 'system' %}{{ " + turn + " }}{% endif %}"
    return (
        "{% for message in messages %}" + first + "{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )


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


def with_markers(template: str | None) -> str | None:
    """Our template in place of SmolLM's, recognized by its default system message, if both render the same text."""
    if template is None or SMOLLM_SYSTEM not in template:
        return template
    ours = chatml(SMOLLM_SYSTEM)
    return ours if not ChatTemplate(template).marked and same_text(template, ours) else template
