"""A conversation with a model in a terminal: what `python -m finetune chat` runs. The engine is the server's, in this
process; a line that begins with / is a command."""

import io
import json
import queue
import secrets
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError, nearest
from finetune.runs import checkpoint, display, reading

if TYPE_CHECKING:
    from rich.console import Console

    from finetune.inference.scheduler import Sequence
    from finetune.inference.worker import Worker
    from finetune.lm.tokenizer import Tokenizer

COMMANDS = {
    "/help": "this list",
    "/reset": "forget the conversation; the system message stays",
    "/system TEXT": "another system message, in a new conversation; without TEXT: none",
    "/set NAME VALUE": "change a setting",
    "/settings": "show the settings",
    "/save FILE": "write the conversation to a .jsonl file, as `run sft --data` reads it",
    "/quit": "end, as Ctrl-D does",
}
NOTE = "Enter sends, \\ at the end of a line continues it, Ctrl-C stops an answer, /help lists commands"
CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])  # a model could move the cursor with them


@dataclass
class Settings:
    """How answers are made; `/set` changes them."""

    temperature: float = 0.7  # 0: the most likely token
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int = 512  # of an answer
    seed: int | None = None  # of the first answer, the next one has the next; none: another each time
    adapter: str | None = None  # one of --adapter; none: the model alone

    def set(self, name: str, text: str) -> None:
        """UserError for an unknown name, or a value that does not fit."""
        if name not in {f.name for f in fields(self)}:
            known = [f.name for f in fields(self)]
            raise UserError(f"there is no setting {name}{nearest(name, known)}; they are {', '.join(known)}")
        old, whole = getattr(self, name), name in ("top_k", "max_tokens", "seed")
        try:
            value: Any = text if name == "adapter" else int(text) if whole else float(text)
        except ValueError:
            if (name, text) != ("seed", "none"):
                raise UserError(f"{name} must be a {'whole ' * whole}number, not {text!r}") from None
        value = None if text == "none" else value
        setattr(self, name, value)
        try:
            self.sampling(0)
        except UserError:
            setattr(self, name, old)
            raise

    def sampling(self, turn: int) -> Any:
        """Of the answer number `turn`. UserError for a value out of range."""
        from finetune.inference.sampler import Sampling

        if self.max_tokens < 1:
            raise UserError(f"max_tokens must be at least 1, not {self.max_tokens}")
        seed = secrets.randbits(63) if self.seed is None else self.seed + turn
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        return Sampling(**{name: getattr(self, name) for name in names}, seed=seed)


class Talk:
    """One conversation. `out` gets the answers, `notes` everything else."""

    def __init__(
        self,
        worker: "Worker",
        tokenizer: "Tokenizer",
        stops: set[int],
        settings: Settings,
        system: str | None = None,
        out: Any = None,
        notes: "Console | None" = None,
    ) -> None:
        self.worker, self.tokenizer, self.stops, self.settings, self.system = worker, tokenizer, stops, settings, system
        self.out, self.notes = out or sys.stdout, notes or display.console(stderr=True)
        self.clean = self.out.isatty()
        self.messages: list[dict[str, Any]] = []
        self.turn = 0
        self.check_adapter(settings.adapter)

    def check_adapter(self, name: str | None) -> None:
        if name is not None and name not in self.worker.engine.adapters.digests:
            raise UserError(f"there is no adapter {name}: give it with --adapter {name}=DIR")

    def line(self, text: str) -> bool:
        """Answers a message or obeys a command; False ends the conversation. UserError says what was wrong."""
        if not text.startswith("/"):
            if text.strip():
                self.answer(text)
            return True
        name, _, rest = text.strip().partition(" ")
        rest = rest.strip()
        if name in ("/quit", "/exit"):
            return False
        if name == "/help":
            for command, what in COMMANDS.items():
                display.say(self.notes, f"{command:16}  {what}", indent=" " * 18)
        elif name == "/reset":
            self.messages.clear()
        elif name == "/system":
            self.system = rest or None
            self.messages.clear()
        elif name == "/settings":
            for f in fields(self.settings):
                value = getattr(self.settings, f.name)
                self.note(f"{f.name} {'none' if value is None else value}")
        elif name == "/set":
            key, _, value = rest.partition(" ")
            if not key or not value:
                raise UserError("/set needs a name and a value: /set temperature 0.7")
            if key == "adapter" and value != "none":
                self.check_adapter(value.strip())
            self.settings.set(key, value.strip())
        elif name == "/save":
            self.save(rest)
        else:
            names = [command.split()[0] for command in COMMANDS]
            raise UserError(f"there is no command {name}{nearest(name, names)}; /help lists them")
        return True

    @property
    def conversation(self) -> list[dict[str, Any]]:
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.messages

    def save(self, name: str) -> None:
        path = reading.home_path(name) if name else None
        if path is None or path.suffix != ".jsonl":
            raise UserError("/save needs the name of a file that ends in .jsonl")
        if not self.messages:
            raise UserError("there is nothing to save yet")
        if path.exists():
            raise UserError(f"{path} exists: choose another name")
        with checkpoint.atomic_write(path) as temporary:
            temporary.write_text(json.dumps({"messages": self.conversation}, ensure_ascii=False) + "\n", "utf-8")
        self.note(f"saved in {path}")

    def answer(self, text: str) -> None:
        """Writes the answer to a message while it is made; Ctrl-C ends it, and what there is stays."""
        self.messages.append({"role": "user", "content": text})
        said, reason, began, count = "", "", time.perf_counter(), 0
        try:
            if not self.turn and self.system and (lost := self.tokenizer.renderer.losses(self.conversation)):
                raise UserError(f"the model's chat template does not write {lost[0][1]}")
            for piece, count, reason in self.pieces():  # noqa: B007
                said += piece
                self.write(piece)
        except KeyboardInterrupt:
            reason = "stopped"
        finally:
            if said:
                self.messages.append({"role": "assistant", "content": said})
                self.turn += 1
            else:
                self.messages.pop()
        self.write("\n")
        rate = f"{count / max(time.perf_counter() - began, 1e-9):.1f} tokens/s"
        if reason == "length":
            rate += f", cut after {count} tokens (/set max_tokens)"
        if self.clean:
            self.note(f"stopped, {rate}" if reason == "stopped" else rate)
        elif reason == "length":
            self.note(f"the answer is cut after {count} tokens (--max-tokens)")

    def pieces(self) -> Iterator[tuple[str, int, str]]:
        """New text, the number of tokens so far, and the finish reason once there is one. UserError if the conversation
        does not fit, or if the engine has stopped. Closed early, it ends the answer."""
        from finetune.inference.text import TextStream

        text, _ = self.tokenizer.render_text(self.conversation, add_generation_prompt=True)
        prompt, how = self.tokenizer.encode(text, False), self.settings.sampling(self.turn)
        engine, news = self.worker.engine, queue.SimpleQueue[tuple[str, int, str] | UserError]()
        room = min(engine.model.config.max_length, engine.pool.count * engine.pool.block_size) - len(prompt)
        if room < 1:
            raise UserError(f"the conversation has {len(prompt)} tokens and fills the context: /reset begins another")
        sequences: list[Sequence] = []
        sent = 0

        def hear(sequence: "Sequence") -> None:
            nonlocal sent
            assert sequence.text
            if sequence.finish_reason == "error":
                return news.put(UserError(sequence.error or "the engine has stopped"))
            new, sent = sequence.text.text[sent:], len(sequence.text.text)
            return news.put((new, len(sequence.answer), sequence.finish_reason))

        def start() -> None:
            try:
                sequences.append(
                    engine.add(
                        prompt, how, min(self.settings.max_tokens, room), self.stops,
                        text=TextStream(self.tokenizer), adapter=self.settings.adapter,
                    )
                )  # fmt: skip
                self.worker.listeners[sequences[0]] = hear
            except UserError as error:
                news.put(error)

        if self.worker.failure is not None:
            raise UserError("the engine has stopped")
        self.worker.call(start)
        try:
            while True:
                found = news.get()
                if isinstance(found, UserError):
                    raise found
                yield found
                if found[2]:
                    return
        finally:
            self.worker.call(lambda: self.worker.cancel(sequences))

    def write(self, text: str) -> None:
        self.out.write(text.translate(CONTROLS) if self.clean else text)
        self.out.flush()

    def note(self, text: str) -> None:
        display.say(self.notes, text, "dim")


def typed() -> Iterator[str]:
    """The messages that are typed, several lines of which may end with a backslash. Ctrl-C drops what is typed."""
    with suppress(ImportError):  # not on every system
        import readline  # noqa: F401  (arrow keys and history)
    while True:
        lines: list[str] = []
        try:
            while not lines or lines[-1].endswith("\\"):
                lines.append(input("… " if lines else "> "))
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            print()
            return
        yield "\n".join(line.removesuffix("\\") if i + 1 < len(lines) else line for i, line in enumerate(lines))


def chat(
    source: str, *, system: str | None, whole: bool, console: "Console", settings: dict[str, Any], **engine: Any
) -> int:
    """Talks until the input ends; returns the exit code. From a terminal an error is shown and the conversation goes
    on; from a pipe each line is a message, or with `whole` all of it is one, and an error is raised.

    settings: those of `Settings`. engine: as in `finetune.serve.started`, whose errors this has too.
    """
    from finetune.serve import started

    given = Settings()
    for name, value in settings.items():
        if value is not None:
            given.set(name, str(value))
    worker, tokenizer, name, stops = started(source, console=console, **engine)
    try:
        talk = Talk(worker, tokenizer, stops, given, system, notes=console)
        if sys.stdin.isatty() and not whole:
            display.say(console, f"{name}. {NOTE}")
            converse(talk, typed())
        else:
            if isinstance(sys.stdin, io.TextIOWrapper):
                sys.stdin.reconfigure(encoding="utf-8", errors="replace")
            lines: Iterable[str] = [sys.stdin.read().strip("\n")] if whole else (one.rstrip("\n") for one in sys.stdin)
            for line in lines:
                if whole and not line.strip():
                    raise UserError("--whole: the input is empty")
                if whole:
                    talk.answer(line)
                elif not talk.line(line):
                    break
    finally:
        worker.stop()
        worker.join()
    return 0


def converse(talk: Talk, lines: Iterator[str]) -> None:
    """Lines from a terminal: an error is shown, and the conversation goes on."""
    for line in lines:
        try:
            if not talk.line(line):
                return
        except UserError as error:
            talk.notes.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
