"""Rows of conversations with images, from JSON Lines or a JSON list: `image` or `images` (paths, relative to the file)
next to the messages, whose text has `<image>` where each is shown. All forms of `finetune.data.conversations` are read;
LLaVA's files (`conversations` of `from` and `value`) are one of them.

A content may also be a list of parts, {"type": "image"} (with its path under "image", or the next of the row's) and
{"type": "text", "text": …}. Text of such a part is text, also where it says `<image>`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.data import conversations, rows
from finetune.data.conversations import Conversation, kind
from finetune.data.image_files import open_image
from finetune.errors import UserError
from finetune.runs import reading

if TYPE_CHECKING:
    from PIL.Image import Image

PLACEHOLDER = "<image>"
TYPED = "\ufdd0"  # stands for a placeholder that is text while a row is read; Unicode assigns it to no character
ENDINGS = (".jsonl", ".ndjson", ".json")


@dataclass(frozen=True)
class ImageRow:
    """A conversation and its images.

    messages: `content` is a list of {"type": "text", "text": …} and {"type": "image"}
    images: the files of the image parts, in their order
    place: the file and line of the row, for messages about it
    """

    messages: Conversation
    images: tuple[Path, ...]
    place: str

    def open(self) -> list[Image]:
        """The decoded images. UserError names the row and the file."""
        return [opened(self.place, file) for file in self.images]


def opened(place: str, file: Path) -> Image:
    """`open_image`, with the place of the row in its errors."""
    try:
        return open_image(file)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def read(path: str | Path, train_on: str = "answers") -> list[ImageRow]:
    """The rows of a file, or of a folder's files in the order of their names. Every image is decoded once, to find the
    broken ones; none is kept. UserError names the file, the line and what is wrong."""
    source, whole = reading.home_path(path), set()
    found = []
    for file in rows.files_of(source):
        if rows.ending(file) not in ENDINGS:
            raise UserError(f"{file}: rows with images are read from {', '.join(ENDINGS)}, or these with .gz")
        for where, row in rows.placed(file):
            place = f"{file}, {where}"
            try:
                messages, images = read_row(row, file.parent, train_on)
            except ValueError as error:
                raise UserError(f"{place}: {error}") from None
            for image in images:
                if image not in whole:
                    opened(place, image)
                    whole.add(image)
            found.append(ImageRow(messages, images, place))
    if not found:
        raise UserError(f"{source} holds no rows: each must have one of the forms {conversations.described()}")
    return found


def read_row(row: Any, folder: Path, train_on: str = "answers") -> tuple[Conversation, tuple[Path, ...]]:
    """(messages with parts, image files) of one parsed row; ValueError says what is wrong with it."""
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a JSON object, not {kind(row)}")
    if TYPED in json.dumps(row, ensure_ascii=False):
        raise ValueError("the row has the character U+FDD0, which no text has: remove it")
    paths = paths_of(row)
    plain = {key: value for key, value in row.items() if key not in ("image", "images")}
    own: list[str] = []
    for key in ("messages", "conversations", "conversation", "prompt", "completion"):
        if isinstance(row.get(key), list):
            plain[key] = [with_text(i, message, own) for i, message in enumerate(row[key])]
    if own and paths:
        raise ValueError("images have paths in the messages and under 'image' or 'images': keep one of them")
    messages = conversations.read_row(plain, train_on=train_on)
    for message in messages:
        if isinstance(message.get("content"), str):
            message["content"] = list(parts(message["content"]))
    paths = own or paths
    check_count(messages, paths)
    return messages, tuple(folder / path for path in paths)


def paths_of(row: dict[str, Any]) -> list[str]:
    """The paths under `image` or `images`, a text or a list of texts under either."""
    given = [key for key in ("image", "images") if row.get(key) not in (None, "", [])]
    if len(given) == 2:
        raise ValueError("the row has 'image' and 'images': keep one of them")
    if not given:
        return []
    value = row[given[0]]
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list):
        raise ValueError(f"'{given[0]}' must be a path or a list of paths, not {kind(value)}")
    return [checked_path(f"'{given[0]}'", path) for path in listed]


def checked_path(name: str, path: Any) -> str:
    """The path; ValueError if it is none."""
    if not isinstance(path, str) or not path or "\0" in path:
        raise ValueError(f"{name} must hold paths of image files, not {kind(path) if path != '' else 'an empty text'}")
    if "://" in path or path.startswith("data:"):
        raise ValueError(
            f"{name} holds the address {path[:40]!r}: images are read from files, save it next to the rows"
        )
    return path


def with_text(i: int, message: Any, own: list[str]) -> Any:
    """The message with one text as its content where that is a list of parts; paths of its image parts go to `own`."""
    key = "content" if isinstance(message, dict) and "content" in message else "value"
    if not isinstance(message, dict) or not isinstance(message.get(key), list):
        return message
    text = ""
    for part in message[key]:
        if not isinstance(part, dict) or part.get("type") not in ("text", "image"):
            named = part.get("type") if isinstance(part, dict) else kind(part)
            raise ValueError(f"the content of message {i} has a part of type {named!r}: only text and image are read")
        if part["type"] == "text":
            if not isinstance(part.get("text"), str):
                raise ValueError(f"a text part of message {i} has no 'text'")
            text += part["text"].replace(PLACEHOLDER, TYPED)
            continue
        text += PLACEHOLDER
        path = next((part[name] for name in ("image", "path", "url") if part.get(name) is not None), None)
        if path is not None:
            own.append(checked_path(f"an image part of message {i}", path))
    return message | {key: text}


def parts(text: str) -> Iterator[dict[str, str]]:
    """A content as text and image parts; no text part is empty."""
    for number, piece in enumerate(text.split(PLACEHOLDER)):
        if number:
            yield {"type": "image"}
        if piece:
            yield {"type": "text", "text": piece.replace(TYPED, PLACEHOLDER)}


def check_count(messages: Conversation, paths: list[str]) -> None:
    """ValueError unless there is a placeholder for each image and the reverse, none of them in an answer."""
    seen = 0
    for i, message in enumerate(messages):
        for part in message.get("content", ()):
            if part["type"] != "image":
                continue
            seen += 1
            if message["role"] == "assistant":
                raise ValueError(
                    f"message {i} (assistant) has an {PLACEHOLDER}, but answers are text: to have it as a word, write "
                    f'the content as [{{"type": "text", "text": …}}]'
                )
            if seen > len(paths):
                raise ValueError(
                    f"the {PLACEHOLDER} of message {i} has no image: the row has {len(paths)} under 'image' or 'images'"
                )
    if seen < len(paths):
        raise ValueError(f"the image {paths[seen]!r} has no {PLACEHOLDER}: the messages have {seen} of them")
