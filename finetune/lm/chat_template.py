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
from dataclasses import dataclass
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


# What Qwen 2.5 and 3 write around tools.
TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function "
    "signatures within <tools></tools> XML tags:\n<tools>",
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>',
)


def chatml_tools() -> str:
    """ChatML with tools, calls, their results and reasoning as Qwen 2.5 and 3 write them, with generation markers. The
    reasoning of every answer is written, so that earlier answers stay as they were given."""
    before, after = (json.dumps(text) for text in TOOLS)
    return (
        "{% set system = messages[0]['content'] if messages and messages[0]['role'] == 'system' else none %}"
        "{% if tools %}{{ '<|im_start|>system\n' }}{% if system is not none %}{{ system + '\n\n' }}{% endif %}"
        "{{ " + before + " }}{% for tool in tools %}{{ '\n' + (tool | tojson) }}{% endfor %}"
        "{{ " + after + " + '<|im_end|>\n' }}"
        "{% elif system is not none %}{{ '<|im_start|>system\n' + system + '<|im_end|>\n' }}{% endif %}"
        "{% for message in messages %}{% set content = message.content or '' %}"
        "{% if message.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}"
        "{% if message.reasoning_content %}{{ '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}{% endif %}"
        "{{ content }}{% for call in message.tool_calls or [] %}{% set call = call.function or call %}"
        "{% if content or not loop.first %}{{ '\n' }}{% endif %}"
        '{{ \'<tool_call>\n{"name": "\' + call.name + \'", "arguments": \' + (call.arguments | tojson) }}'
        "{{ '}\n</tool_call>' }}"
        "{% endfor %}{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
        "{% elif message.role == 'tool' %}"
        "{% if loop.first or loop.previtem.role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
        "{{ '\n<tool_response>\n' + content + '\n</tool_response>' }}"
        "{% if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
        "{% elif message.role == 'user' %}{{ '<|im_start|>user\n' + content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


def turns(begin: str, user: str, end: str, answer: str, close: str, system: str | None = None) -> str:
    """A template of simple turns: `begin` once, then before and behind every question (`user`, `end`) and answer
    (`answer`, `close`), each a Jinja expression. `system`: the same of a system message; without it, one is written in
    front of the first question."""
    alone = system is not None
    first = (
        ""
        if alone
        else (
            "{% set led = messages and messages[0]['role'] == 'system' %}"
            "{% set lead = messages[0]['content'] | trim + '\n\n' if led else '' %}"
        )
    )
    lead = "" if alone else "(lead if loop.index0 == (1 if lead else 0) else '') + "
    return (
        first + "{{ " + begin + " }}{% for message in messages %}"
        "{% if message['role'] == 'user' %}{{ " + user + " + " + lead + "message['content'] + " + end + " }}"
        "{% elif message['role'] == 'assistant' %}{{ " + answer + " }}"
        "{% generation %}{{ message['content'] + "
        + close
        + " }}{% endgeneration %}"
        + (f"{{% elif message['role'] == 'system' %}}{{{{ {system} + message['content'] + {end} }}}}" if system else "")
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ "
        + answer
        + " }}{% endif %}"
    )


@dataclass(frozen=True)
class Known:
    """A template that --template names, and the tokens that it writes; every one has generation markers."""

    summary: str
    source: str
    tokens: tuple[str, ...]


LLAMA3 = "'<|start_header_id|>{}<|end_header_id|>\n\n'"
TEMPLATES = {
    "chatml": Known("<|im_start|>role … <|im_end|>", chatml(), ("<|im_start|>", "<|im_end|>")),
    "chatml-tools": Known(
        "ChatML with tools, tool calls and reasoning as Qwen writes them", chatml_tools(),
        ("<|im_start|>", "<|im_end|>"),
    ),
    "llama3": Known(
        "<|start_header_id|>role<|end_header_id|> … <|eot_id|>",
        turns("bos_token or ''", LLAMA3.format("user"), "'<|eot_id|>'", LLAMA3.format("assistant"), "'<|eot_id|>'",
              LLAMA3.format("system")),
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "gemma": Known(
        "<start_of_turn>user … <end_of_turn>, the system message in the first question",
        turns("bos_token or ''", "'<start_of_turn>user\n'", "'<end_of_turn>\n'", "'<start_of_turn>model\n'",
              "'<end_of_turn>'").replace("{% endgeneration %}", "{% endgeneration %}{{ '\n' }}"),
        ("<start_of_turn>", "<end_of_turn>"),
    ),
    "mistral": Known(
        "[INST] … [/INST] as text, and the model's own end token",
        turns("bos_token or ''", "'[INST] '", "' [/INST]'", "''", "eos_token")
        .replace("{% generation %}{{ ", "{% generation %}{{ ' ' + "), (),
    ),
    "zephyr": Known(
        "<|user|>, <|assistant|> as text, and the model's own end token",
        turns("''", "'<|user|>\n'", "eos_token + '\n'", "'<|assistant|>\n'", "eos_token", "'<|system|>\n'")
        .replace("{% endgeneration %}", "{% endgeneration %}{{ '\n' }}"), (),
    ),
    "alpaca": Known(
        "### Instruction: … ### Response: as text, and the model's own end token",
        turns("''", "'### Instruction:\n'", "'\n\n'", "'### Response:\n'", "eos_token")
        .replace("{% endgeneration %}", "{% endgeneration %}{{ '\n\n' }}"), (),
    ),
}  # fmt: skip


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
