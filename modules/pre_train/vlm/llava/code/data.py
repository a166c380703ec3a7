"""Rows of the module: conversations with images as tokens, batches of them, and the questions to evaluate on."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import Tensor

from finetune.data import image_rows
from finetune.data.image_rows import PLACEHOLDER, ImageRow
from finetune.data.packing import IGNORE
from finetune.errors import UserError
from finetune.lm.tokenizer import Tokenizer
from finetune.vision import pictures

SIGN = "\ufdd0"  # an image within a rendered text; no row has it, image_rows sees to that
NEAR = 8  # tokens by which rows of a batch may differ
Pixels = Callable[[Sequence[Any]], Tensor]  # images (N, 3, H, W) of what rows name in `images`


@dataclass(frozen=True)
class Row:
    """A conversation in tokens; mask[i] is 1 if token i is to be learned. images: what `Pixels` takes, in order."""

    ids: list[int]
    mask: list[int]
    images: tuple[Any, ...]
    place: str = ""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Question:
    """A prompt, and the answer that is wanted. kind: what is asked, of built-in pictures."""

    kind: str
    text: str
    prompt: list[int]
    images: tuple[Any, ...]
    wanted: str
    lead: tuple[int, ...] = ()  # tokens of the wanted answer before its last word


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right. targets (B, T): the next token if it is learned, else IGNORE."""

    tokens: Tensor
    targets: Tensor
    lengths: Tensor | None  # (B,); None if all rows are equally long
    images: tuple[Any, ...]

    @property
    def learned(self) -> int:
        return int((self.targets != IGNORE).sum())


class Writer:
    """Conversations with image parts → tokens. An image is `each` times `image_token`, which no text becomes: `<image>`
    that a user types is text. The same messages are rendered once."""

    def __init__(self, tokenizer: Tokenizer, image_token: int, each: int) -> None:
        self.tokenizer, self.image_token, self.each = tokenizer, image_token, each
        self.backend = without(tokenizer.backend, PLACEHOLDER)
        self.known: dict[str, list[tuple[list[int], list[int], int]]] = {}

    def documents(self, messages: Sequence[dict[str, Any]]) -> list[tuple[list[int], list[int], int]]:
        """(ids, mask, number of images) of each text in which answers are learned, as Tokenizer.documents."""
        key = json.dumps(messages)
        if key not in self.known:
            written = self.tokenizer.renderer.documents([joined(message) for message in messages])
            self.known[key] = [(*self.encode(each.text, each.spans), each.text.count(SIGN)) for each in written]
        return self.known[key]

    def prompt(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """The ids up to where an answer begins."""
        text = self.tokenizer.render_text([joined(message) for message in messages], add_generation_prompt=True)[0]
        return self.encode(text, [])[0]

    def encode(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
        """(ids, mask) of a rendered text; a token is learned if one of its characters is within `spans`."""
        ids: list[int] = []
        mask: list[int] = []
        begin = 0
        for number, piece in enumerate(text.split(SIGN)):
            if number:
                ids += [self.image_token] * self.each
                mask += [0] * self.each
                begin += 1
            found = self.backend.encode(piece, add_special_tokens=False)
            ids += found.ids
            mask += [
                int(any(begin + first < stop and start < begin + last for start, stop in spans))
                for first, last in found.offsets
            ]
            begin += len(piece)
        return ids, mask


def without(backend: tokenizers.Tokenizer, token: str) -> tokenizers.Tokenizer:
    """The tokenizer for which an added token is text like any other."""
    if token not in {added.content for added in backend.get_added_tokens_decoder().values()}:
        return backend
    read = json.loads(backend.to_str())
    read["added_tokens"] = [added for added in read["added_tokens"] if added["content"] != token]
    return tokenizers.Tokenizer.from_str(json.dumps(read))


def joined(message: dict[str, Any]) -> dict[str, Any]:
    """The message with one text as its content, in which SIGN stands for an image."""
    if not isinstance(message.get("content"), list):
        return message
    return message | {"content": "".join(part.get("text", SIGN) for part in message["content"])}


def tokenize(found: Sequence[ImageRow], writer: Writer, max_length: int, say: Callable[[str], None]) -> list[Row]:
    """The rows' conversations, cut to `max_length` tokens; never within or before an image: UserError names the row of
    which one would be cut, and the smallest --max-length that holds its images and something to learn."""
    rows, cut, dropped = [], 0, 0
    for row in found:
        try:
            documents = writer.documents(row.messages)
        except UserError as error:
            raise UserError(f"{row.place}: {error}") from None
        for ids, mask, count in documents:
            images = [i for i, token in enumerate(ids) if token == writer.image_token]
            behind = images[-1] + 1 if images else 0
            if behind and len(ids) > max_length and sum(mask[behind:max_length]) == 0:
                needed = next((i + 1 for i in range(behind, len(ids)) if mask[i]), len(ids))
                raise UserError(
                    f"{row.place}: {row.images[count - 1]} and what is before it take {behind} tokens, so that "
                    f"--max-length {max_length} leaves nothing to learn behind it: it takes at least {needed}"
                )
            if not any(mask[1:max_length]):
                dropped += 1
                continue
            cut += len(ids) > max_length
            rows.append(Row(ids[:max_length], mask[:max_length], row.images[:count], row.place))
    if cut or dropped:
        say(f"of {len(rows) + dropped} rows {cut} were cut to {max_length} tokens, {dropped} without an answer dropped")
    return rows


def collate(rows: Sequence[Row]) -> Batch:
    """The rows as one batch."""
    longest = max(map(len, rows))
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    targets = torch.full_like(tokens, IGNORE)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row.ids)
        learned = torch.tensor(row.mask[1:]).bool()
        targets[i, : len(row) - 1][learned] = tokens[i, 1 : len(row)][learned]
    lengths = torch.tensor([len(row) for row in rows])
    return Batch(
        tokens,
        targets,
        None if int(lengths.min()) == longest else lengths,
        tuple(image for row in rows for image in row.images),
    )


def grouped(lengths: Sequence[int], size: int, generator: torch.Generator) -> list[list[int]]:
    """The numbers of all rows once, in batches of `size` rows of similar length: a random order, of which every 50
    batches are sorted by length and their batches shuffled again (LLaVA's group_by_length). Lengths count in eights:
    else all rows of a batch would ask the same question, where each question has its own length."""
    order = torch.randperm(len(lengths), generator=generator).tolist()
    batches: list[list[int]] = []
    for start in range(0, len(order), 50 * size):
        part = sorted(order[start : start + 50 * size], key=lambda i: -(lengths[i] // NEAR))
        batches += [part[i : i + size] for i in range(0, len(part), size)]
    whole = [batch for batch in batches if len(batch) == size] or batches
    return [whole[i] for i in torch.randperm(len(whole), generator=generator).tolist()]


def batch_of(rows: Sequence[Row], size: int, step: int, generator: Callable[[int], torch.Generator]) -> Batch:
    """The batch of a step: a function of its arguments, so a resumed run needs no stored place."""
    each = max(1, len(rows) // size)
    epoch, place = divmod(step, each)
    key = (id(rows), size, epoch)
    if _epoch.get("key") != key:
        _epoch.update(key=key, batches=grouped([len(row) for row in rows], size, generator(epoch)))
    batches = _epoch["batches"]
    return collate([rows[i] for i in batches[place % len(batches)]])


_epoch: dict[str, Any] = {}  # the batches of the epoch that was asked for last


# --- Built-in pictures


SENTENCES = {
    "left": "The digit on the left is {}.",
    "right": "The digit on the right is {}.",
    "sum": "The sum of the digits is {}.",
    "larger": "The largest digit is {}.",
}


@dataclass(frozen=True)
class Form:
    """How questions about built-in pictures are put: the picture behind the question, and the answer a sentence."""

    last: bool = False
    sentence: bool = False

    def answer(self, item: pictures.Item) -> str:
        return SENTENCES[item.kind].format(item.answer) if self.sentence else item.answer


def asked(item: pictures.Item, form: Form, caption: str | None = None) -> list[dict[str, Any]]:
    """A question about a picture as a conversation; with a `caption` its text stands in the place of the image."""
    shown = {"type": "image"} if caption is None else {"type": "text", "text": caption}
    text = {"type": "text", "text": f"{item.question} " if form.last else f"\n{item.question}"}
    return [
        {"role": "user", "content": [text, shown] if form.last else [shown, text]},
        {"role": "assistant", "content": [{"type": "text", "text": form.answer(item)}]},
    ]


def picture_rows(split: pictures.Split, writer: Writer, kinds: Sequence[str], form: Form) -> list[Row]:
    """A row of each question of a split that is of one of the kinds; its image is the picture's number."""
    rows = []
    for item in (item for item in split.items if item.kind in kinds):
        ((ids, mask, _),) = writer.documents(asked(item, form))
        rows.append(Row(ids, mask, (item.picture,)))
    return rows


def picture_questions(split: pictures.Split, writer: Writer, form: Form) -> list[Question]:
    prompts: dict[str, list[int]] = {}
    for item in split.items:
        if item.question not in prompts:
            prompts[item.question] = writer.prompt(asked(item, form)[:1])
    return [
        Question(
            item.kind,
            item.question,
            prompts[item.question],
            (item.picture,),
            form.answer(item),
            tuple(writer.encode(form.answer(item).rpartition(" ")[0], [])[0]),
        )
        for item in split.items
    ]


def told(split: pictures.Split, caption: str, form: Form) -> list[list[dict[str, Any]]]:
    """The questions of a split with the picture told in words: what a language model can learn from text alone."""
    words = [caption.format(*(pictures.in_words(digit) for digit in row)) for row in split.digits.tolist()]
    return [asked(item, form, words[item.picture]) for item in split.items]


# --- Rows of one's own


def read(path: Path, eval_rows: int) -> tuple[list[ImageRow], list[ImageRow]]:
    """(training, held-out) rows of a file or folder: a twentieth of the different rows is held out, always the same, of
    which at most `eval_rows` are kept."""
    found = image_rows.read(path)
    keyed = [(zlib.crc32(json.dumps([row.messages, list(map(str, row.images))]).encode()), row) for row in found]
    keys = sorted({key for key, _ in keyed})
    if len(keys) < 2:
        raise UserError(f"{path} has one row only: a second, different one is needed to evaluate on")
    chosen = set(keys[: max(1, len(keys) // 20)])
    held_out = [row for key, row in keyed if key in chosen]
    return [row for key, row in keyed if key not in chosen], random.Random(0).sample(
        held_out, min(eval_rows, len(held_out))
    )


def row_questions(found: Sequence[ImageRow], writer: Writer) -> list[Question]:
    """The last question of each conversation."""
    questions = []
    for row in found:
        last = max((i for i, message in enumerate(row.messages) if message["role"] == "assistant"), default=0)
        if not last:
            continue
        count = sum(part["type"] == "image" for message in row.messages[:last] for part in message["content"])
        text = "".join(part.get("text", "") for part in row.messages[last - 1]["content"]).strip()
        wanted = "".join(part["text"] for part in row.messages[last]["content"])
        questions.append(Question("", text, writer.prompt(row.messages[:last]), row.images[:count], wanted))
    return questions
