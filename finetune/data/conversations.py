"""Conversations from rows of the forms that people have, checked.

A conversation is a list of {"role": "system" | "user" | "assistant" | "tool", "content": text}. Messages keep their
other keys (`tool_calls`, `reasoning_content`, `weight`, …), which the model's chat template may write; what a row holds
for the whole conversation (`tools`, `documents`, `chat_template_kwargs`, `train_on`) is in its first message.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from finetune.lm.rendering import CONTEXT, REASONING

Conversation = list[dict[str, Any]]

# The roles of a conversation, by the names that rows have for them.
ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bard": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool",
    "function_call": "assistant",  # LLaMA-Factory's: the text is the calls as JSON
}  # fmt: skip
# Keys that change what is to be learned, in ways that no chat template is told of.
UNUSED = ("functions", "function_call", "image", "images", "videos", "audios", "weight")
PARSED = ("messages", "conversations", "conversation", "history", "tools", "documents", "chat_template_kwargs")
# What is learned of a row: --train-on, or the row's key `train_on`.
TRAIN_ON = {
    "answers": "every answer of the assistant whose weight is not 0",
    "last": "the last answer only",
    "everything": "every token: questions, system message and the template's own text too",
}


@dataclass(frozen=True)
class Form:
    """A form of rows: the keys by which it is found, in words for people, and how a row becomes messages."""

    summary: str
    fits: Callable[[dict[str, Any]], bool]
    read: Callable[[dict[str, Any]], Any]


def read_row(row: Any, form: str | None = None, train_on: str = "answers") -> Conversation:
    """One parsed row as a conversation; ValueError says what is wrong with it. `form`: a name of FORMS, or None to find
    it by the row's keys."""
    return read_any(row, form, train_on)[1]


def read_any(row: Any, form: str | None = None, train_on: str = "answers") -> tuple[str, Conversation]:
    """(name of the form, conversation) of one parsed row, as `read_row`."""
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a JSON object, not {kind(row)}")
    row = row | {key: parsed(repr(key), row[key]) for key in PARSED if isinstance(row.get(key), str)}
    name = form or form_of(row)
    messages = check_messages(with_system(row, FORMS[name].read(row)))
    wanted = row.get("train_on") or train_on
    if wanted not in TRAIN_ON:
        raise ValueError(f"the row's 'train_on' is {wanted!r}: it must be one of {', '.join(TRAIN_ON)}")
    if wanted == "last":
        answers = [i for i, message in enumerate(messages) if learnable(message)]
        for i in answers[:-1]:
            messages[i]["weight"] = 0
    messages[0] |= check_context(row) | ({"train_on": wanted} if wanted == "everything" else {})
    return name, messages


def form_of(row: dict[str, Any]) -> str:
    """The name of the form that a row has; ValueError if it has none, or two."""
    found = [name for name, form in FORMS.items() if form.fits(row)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"the row has the keys of the forms {' and '.join(found)}: choose one with --form")
    keys = ", ".join(map(repr, list(row)[:5])) or "no keys"
    for pair in (("prompt", "completion"), ("instruction", "output")):
        missing = [key for key in pair if key not in row]
        if len(missing) == 1:
            raise ValueError(f"the row needs '{missing[0]}' too (found {keys})")
    raise ValueError(f"the row has the keys of no known form (found {keys}): they are {described()}")


def described() -> str:
    """The forms, in words."""
    return "; ".join(f"{name} ({form.summary})" for name, form in FORMS.items())


def parsed(name: str, text: str) -> Any:
    """The JSON value that a text holds, as in a cell of a table; None if the cell is empty."""
    if not text.strip():
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{name} is a text that is not JSON") from None


# --- The forms


def read_list(row: dict[str, Any]) -> Any:
    """The messages of a row that holds them as one list."""
    return next((row[key] for key in ("messages", "conversations", "conversation") if row.get(key) is not None), None)


def read_texts(row: dict[str, Any]) -> Conversation:
    """A question and its answer as two texts."""
    return [
        {"role": "user", "content": text_of(row, "prompt")},
        {"role": "assistant", "content": text_of(row, "completion", learned=True)},
    ]


def read_parts(row: dict[str, Any]) -> list[Any]:
    """TRL's conversational prompt and completion; what the assistant says in the prompt is not learned."""
    parts: list[list[Any]] = []
    for key in ("prompt", "completion"):
        part = parsed(repr(key), row[key]) if isinstance(row.get(key), str) else row.get(key)
        if not isinstance(part, list) or not part:
            raise ValueError(f"{key!r} must be a list of messages, as the other one is, not {kind(part)}")
        parts.append(part)
    asked = [m | {"weight": 0} if isinstance(m, dict) and said_by(m) == "assistant" else m for m in parts[0]]
    return asked + parts[1]


def read_alpaca(row: dict[str, Any]) -> Conversation:
    """Alpaca's instruction, with its input on the next line; `history` holds earlier pairs of question and answer."""
    found: Conversation = []
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise ValueError("'history' must be a list of [question, answer]")
    for asked, answered in history:
        found += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    asked = "\n".join(text for key in ("instruction", "input") if (text := text_of(row, key, optional=True)).strip())
    if not asked:
        raise ValueError("'instruction' and 'input' are empty: there is no question")
    answer = text_of(row, "output", learned=True)
    return [*found, {"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def text_of(row: dict[str, Any], key: str, optional: bool = False, learned: bool = False) -> str:
    """The text under a key; ValueError if it is none, or empty though it is to be learned."""
    text = row.get(key)
    if optional and text is None:
        return ""
    check_text(f"'{key}'", text)
    assert isinstance(text, str)
    if learned and not text.strip():
        raise ValueError(f"'{key}' is empty: there is nothing to learn")
    return text


FORMS = {
    "messages": Form("messages: a list of role and content", lambda row: "messages" in row, read_list),
    "sharegpt": Form(
        "conversations: a list of from and value", lambda row: bool({"conversations", "conversation"} & row.keys()),
        read_list,
    ),
    "alpaca": Form(
        "instruction, input and output", lambda row: {"instruction", "output"} <= row.keys(), read_alpaca
    ),
    "prompt": Form(
        "prompt and completion: texts",
        lambda row: {"prompt", "completion"} <= row.keys() and not isinstance(row["prompt"], list), read_texts,
    ),
    "prompt-messages": Form(
        "prompt and completion: lists of messages",
        lambda row: {"prompt", "completion"} <= row.keys() and isinstance(row["prompt"], list), read_parts,
    ),
}  # fmt: skip


# --- Their contents


def with_system(row: dict[str, Any], messages: Any) -> Any:
    """The messages after the system message that the row holds under a key, if it does."""
    system = row.get("system")
    if system is None or not isinstance(messages, list):
        return messages
    check_text("'system'", system)
    if not system.strip():
        return messages
    first = messages[0] if messages else None
    if isinstance(first, dict) and said_by(first) == "system":
        raise ValueError("the row has 'system' and a system message: keep one of them")
    return [{"role": "system", "content": system}, *messages]


def check_context(row: dict[str, Any]) -> dict[str, Any]:
    """What the row holds for the whole conversation."""
    for key in UNUSED:
        if row.get(key) not in (None, [], {}, 1, ""):
            raise ValueError(f"the row's {key!r} is not supported: remove it, or the row")
    context = {key: row[key] for key in CONTEXT if key != "train_on" and row.get(key)}
    for key in ("tools", "documents"):
        values = context.get(key, [])
        if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            raise ValueError(f"the row's {key!r} must be a list of objects")
    if not isinstance(kwargs := context.get("chat_template_kwargs", {}), dict):
        raise ValueError(f"the row's 'chat_template_kwargs' must be an object, not {kind(kwargs)}")
    check_encodable("the row", context)
    return context


def said_by(message: dict[str, Any]) -> str | None:
    """Whose message it is, in our words; None for an unknown role."""
    role = message.get("role", message.get("from"))
    return ROLES.get(role) if isinstance(role, str) else None


def check_messages(messages: Any) -> Conversation:
    """`messages` with our names and without empty keys; ValueError says which one is wrong."""
    if not isinstance(messages, list) or not messages:
        raise ValueError("'messages' must be a list of at least one message")
    found = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"message {i} must be an object with role and content, not {kind(message)}")
        message = check_message(i, {key: value for key, value in message.items() if value is not None})
        if message["role"] == "system" and i:
            raise ValueError(f"message {i} is a system message: only the first may be one")
        found.append(message)
    if not any(learnable(message) for message in found):
        raise ValueError("no assistant message with a text to learn: there is nothing to learn")
    return found


def check_message(i: int, message: dict[str, Any]) -> dict[str, Any]:
    """Message `i` with our names for its keys and role; ValueError if it is wrong."""
    given = message.get("role", message.get("from"))
    role = said_by(message)
    if role is None:
        raise ValueError(f"message {i} has the role {given!r}: it must be one of {', '.join(ROLES)}")
    content = message.get("content", message.get("value"))
    weight = check_weight(i, role, message)
    rest = {k: v for k, v in message.items() if k not in ("role", "from", "content", "value", "train", "weight")}
    message = {"role": role, "content": whole_text(i, content)} | rest
    if given == "function_call":
        message |= {"content": None, "tool_calls": message["content"]}
    for key in ("function_call", "train_detail", *CONTEXT):
        if key in rest:
            fixes = {"function_call": "write it as 'tool_calls'", "train_detail": "use the 'weight' of a message"}
            fix = fixes.get(key, "put it next to 'messages'")
            raise ValueError(f"message {i} has {key!r}: {fix}")
    message |= weight
    if "tool_calls" in message:
        message["tool_calls"] = check_calls(i, message["tool_calls"])
    message = {key: value for key, value in message.items() if value is not None}
    if not message.get("tool_calls") or "content" in message:
        check_text(f"the content of message {i} ({role})", message.get("content"))
    for key in REASONING:
        if key in message:
            check_text(f"the {key} of message {i}", message[key])
    check_encodable(f"message {i}", message)
    return message


def whole_text(i: int, content: Any) -> Any:
    """The content as one text where it is a list of text parts."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            named = part.get("type") if isinstance(part, dict) else kind(part)
            raise ValueError(f"the content of message {i} has a part of type {named!r}: only text is supported")
    return "".join(part["text"] for part in content)


def check_weight(i: int, role: str, message: dict[str, Any]) -> dict[str, int]:
    """The weight of a message where it has one, as `weight` (0 or 1) or as axolotl's `train` (true or false)."""
    weight, train = message.get("weight"), message.get("train")
    if train is not None and weight is None:
        if not isinstance(train, bool):
            raise ValueError(f"message {i} has the value {train!r} of 'train': it must be true or false")
        weight = int(train)
    if weight is None or (weight == 0 and role != "assistant" and not isinstance(weight, bool)):
        return {}  # only answers are learned
    if isinstance(weight, bool) or weight not in (0, 1) or role != "assistant":
        raise ValueError(f"message {i} has the weight {weight!r}: it must be 0 or 1, of an assistant's message")
    return {"weight": int(weight)}


def check_calls(i: int, calls: Any) -> list[dict[str, Any]] | None:
    """The tool calls of message `i` as {"type": "function", "function": {"name", "arguments": object}}, whichever of
    the usual spellings they have."""
    if isinstance(calls, str):
        calls = parsed(f"the tool_calls of message {i}", calls)
        calls = [calls] if isinstance(calls, dict) else calls
    if calls is None:
        return None
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ValueError(f"the tool_calls of message {i} must be a list of objects")
    found = []
    for call in calls:
        call = call if "function" in call else {"type": "function", "function": call}
        function = call["function"]
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"a call in the tool_calls of message {i} has no name of a function")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = parsed(f"the arguments of {function['name']!r} in message {i}", arguments) or {}
        if not isinstance(arguments, dict):
            raise ValueError(f"the arguments of {function['name']!r} in message {i} must be an object or its JSON")
        found.append(call | {"function": function | {"arguments": arguments}})
    return found


def learnable(message: dict[str, Any]) -> bool:
    """Whether it is an answer with content and a weight other than 0."""
    says = message.get("content", "").strip() or message.get("tool_calls") or any(map(message.get, REASONING))
    return message["role"] == "assistant" and bool(says) and message.get("weight") != 0


def exchanges(row: Conversation) -> list[int]:
    """The messages of the assistant that answer another one with a text, the last first."""
    return [
        i for i in reversed(range(1, len(row)))
        if learnable(row[i]) and row[i].get("content") and row[i - 1]["role"] in ("user", "tool")
    ]  # fmt: skip


def with_answer_of(row: Conversation, other: Conversation) -> Conversation:
    """The row up to its last answer, which is replaced by the last answer of `other`."""
    ends = [max(i for i, message in enumerate(one) if message["role"] == "assistant") for one in (row, other)]
    answer = {key: value for key, value in other[ends[1]].items() if key not in CONTEXT}
    context = {key: row[0][key] for key in CONTEXT if key in row[0]} if ends[0] == 0 else {}
    return [*row[: ends[0]], answer | context]


def check_text(name: str, value: Any) -> None:
    """ValueError unless it is a text that UTF-8 can hold."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a text, not {kind(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} has half of a surrogate pair as its character {error.start + 1}") from None


def check_encodable(name: str, value: Any) -> None:
    """ValueError if a text in it cannot be encoded as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{name} has half of a surrogate pair in it") from None
    except (TypeError, ValueError):
        raise ValueError(f"{name} holds a value that is not one of JSON") from None


def kind(value: Any) -> str:
    """The type of a JSON value, in words."""
    words = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a number"}
    return words.get(type(value), "nothing" if value is None else "a number")
