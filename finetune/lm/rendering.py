"""Conversations as text: what a chat template writes, which characters the assistant has to produce, and what is lost.

The generation markers of a template tell which characters are the assistant's. Without markers an answer is what the
text with it has in addition to the text that prompts for it. Many templates write an earlier answer otherwise once
others follow (Qwen 3 omits its reasoning): such an answer is learned in a text that ends with it, as the model sees it
when it gives it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from finetune.errors import UserError
from finetune.lm.chat_template import ChatTemplate

# What a conversation holds as a whole: its first message has it.
CONTEXT = ("tools", "documents", "chat_template_kwargs", "train_on")
REASONING = ("reasoning_content", "thinking", "reasoning")  # three names for the same
# What is to be learned, or what it is learned from: a template that does not write it would teach something else.
MEANT = ("tool_calls", *REASONING)
Message = dict[str, Any]
Span = tuple[int, int]


@dataclass(frozen=True)
class Written:
    """A rendered conversation: its text, the characters to be learned, and how many of the messages it holds."""

    text: str
    spans: list[Span]
    messages: int


@dataclass
class Renderer:
    """A chat template with the special tokens that it may write. `added`: the texts of all added tokens, which can end
    an answer."""

    template: ChatTemplate
    specials: dict[str, str]
    added: tuple[str, ...] = ()
    unwritten: set[str] = field(default_factory=set)  # keys that the template does not write and nobody learns from
    straddled: int = 0  # answers whose first token begins in the text that prompts for them
    texts: bool = False  # whether the template expects the arguments of a call as JSON text
    _checked: set[tuple[str, str]] = field(default_factory=set)

    def text(self, messages: Sequence[Message], prompt: bool = False) -> tuple[str, list[Span]]:
        """The conversation as text, and the character spans between generation markers."""
        return self._render(*parted(messages), prompt)

    def _render(self, messages: list[Message], context: dict[str, Any], prompt: bool) -> tuple[str, list[Span]]:
        for i, message in enumerate(messages):
            content = message.get("content")
            fine = isinstance(content, str) or (content is None and message.get("tool_calls"))
            if not isinstance(message.get("role"), str) or not fine:
                raise UserError(f"message {i} needs a text for 'role' and for 'content', found {message!r}")
        values = {"tools": None, "documents": None} | {k: v for k, v in context.items() if k != "train_on"}
        values = self.specials | values.pop("chat_template_kwargs", {}) | values

        def write(texts: bool) -> tuple[str, list[Span]]:
            shown = [named(message, texts) for message in messages]
            return self.template.render(messages=shown, add_generation_prompt=prompt, **values)

        calls = [call for message in messages for call in message.get("tool_calls", ())]
        if not calls or self.texts:
            return write(self.texts)
        # Most templates write the arguments of a call with `tojson`, others (DeepSeek's) add them to a text.
        refused = None
        try:
            found = write(False)
            if not any(str(a) in found[0] for call in calls if (a := arguments(call)) and isinstance(a, dict)):
                return found
        except UserError as error:
            refused = error
        try:
            found = write(True)
        except UserError:
            raise refused or UserError("the chat template writes the arguments of a call as Python's text") from None
        self.texts = True
        return found

    def documents(self, messages: Sequence[Message]) -> list[Written]:
        """The texts in which the answers of a conversation are learned: one, or several where the template writes an
        answer otherwise once others follow. UserError if which characters are the assistant's cannot be told."""
        text, marked = self.text(messages)
        weights = [message.get("weight", 1) for message in messages]
        if messages and messages[0].get("train_on") == "everything":
            kept = [(0, len(text))]
            if 0 in weights:
                kept = outside(self.answers(messages, text), weights, text)
            return [Written(text, kept, len(messages))]
        if self.template.marked:
            said = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
            full = [i for i in said if any(messages[i].get(key) for key in ("content", *MEANT))]
            if len(marked) < len(full):
                part = f"{len(marked)} of {len(full)}" if marked else "nothing"
                raise UserError(f"{part} of the answers stands between the chat template's {{% generation %}} markers")
            if len(marked) == len(said):
                marked = [span for i, span in zip(said, marked, strict=True) if weights[i] != 0]
            elif 0 in weights:
                turns = self.answers(messages, text)
                foreign = [i for i, (whole, _) in turns.items() if whole != text]
                if foreign:
                    raise cannot_be_told(
                        foreign[0], "the chat template writes it otherwise once other messages follow, and a "
                        "weight of 0 needs the place of every answer"
                    )  # fmt: skip
                own = [span for i, (_, span) in turns.items() if weights[i] != 0]
                marked = [span for span in marked if any(overlap(span, other) for other in own)]
            return [Written(text, marked, len(messages))]
        turns = self.answers(messages, text)
        found: dict[tuple[str, int], list[Span]] = {}
        for i, (whole, span) in turns.items():
            if weights[i] != 0:
                found.setdefault((whole, len(messages) if whole == text else i + 1), []).append(span)
        return [Written(whole, spans, count) for (whole, count), spans in found.items()] or [
            Written(text, [], len(messages))
        ]

    def answers(self, messages: Sequence[Message], text: str) -> dict[int, tuple[str, Span]]:
        """For each message of the assistant a text that holds it as the model gives it, and its characters there: the
        whole conversation's `text`, that of a later answer, or the text that ends with it."""
        plain, context = parted(messages)
        found: dict[int, tuple[str, Span]] = {}
        wholes = [text]
        for i in reversed(range(len(plain))):
            if plain[i]["role"] != "assistant":
                continue
            before = self._render(plain[:i], context, True)[0]
            after = text if i + 1 == len(plain) else self._render(plain[: i + 1], context, False)[0]
            if not after.startswith(before):
                same = next(at for at, letter in enumerate(before) if after[at : at + 1] != letter)
                raise cannot_be_told(
                    i, f"the chat template asks for an answer with {before[same:][:40]!r}, but writes "
                    f"{after[same:][:40]!r} where there is one"
                )  # fmt: skip
            end = self.end_of(after, len(before), partial(self.followed, plain, context, i))
            if end == len(before):
                raise cannot_be_told(i, "the chat template writes nothing where the answer is")
            whole = next((w for w in wholes if w.startswith(after[:end])), after)
            if whole is after:
                wholes.append(after)
            found[i] = whole, (len(before), end)
        return dict(sorted(found.items()))

    def followed(self, plain: list[Message], context: dict[str, Any], i: int) -> str:
        """The conversation up to answer `i` and one more question."""
        try:
            return self._render([*plain[: i + 1], {"role": "user", "content": "x"}], context, False)[0]
        except UserError:
            return ""

    def end_of(self, after: str, start: int, followed: Callable[[], str]) -> int:
        """Where the answer that begins at `start` ends: behind its end token, without white space and without what the
        template writes only where a conversation ends (Phi 3: a second end token)."""
        ends, rest = [], after.rstrip()
        while len(rest) > start and (token := next(filter(rest.endswith, self.added), "")):
            ends.append(len(rest))
            rest = rest.removesuffix(token).rstrip()
        if len(ends) < 2:
            return ends[0] if ends else len(after)
        longer = followed()
        return next((end for end in ends if longer.startswith(after[:end])), ends[0])

    # --- What is lost

    def losses(self, messages: Sequence[Message]) -> list[tuple[str, str]]:
        """What the template does not write of what is to be learned, or of what it is learned from: (kind of loss, its
        place), in words. Other keys that it does not write are added to `unwritten`."""
        plain, context = parted(messages)
        text = self._render(plain, context, False)[0]
        everything = context.get("train_on") == "everything"

        def writes(changed: list[Message], values: dict[str, Any], whole: str) -> bool:
            try:
                return self._render(changed, values, False)[0] != whole
            except UserError:  # it cannot do without
                return True

        found = [
            (f"the row's {key!r}", f"the row's {key!r}")
            for key in ("tools", "documents")
            if context.get(key) and not writes(plain, {k: v for k, v in context.items() if k != key}, text)
        ]
        for i, message in enumerate(plain):
            role = message["role"]
            for key in message:
                gone = {k: v for k, v in message.items() if k != key and not (key in REASONING and k in REASONING)}
                if key in MEANT:
                    if not message[key] or writes([*plain[:i], gone, *plain[i + 1 :]], context, text):
                        continue
                    # An answer with a text that ends with it is learned there.
                    ending = None if self.template.marked or everything or message.get("weight") == 0 else i + 1
                    if ending and ending < len(plain) and role == "assistant":
                        whole = self._render(plain[:ending], context, False)[0]
                        if writes([*plain[:i], gone], context, whole):
                            continue
                    if message.get("weight") == 0 and key in REASONING:
                        continue  # not learned, and not seen by the model afterwards either
                    found.append((repr(key), f"{key!r} of message {i} ({role})"))
                elif key not in ("role", "content", "weight") and (role, key) not in self._checked:
                    self._checked.add((role, key))
                    if not writes([*plain[:i], gone, *plain[i + 1 :]], context, text):
                        self.unwritten.add(key)
            if role not in ("user", "assistant") and (role, "content") not in self._checked:
                changed = message | {"content": f"{message.get('content')}."}
                if writes([*plain[:i], changed, *plain[i + 1 :]], context, text):
                    self._checked.add((role, "content"))
                else:
                    found.append((f"messages of the role {role!r}", f"message {i}, whose role is {role!r}"))
        return found


def cannot_be_told(i: int, why: str) -> UserError:
    return UserError(
        f"which tokens of message {i} are the assistant's cannot be told: {why}; give --template one with "
        "{% generation %} markers"
    )


def outside(turns: dict[int, tuple[str, Span]], weights: Sequence[int], text: str) -> list[Span]:
    """The characters of the text except the answers of weight 0."""
    kept, place = [], 0
    for i, (whole, (start, stop)) in turns.items():
        if weights[i] == 0:
            if whole != text:
                raise cannot_be_told(i, "the chat template writes it otherwise once other messages follow")
            kept.append((place, start))
            place = stop
    return [*kept, (place, len(text))]


def parted(messages: Sequence[Message]) -> tuple[list[Message], dict[str, Any]]:
    """The messages without what the first one holds for the whole conversation, and that."""
    context = {key: messages[0][key] for key in CONTEXT if messages and key in messages[0]}
    return [{k: v for k, v in message.items() if k not in context} for message in messages], context


def named(message: Message, texts: bool = False) -> Message:
    """A message as transformers shows it to a template: without empty keys, its reasoning under the usual names.
    `texts`: the arguments of its calls as JSON text."""
    message = {key: value for key, value in message.items() if value is not None}
    if texts and message.get("tool_calls"):
        message["tool_calls"] = [with_text(call) for call in message["tool_calls"]]
    reasoning = next((message[key] for key in REASONING if key in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def arguments(call: dict[str, Any]) -> Any:
    """The arguments of a call."""
    function = call.get("function", call)
    return function.get("arguments") if isinstance(function, dict) else None


def with_text(call: dict[str, Any]) -> dict[str, Any]:
    """A call whose arguments are JSON text."""
    text = json.dumps(given, ensure_ascii=False) if isinstance(given := arguments(call), dict) else given
    return (
        call | {"function": call["function"] | {"arguments": text}}
        if "function" in call
        else call | {"arguments": text}
    )


def overlap(one: Span, other: Span) -> bool:
    """Whether two spans share a character."""
    return one[0] < other[1] and other[0] < one[1]
