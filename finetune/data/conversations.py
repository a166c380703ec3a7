"""Conversations from JSONL files, checked.

A conversation is a list of {"role": "system" | "user" | "assistant" | "tool", "content": text}. Messages keep their
other keys (`tool_calls`, `reasoning_content`, `weight`, …), which the model's chat template may write; what a row holds
for the whole conversation (`tools`, `documents`, `chat_template_kwargs`) is in its first message.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.lm.tokenizer import CONTEXT, REASONING
from finetune.runs import reading

Conversation = list[dict[str, Any]]

ROLES = ("system", "user", "assistant", "tool")
# Keys that change what is to be learned, in ways that no chat template is told of.
UNUSED = ("functions", "function_call", "images", "videos", "audios", "weight")
LIMIT = 4 << 30  # bytes of a JSONL file


def read_jsonl(path: str | Path) -> list[Conversation]:
    """The conversations of a JSONL file: rows {"messages": […]} or {"prompt": text, "completion": text}.

    Other keys of a row are ignored, blank lines are skipped. UserError names the file, the line and what is wrong.
    """
    path = reading.home_path(path)
    raw = reading.file_bytes(path, LIMIT)
    rows = []
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(read_row(json.loads(line.decode("utf-8"))))
        except UnicodeDecodeError as error:
            raise UserError(f"{path}, line {number}: byte {error.start + 1} is not UTF-8: save it as UTF-8") from None
        except json.JSONDecodeError as error:
            where = f"{error.msg} at column {error.colno}"
            raise UserError(f"{path}, line {number}: not JSON ({where}): each line must be one object") from None
        except RecursionError:
            raise UserError(f"{path}, line {number}: nested too deeply: each line must be one object") from None
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
    if not rows:
        raise UserError(f"{path} holds no rows: each line must be an object with messages, or prompt and completion")
    return rows


def read_row(row: Any) -> Conversation:
    """One parsed row as a conversation; ValueError says what is wrong with it."""
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a JSON object, not {kind(row)}")
    if "messages" in row:
        messages = check_messages(row["messages"])
    else:
        missing = [key for key in ("prompt", "completion") if key not in row]
        if missing:
            found = ", ".join(map(repr, list(row)[:5])) or "no keys"
            wanted = "'messages', or 'prompt' and 'completion'" if len(missing) == 2 else f"'{missing[0]}' too"
            raise ValueError(f"the row needs {wanted} (found {found})")
        for key in ("prompt", "completion"):
            check_text(f"'{key}'", row[key])
        if not row["completion"].strip():
            raise ValueError("'completion' is empty: there is nothing to learn")
        messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
    messages[0] |= check_context(row)
    return messages


def check_context(row: dict[str, Any]) -> dict[str, Any]:
    """What the row holds for the whole conversation."""
    for key in UNUSED:
        if row.get(key) not in (None, [], {}, 1):
            raise ValueError(f"the row's {key!r} is not supported: remove it, or the row")
    context = {key: row[key] for key in CONTEXT if row.get(key)}
    for key in ("tools", "documents"):
        values = context.get(key, [])
        if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            raise ValueError(f"the row's {key!r} must be a list of objects")
    if not isinstance(kwargs := context.get("chat_template_kwargs", {}), dict):
        raise ValueError(f"the row's 'chat_template_kwargs' must be an object, not {kind(kwargs)}")
    check_encodable("the row", context)
    return context


def check_messages(messages: Any) -> Conversation:
    """`messages` without empty keys; ValueError says which one is wrong."""
    if not isinstance(messages, list) or not messages:
        raise ValueError("'messages' must be a list of at least one message")
    found = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"message {i} must be an object with role and content, not {kind(message)}")
        if message.get("role") not in ROLES:
            raise ValueError(f"message {i} has the role {message.get('role')!r}: it must be one of {', '.join(ROLES)}")
        message = {key: value for key, value in message.items() if value is not None}
        calls, weight = message.get("tool_calls", []), message.get("weight", 1)
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise ValueError(f"the tool_calls of message {i} must be a list of objects")
        for key in ("function_call", *CONTEXT):
            if key in message:
                where = "put it next to 'messages'" if key in CONTEXT else "write it as 'tool_calls'"
                raise ValueError(f"message {i} has {key!r}: {where}")
        if isinstance(weight, bool) or weight not in (0, 1) or ("weight" in message and message["role"] != "assistant"):
            raise ValueError(f"message {i} has the weight {weight!r}: it must be 0 or 1, of an assistant's message")
        if not calls or "content" in message:
            check_text(f"the content of message {i} ({message['role']})", message.get("content"))
        for key in REASONING:
            if key in message:
                check_text(f"the {key} of message {i}", message[key])
        check_encodable(f"message {i}", message)
        if message["role"] == "system" and i:
            raise ValueError(f"message {i} is a system message: only the first may be one")
        found.append(message)
    if not any(learnable(message) for message in found):
        raise ValueError("no assistant message with a text to learn: there is nothing to learn")
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


def kind(value: Any) -> str:
    """The type of a JSON value, in words."""
    words = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a number"}
    return words.get(type(value), "nothing" if value is None else "a number")
