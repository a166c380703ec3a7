"""Questions and answers from the documentation that ships with Python: docstrings and the language reference."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sys
import sysconfig
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.data.conversations import Conversation


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
    """Question–answer pairs from Python's documentation: functions, classes and methods (first paragraphs of the
    standard library's docstrings) and the language (`pydoc_data.topics`).

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
            # Prose starts in the first column; indented text is code or grammar, and notes on versions answer nothing.
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
    """The words of a text in lower case."""
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
