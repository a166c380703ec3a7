"""Chat rows from JSONL or from Python's own documentation, their tokens with a loss mask, packing, batches by step.

A conversation is a list of {"role": "system" | "user" | "assistant" | "tool", "content": text}. Messages keep their
other keys (`tool_calls`, `reasoning_content`, `weight`, …), which the model's chat template may write; what a row holds
for the whole conversation (`tools`, `documents`, `chat_template_kwargs`) stands in its first message.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sys
import sysconfig
import warnings
import zlib
from bisect import bisect_left, insort
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import reading
from finetune.errors import UserError
from finetune.tokenizer import CONTEXT, REASONING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Conversation = list[dict[str, Any]]
Render = Callable[[Conversation], tuple[Sequence[int], Sequence[int]]]  # as Tokenizer.render: ids and loss mask

ROLES = ("system", "user", "assistant", "tool")
# Keys that change what is to be learned, in ways that no chat template is told of.
UNUSED = ("functions", "function_call", "images", "videos", "audios", "weight")
LIMIT = 4 << 30  # bytes of a JSONL file
IGNORE = -100  # a target that carries no loss


def read_jsonl(path: str | Path) -> list[Conversation]:
    """The conversations of a JSONL file: rows {"messages": […]} or {"prompt": text, "completion": text}.

    Other keys of a row are left alone, blank lines are skipped. UserError names the file, the line and what is wrong.
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
                where = "put it beside 'messages'" if key in CONTEXT else "write it as 'tool_calls'"
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
    """Is it an answer that says something, and not of weight 0?"""
    says = message.get("content", "").strip() or message.get("tool_calls") or any(map(message.get, REASONING))
    return message["role"] == "assistant" and bool(says) and message.get("weight") != 0


def exchanges(row: Conversation) -> list[int]:
    """The messages of the assistant that answer another one with a text, the last first."""
    return [
        i for i in reversed(range(1, len(row)))
        if learnable(row[i]) and row[i].get("content") and row[i - 1]["role"] in ("user", "tool")
    ]  # fmt: skip


def with_answer_of(row: Conversation, other: Conversation) -> Conversation:
    """The row up to its last answer, which is the other's instead."""
    ends = [max(i for i, message in enumerate(one) if message["role"] == "assistant") for one in (row, other)]
    answer = {key: value for key, value in other[ends[1]].items() if key not in CONTEXT}
    context = {key: row[0][key] for key in CONTEXT if key in row[0]} if ends[0] == 0 else {}
    return [*row[: ends[0]], answer | context]


def check_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a text, not {kind(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} has half of a surrogate pair as its character {error.start + 1}") from None


def check_encodable(name: str, value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{name} has half of a surrogate pair in it") from None


def kind(value: Any) -> str:
    """What JSON value this is, in words."""
    words = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a number"}
    return words.get(type(value), "nothing" if value is None else "a number")


@dataclass(frozen=True)
class Document:
    """One conversation in tokens; mask[i] is 1 if token i is to be learnt (answers and their end tokens). `row`: the
    conversation itself."""

    ids: Sequence[int]
    mask: Sequence[int]
    row: Conversation | None = field(default=None, compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def learnt(self) -> int:
        """Number of tokens that carry loss; the first token of a document is never predicted."""
        return sum(self.mask[1:])


def tokenize(rows: Sequence[Conversation], render: Render, max_length: int) -> tuple[list[Document], int, int]:
    """`fitting`; UserError if no row remains."""
    found = fitting(rows, render, max_length)
    if not found[0]:
        raise UserError(f"no row has an answer within {max_length} tokens: raise --max-length or shorten the prompts")
    return found


def fitting(rows: Sequence[Conversation], render: Render, max_length: int) -> tuple[list[Document], int, int]:
    """(documents, number cut, number left out): a conversation longer than `max_length` tokens loses its end, and one
    with no token to learn within them is left out. UserError names the row that the template refuses."""
    documents, cut, dropped = [], 0, 0
    for row in rows:
        try:
            ids, mask = render(row)
        except UserError as error:
            text = next((m["content"] for m in row if m.get("content")), "")
            raise UserError(f"the row that begins {text[:40]!r}: {error}") from None
        document = Document(ids[:max_length], mask[:max_length], row)
        if not document.learnt:
            dropped += 1
            continue
        cut += len(ids) > max_length
        documents.append(document)
    return documents, cut, dropped


def held_out_of(documents: Sequence[Document], max_length: int) -> tuple[list[Document], list[Document]]:
    """(training, held-out): a twentieth of the different documents is held out, where none of the rows that were meant
    to be fits. UserError if all are the same."""
    kinds = sorted({tuple(document.ids) for document in documents}, key=lambda ids: zlib.crc32(repr(ids).encode()))
    if len(kinds) < 2:
        raise UserError(
            f"one row only has an answer within {max_length} tokens: a second, different one is needed to evaluate on"
        )
    chosen = set(kinds[: max(1, len(kinds) // 20)])
    parts: tuple[list[Document], list[Document]] = [], []
    for document in documents:
        parts[tuple(document.ids) in chosen].append(document)
    return parts


def check_vocabulary(documents: Iterable[Document], vocab_size: int) -> None:
    """UserError if the tokenizer knows tokens that the model's table lacks, and the rows have one."""
    largest = max((max(document.ids) for document in documents), default=0)
    if largest >= vocab_size:
        raise UserError(f"the rows have token {largest}, the model has {vocab_size}: its tokenizer is another model's")


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Bins of indices whose lengths add up to at most `max_length`: best-fit decreasing (Ding et al. 2024,
    arXiv:2404.10830, §3), bin for bin as trl's pack_dataset(…, strategy="bfd").

    Longest first (ties in order); each goes to the fullest bin that still holds it (ties: the one that has been waiting
    longest), else to a new one.
    """
    if any(not 0 < n <= max_length for n in lengths):
        raise ValueError(f"lengths must be between 1 and {max_length}")
    bins: list[list[int]] = []
    waiting: dict[int, deque[list[int]]] = defaultdict(deque)  # space left → bins with that much, oldest first
    spaces: list[int] = []  # the keys of `waiting` that have bins, rising
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(spaces, lengths[i])
        if place == len(spaces):
            space = max_length
            chosen: list[int] = []
            bins.append(chosen)
        else:
            space = spaces[place]
            chosen = waiting[space].popleft()
            if not waiting[space]:
                del spaces[place]
        chosen.append(i)
        space -= lengths[i]
        if not waiting[space]:
            insort(spaces, space)
        waiting[space].append(chosen)
    return bins


@dataclass(frozen=True)
class Batch:
    """Documents end to end in one row, with no padding: token t belongs to document n if cu_seqlens[n] ≤ t <
    cu_seqlens[n+1]. targets[t] is the next token of the same document if that one is learnt, else IGNORE."""

    tokens: Tensor  # (1, T) int64
    targets: Tensor  # (1, T) int64
    positions: Tensor  # (1, T) int64, from 0 in each document
    cu_seqlens: Tensor  # (N+1,) int32

    @property
    def learnt(self) -> int:
        return int((self.targets != IGNORE).sum())


def collate(documents: Sequence[Document]) -> Batch:
    """The documents as one packed batch."""
    import torch

    tokens: list[int] = []
    targets: list[int] = []
    positions: list[int] = []
    ends = [0]
    for document in documents:
        ids, mask = list(document.ids), document.mask
        tokens += ids
        targets += [token if learn else IGNORE for token, learn in zip(ids[1:], mask[1:], strict=True)] + [IGNORE]
        positions += range(len(ids))
        ends.append(len(tokens))
    return Batch(
        torch.tensor([tokens], dtype=torch.int64),
        torch.tensor([targets], dtype=torch.int64),
        torch.tensor([positions], dtype=torch.int64),
        torch.tensor(ends, dtype=torch.int32),
    )


def batch_indices(count: int, size: int, step: int, generator: Callable[[int], torch.Generator]) -> list[int]:
    """Which of `count` rows step `step` (from 0) takes: `size` at a time through a new permutation each epoch.

    A function of its arguments only, so a resumed run needs no stored position; `generator(epoch)` seeds an epoch.
    """
    import torch

    orders: dict[int, list[int]] = {}
    chosen = []
    for i in range(step * size, (step + 1) * size):
        epoch, place = divmod(i, count)
        if epoch not in orders:
            orders[epoch] = torch.randperm(count, generator=generator(epoch)).tolist()
        chosen.append(orders[epoch][place])
    return chosen


@dataclass(frozen=True)
class Pair:
    """A question and its answer; `topic` is the top-level module or reference page that it comes from."""

    topic: str
    name: str
    question: str
    answer: str

    def conversation(self) -> Conversation:
        return [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.answer}]


# GUI, tests, vendored or private code; and `pydoc`, whose own help texts are those of `pydoc_data.topics`.
SKIPPED = {"antigravity", "ensurepip", "idlelib", "lib2to3", "pydoc", "pydoc_data", "test", "this", "tkinter"}
SKIPPED |= {"turtle", "turtledemo"}
QUESTIONS = (
    "What does the Python {} do?",
    "Explain the Python {}.",
    "What is the Python {} for?",
    "Describe the {} of Python in a sentence or two.",
)
LONGEST_ANSWER = 300  # characters, about 70 tokens


def python_pairs() -> list[Pair]:
    """What Python's documentation says about its modules' functions, classes and methods (first paragraphs of the
    standard library's docstrings) and about its language (`pydoc_data.topics`).

    The same for the same Python version, another for another (`pairs_hash`). No two answers are alike.
    """
    pairs, seen = [], set()
    for topic, name, answer in [*docstrings(), *reference()]:
        answer = cut_sentences(plain(answer))
        key = " ".join(words(answer))
        if len(words(answer)) < 4 or key in seen or ">>>" in answer:  # an interpreter's session explains nothing
            continue
        seen.add(key)
        question = QUESTIONS[zlib.crc32(name.encode()) % len(QUESTIONS)].format(name)
        pairs.append(Pair(topic, name, question, answer))
    return pairs


def docstrings() -> Iterator[tuple[str, str, str]]:
    """(top-level module, "function `json.dumps(obj)`", first paragraph) of the public names of the standard library,
    read from its source without importing it."""
    root = Path(sysconfig.get_path("stdlib"))
    for topic in sorted(sys.stdlib_module_names - SKIPPED):
        if topic.startswith("_"):
            continue
        single = root / f"{topic}.py"
        for file in [single] if single.exists() else sorted((root / topic).glob("*.py")):
            if file.stem == "__init__" or not file.stem.startswith("_"):
                module = topic if file.stem in ("__init__", topic) else f"{topic}.{file.stem}"
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # old escapes in old modules
                    tree = ast.parse(file.read_bytes())
                yield from ((topic, name, text) for name, text in members(tree, module, "function"))


def members(node: ast.Module | ast.ClassDef, prefix: str, noun: str) -> Iterator[tuple[str, str]]:
    """(noun and name with its parameters, first paragraph) of what `node` defines and documents."""
    for child in node.body:
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or child.name.startswith("_"):
            continue
        name = f"{prefix}.{child.name}"
        if text := ast.get_docstring(child):
            call = name if isinstance(child, ast.ClassDef) else f"{name}({ast.unparse(child.args)})"
            yield f"{'class' if isinstance(child, ast.ClassDef) else noun} `{call}`", text.split("\n\n")[0]
        if isinstance(child, ast.ClassDef):
            yield from members(child, name, "method")


def reference() -> Iterator[tuple[str, str, str]]:
    """(page, heading, first paragraph below it) of the language reference that ships as `pydoc_data.topics`."""
    from pydoc_data.topics import topics

    for page, text in sorted(topics.items()):
        heading = ""
        for paragraph in re.split(r"\n\s*\n", text):
            lines = paragraph.split("\n")
            if len(lines) == 2 and re.fullmatch(r"[*=\-~^]{3,}", lines[1]):
                heading = lines[0]
            # Prose starts in the first column; indented text is code or grammar, and notes on versions are no answer.
            elif heading and re.match(r"(?!New in|Changed in|See also|Note)\w", paragraph) and paragraph[-1] == ".":
                yield f"reference: {page}", f"reference's section {heading}", paragraph
                heading = ""


def plain(text: str) -> str:
    """One line, without reStructuredText's roles and double back-quotes."""
    return " ".join(re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text).replace("``", "`").split())


def cut_sentences(text: str) -> str:
    """As many whole sentences as fit into LONGEST_ANSWER characters; nothing if not even one does."""
    kept = ""
    for sentence in re.split(r"(?<=[.!?])\s+", text):
        if len(kept) + 1 + len(sentence) > LONGEST_ANSWER:
            break
        kept = f"{kept} {sentence}".strip()
    return kept


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def split_pairs(pairs: Sequence[Pair]) -> tuple[list[Pair], list[Pair], list[Pair]]:
    """(training, held-out answers, unseen topics), always the same for the same pairs.

    Unseen: every eighth topic, by hash of its name; nothing of these modules and pages is trained on. Held out: every
    tenth of the other pairs; their topics are trained on, their answers are not. A pair of either set whose answer has
    eight words in a row (or all its words, if fewer) in common with a training answer is in no set at all, so what the
    losses on them measure is not recall (compare Brown et al. 2020, arXiv:2005.14165, appendix C: 13 words).
    """
    train, held_out, unseen = [], [], []
    for pair in pairs:
        if zlib.crc32(pair.topic.encode()) % 8 == 0:
            unseen.append(pair)
        elif zlib.crc32(pair.name.encode()) // 8 % 10 == 0:
            held_out.append(pair)
        else:
            train.append(pair)
    known = {run for pair in train for size in range(4, OVERLAP + 1) for run in runs(pair.answer, size)}
    fresh = [[p for p in part if known.isdisjoint(runs(p.answer, OVERLAP))] for part in (held_out, unseen)]
    return train, fresh[0], fresh[1]


OVERLAP = 8


def runs(text: str, size: int) -> set[tuple[str, ...]]:
    """The runs of `size` words in a text; all its words as one run if it has fewer."""
    found = words(text)
    return {tuple(found[i : i + size]) for i in range(max(len(found) - size, 0) + 1)}


def pairs_hash(pairs: Sequence[Pair]) -> str:
    """Twelve hexadecimal digits that differ if any pair does."""
    text = json.dumps([[p.topic, p.name, p.question, p.answer] for p in pairs])
    return hashlib.sha256(text.encode()).hexdigest()[:12]
