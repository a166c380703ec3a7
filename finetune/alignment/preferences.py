"""Rows that say which answers people prefer: pairs, single judgments, and prompts alone.

    {"prompt": …, "chosen": …, "rejected": …}       texts, messages, or a prompt of messages and answers of text
    {"messages": […], "chosen": …, "rejected": …}   the prompt under the name that chat rows have for it
    {"chosen": …, "rejected": …}                    both whole; what they have in common at the start is the prompt
    {"prompt": …, "completion": …, "label": true}   one answer, and whether it is good (for KTO)
    {"prompt": …, "answer": …}                      a prompt and columns that a reward reads (online methods)

Files are those that finetune.data.rows reads. A prompt of messages is written by the chat template; a text is a user's
message, as in supervised fine-tuning, or with `raw` continued as it stands.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from finetune.data import conversations, rows
from finetune.data.conversations import Conversation, check_message, check_text, kind
from finetune.data.packing import Document
from finetune.errors import UserError
from finetune.runs import reading

if TYPE_CHECKING:
    from finetune.lm.tokenizer import Tokenizer

Text = str | Conversation  # as it stands, or messages for the chat template
Wanted = Literal["pairs", "judged", "prompts"]
TURN = "\n\nAssistant:"
KEYS = ("prompt", "messages", "chosen", "rejected", "completion", "label")


@dataclass(frozen=True)
class Pair:
    """A prompt with a better and a worse answer."""

    prompt: Text
    chosen: Text
    rejected: Text
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Judged:
    """A prompt with one answer, good or bad."""

    prompt: Text
    completion: Text
    good: bool
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    """A prompt that is still to be answered, with what its row holds for the reward."""

    prompt: Text
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Form:
    """A form of rows: in words for people, the keys by which it is found, and what a row becomes."""

    summary: str
    fits: Callable[[dict[str, Any]], bool]
    read: Callable[[dict[str, Any], bool], Pair | Judged | Prompt]


def read(path: str | Path, wanted: Wanted, raw: bool = False) -> list[Any]:
    """The Pairs, Judged or Prompts of a file, or of a folder's files. A pair is two judgments and one prompt where
    these are wanted. UserError names the file, the line, and what is wrong."""
    found: list[Any] = []
    for file in rows.files_of(reading.home_path(path)):
        for where, row in rows.placed(file, every_column=True):
            try:
                found += converted(read_row(row, raw), wanted)
            except ValueError as error:
                raise UserError(f"{file}, {where}: {error}") from None
    if not found:
        raise UserError(f"{path} holds no rows: each must have one of the forms {described()}")
    return found


def read_row(row: Any, raw: bool = False) -> Pair | Judged | Prompt:
    """One parsed row; ValueError says what is wrong with it."""
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a JSON object, not {kind(row)}")
    row = {key: value for key, value in row.items() if value is not None}
    if "prompt" in row and "messages" in row:
        raise ValueError("the row has 'prompt' and 'messages': keep one of them")
    form = next((form for form in FORMS.values() if form.fits(row)), None)
    if form is None:
        keys = ", ".join(map(repr, list(row)[:5])) or "no keys"
        raise ValueError(f"the row has the keys of no known form (found {keys}): they are {described()}")
    return form.read(row, raw)


def described() -> str:
    """The forms, in words."""
    return "; ".join(f"{name} ({form.summary})" for name, form in FORMS.items())


def converted(row: Pair | Judged | Prompt, wanted: Wanted) -> Iterator[Pair | Judged | Prompt]:
    """The row as what is wanted; ValueError if it does not say as much."""
    if wanted == "prompts":
        yield row if isinstance(row, Prompt) else Prompt(row.prompt, row.columns)
    elif isinstance(row, Pair) and wanted == "judged":
        yield Judged(row.prompt, row.chosen, True, row.columns)
        yield Judged(row.prompt, row.rejected, False, row.columns)
    elif isinstance(row, Pair if wanted == "pairs" else Judged):
        yield row
    elif wanted == "pairs":
        raise ValueError("the row needs 'chosen' and 'rejected', an answer each")
    else:
        raise ValueError("the row needs 'completion' and 'label', or 'chosen' and 'rejected'")


# --- The forms


def read_pair(row: dict[str, Any], raw: bool) -> Pair:
    prompt = prompt_of(row, raw)
    chosen, rejected = (answer_of(row, key, prompt) for key in ("chosen", "rejected"))
    return Pair(prompt, *unlike(chosen, rejected), columns_of(row))


def read_whole(row: dict[str, Any], raw: bool) -> Pair:
    """Two conversations whose first messages are the same, or two texts that begin alike: that is the prompt."""
    chosen, rejected = unlike(row["chosen"], row["rejected"])
    if isinstance(chosen, str) and isinstance(rejected, str):
        shared = alike(chosen, rejected)
    elif isinstance(chosen, list) and isinstance(rejected, list):
        shared = in_common(chosen, rejected)
    else:
        raise ValueError("'chosen' and 'rejected' must both be texts or both be lists of messages")
    if not shared:
        raise ValueError("'chosen' and 'rejected' have no beginning in common: the row needs a 'prompt'")
    parts = {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}
    return read_pair(row | parts, raw)


def alike(chosen: str, rejected: str) -> int:
    """Where the prompt of two whole texts ends: behind the last turn mark of HH-RLHF that they share, else in front of
    the white space before the first word that differs."""
    common = chosen[: in_common(chosen, rejected)]
    if TURN in common:
        return common.rindex(TURN) + len(TURN)
    return len(re.sub(r"\s*\S*\Z", "", common))


def in_common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many of the first elements are the same."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def read_judged(row: dict[str, Any], raw: bool) -> Judged:
    prompt, label = prompt_of(row, raw), row["label"]
    if label not in (True, False, "true", "false", "True", "False"):
        raise ValueError(f"'label' is {label!r}: it must be true (a good answer) or false")
    return Judged(prompt, answer_of(row, "completion", prompt), label in (True, "true", "True"), columns_of(row))


def read_prompt(row: dict[str, Any], raw: bool) -> Prompt:
    return Prompt(prompt_of(row, raw), columns_of(row))


def has(*keys: str) -> Callable[[dict[str, Any]], bool]:
    return lambda row: all(key in row for key in keys)


FORMS = {
    "pair": Form("prompt, chosen and rejected", has("prompt", "chosen", "rejected"), read_pair),
    "messages-pair": Form("messages, chosen and rejected", has("messages", "chosen", "rejected"), read_pair),
    "whole": Form("chosen and rejected, both with their prompt", has("chosen", "rejected"), read_whole),
    "judged": Form("prompt, completion and label", has("completion", "label"), read_judged),
    "prompt": Form("prompt or messages alone", lambda row: "prompt" in row or "messages" in row, read_prompt),
}


# --- Their contents


def prompt_of(row: dict[str, Any], raw: bool) -> Text:
    """The checked prompt of a row."""
    key = "prompt" if "prompt" in row else "messages"
    given = row.get(key)
    if given is None:
        raise ValueError("the row needs a 'prompt'")
    if (isinstance(given, str) and key == "messages") or (isinstance(given, str) and given.lstrip().startswith("[{")):
        given = conversations.parsed(repr(key), given)  # a cell of a table
    if isinstance(given, str):
        check_text(f"'{key}'", given)
        if not given.strip():
            raise ValueError(f"'{key}' is empty")
        return given if raw else [{"role": "user", "content": given}]
    if raw:
        raise ValueError(f"'{key}' must be a text, as --raw continues texts, not {kind(given)}")
    messages = checked(key, given)
    if messages[-1]["role"] == "assistant":
        raise ValueError(f"'{key}' ends with an answer: it must end with what is to be answered")
    return messages


def answer_of(row: dict[str, Any], key: str, prompt: Text) -> Text:
    """The checked answer under a key: a text where the prompt is one, else messages of which the last is the
    assistant's."""
    given = row[key]
    if isinstance(given, str) and not isinstance(prompt, str) and given.lstrip().startswith('[{"'):
        given = conversations.parsed(repr(key), given)
    if isinstance(given, str):
        check_text(f"'{key}'", given)
        if not given.strip():
            raise ValueError(f"'{key}' is empty: there is no answer")
        return given if isinstance(prompt, str) else [{"role": "assistant", "content": given}]
    if isinstance(prompt, str):
        raise ValueError(f"'{key}' must be a text, as the prompt is, not {kind(given)}")
    messages = checked(key, [given] if isinstance(given, dict) else given)
    if len(messages) > len(prompt) and messages[: len(prompt)] == prompt:
        messages = messages[len(prompt) :]  # UltraFeedback repeats the prompt in both answers
    if messages[-1]["role"] != "assistant" or any(m["role"] in ("system", "user") for m in messages):
        raise ValueError(f"'{key}' must be the assistant's messages (and tools' between them)")
    return messages


def checked(key: str, messages: Any) -> Conversation:
    """Messages with the names that chat templates know; ValueError says which one is wrong."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"'{key}' must be a text or a list of messages, not {kind(messages)}")
    found = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"message {i} of '{key}' must be an object with role and content, not {kind(message)}")
        try:
            found.append(check_message(i, {name: value for name, value in message.items() if value is not None}))
        except ValueError as error:
            raise ValueError(f"'{key}': {error}") from None
    return found


def unlike(chosen: Any, rejected: Any) -> tuple[Any, Any]:
    if chosen == rejected:
        raise ValueError("'chosen' and 'rejected' are the same: the row says nothing")
    return chosen, rejected


def columns_of(row: dict[str, Any]) -> dict[str, Any]:
    """What the row holds besides."""
    return {key: value for key, value in row.items() if key not in KEYS}


def shown(prompt: Text) -> str:
    """A prompt for people and rewards: the text, or the last message."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def split(pairs: Sequence[Pair], name: str | Path) -> tuple[list[Pair], list[Pair]]:
    """(pairs to train on, held-out ones): those of a twentieth of the prompts are held out, always the same. UserError
    names the file where all pairs have one prompt."""
    keyed = [(zlib.crc32(json.dumps(pair.prompt).encode()), pair) for pair in pairs]
    keys = sorted({key for key, _ in keyed})
    if len(keys) < 2:
        raise UserError(f"{name} has one prompt only: pairs of a second one are needed to evaluate on")
    held_out = set(keys[: max(1, len(keys) // 20)])
    return [pair for key, pair in keyed if key not in held_out], [pair for key, pair in keyed if key in held_out]


# --- Tokens


def document(tokenizer: Tokenizer, prompt: Text, answer: Text) -> Document:
    """A prompt and its answer in tokens, of which those of the answer and its end are learned."""
    if isinstance(prompt, str):
        assert isinstance(answer, str)
        before = prompt_ids(tokenizer, prompt)
        if tokenizer.eos_id is None:
            raise UserError("the model's tokenizer has no end token, with which answers of plain text end")
        after = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_id]
        return Document(before + after, [0] * len(before) + [1] * len(after))
    assert not isinstance(answer, str)
    row = [m | {"weight": 0} if m["role"] == "assistant" else m for m in prompt] + answer
    return Document(*tokenizer.render(row), row)


def prompt_ids(tokenizer: Tokenizer, prompt: Text) -> list[int]:
    """The tokens that a model is to continue."""
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    return tokenizer.render(prompt, add_generation_prompt=True)[0]


def documents(
    tokenizer: Tokenizer, pairs: Sequence[Pair], max_length: int, say: Callable[[str], None] = lambda _: None
) -> list[tuple[Document, Document]]:
    """(chosen, rejected) of each pair. One with an answer that does not fit is skipped, never cut: the two would be cut
    at different places, and the end of one would be learned. `say` is told how many. UserError if none fits."""
    found = [(document(tokenizer, p.prompt, p.chosen), document(tokenizer, p.prompt, p.rejected)) for p in pairs]
    kept = [pair for pair in found if max(map(len, pair)) <= max_length]
    if len(kept) < len(found):
        say(f"{len(found) - len(kept):,} of {len(found):,} pairs are longer than {max_length} tokens and skipped")
    if not kept:
        raise UserError(f"no pair fits {max_length} tokens: raise --max-length")
    return kept
