"""Structured output: at each position only the tokens are left that can still become a JSON value of a schema, a match
of a regular expression, or one of several texts (Willard and Louf 2023, arXiv:2307.09702).

llguidance compiles the grammar and walks the vocabulary. What may follow is a function of the answer's tokens: a
`Matcher` that is asked about another answer than before goes back to the part that both share. So guesses that are
rejected, preemption and beams that are dropped need nothing more.

    format → Lark grammar → Vocabulary.matcher → Engine.add(…, grammar=matcher)
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.errors import UserError
from finetune.lm.tokenizer import Tokenizer

SPACE = r"( |\n[ \t]{0,32})?"  # between two parts of a JSON value: a model cannot write white space without end
OPTIONS = {"whitespace_pattern": SPACE, "lenient": False}  # lenient: keywords that are not enforced are ignored
LEAD = "\x02"  # a character that merges with no other


def json_value(schema: dict[str, Any]) -> str:
    """The rule of a JSON value that satisfies a JSON Schema (draft 2020-12, as far as llguidance enforces it)."""
    return "%json " + json.dumps(schema | {"x-guidance": OPTIONS})


def json_schema(schema: dict[str, Any]) -> str:
    """The grammar of a JSON value that satisfies a schema."""
    return f"start: {json_value(schema)}"


def regex(pattern: str) -> str:
    """The grammar of the texts that an expression matches as a whole (Rust's syntax: no look-around)."""
    lark: str = library().LLMatcher.grammar_from_regex(pattern)
    return lark


def choice(texts: Sequence[str]) -> str:
    """The grammar of one of several texts."""
    if not texts or not all(texts):
        raise UserError("a choice needs at least one text, and none may be empty")
    return "start: " + " | ".join(map(literal, texts))


def literal(text: str) -> str:
    """A text in a grammar."""
    return json.dumps(text, ensure_ascii=False)


def library() -> Any:
    """llguidance. UserError if it is not installed."""
    try:
        import llguidance
    except ImportError:
        raise UserError("structured output needs llguidance: pip install 'finetune-lab[grammar]'") from None
    return llguidance


class Vocabulary:
    """What each token of a model writes, as grammars need it: `size` logits, `ends` of an answer. Made once.

    UserError without llguidance, without an end token, and for a tokenizer that it cannot read.
    """

    def __init__(self, tokenizer: Tokenizer, size: int, ends: Iterable[int]) -> None:
        guidance = library()
        self.tokenizer, self.ends = tokenizer, sorted(end for end in ends if end < size)
        if not self.ends:
            raise UserError("structured output needs an end token, and the model has none")
        try:
            self.bare = guidance.LLTokenizer(tokenizer.backend.to_str(), n_vocab=size, eos_token=self.ends)
        except ValueError as error:
            raise UserError(f"structured output cannot read this tokenizer: {brief(str(error))}") from None
        self.tokens: list[bytes] = [self.bare.decode_bytes([i]) for i in range(size)]
        added = tokenizer.backend.get_added_tokens_decoder()
        known = tokenizer.backend.get_vocab(with_added_tokens=True).values()
        written = {i for i in known if i < size and self.tokens[i] and not (i in added and added[i].special)}
        # What llguidance asks of a tokenizer:
        self.eos_token_id, self.bos_token_id = self.ends[0], None
        self.special_token_ids = sorted({*range(size)} - written | {*self.ends})  # they are no text
        self.words = guidance.LLTokenizer(guidance.TokenizerWrapper(self), n_vocab=size, eos_token=self.ends)

    def __call__(self, text: bytes) -> list[int]:
        """The tokens in which the model knows a text that stands behind others."""
        head, whole = (self.tokenizer.encode(part, False) for part in (LEAD, LEAD + text.decode(errors="replace")))
        found = whole[len(head) :]
        same = whole[: len(head)] == head and b"".join(self.tokens[i] for i in found) == text
        greedy: list[int] = [] if same else self.bare.greedy_tokenize(text.decode(errors="replace"))
        return found if same else greedy

    def matcher(self, grammar: str) -> Matcher:
        """At the start of an answer. UserError if the grammar is malformed, unsupported, or too large."""
        guidance = library()
        limits = guidance.LLParserLimits(verbose_errors=False)
        found = guidance.LLMatcher(self.words, grammar, log_level=0, limits=limits)
        if found.is_error():
            raise UserError(f"this structure cannot be enforced: {brief(found.get_error())}")
        return Matcher(found, len(self.tokens), self.ends)


class Matcher:
    """A grammar and the answer that it has read. One answer, one matcher: `copy` is for those that go on alone."""

    def __init__(self, matcher: Any, size: int, ends: list[int], read: Sequence[int] = ()) -> None:
        self.matcher, self.size, self.ends, self.read = matcher, size, ends, list(read)

    def copy(self) -> Matcher:
        return Matcher(self.matcher.deep_copy(), self.size, self.ends, self.read)

    def allowed(self, answer: Sequence[int]) -> Tensor:
        """Which tokens (V,) bool may follow an answer; end tokens only where it is complete, and after one of them
        nothing else. UserError if the grammar cannot go on (it is too large, or the answer breaks it)."""
        if answer and answer[-1] in self.ends:
            return torch.zeros(self.size, dtype=torch.bool).index_fill_(0, torch.tensor(self.ends), True)
        self.follow(answer)
        bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
        mask = torch.from_numpy(np.unpackbits(bits, count=self.size, bitorder="little").view(np.bool_))
        if self.matcher.is_error() or not mask.any():
            raise UserError(f"the structure cannot go on: {brief(self.matcher.get_error()) or 'no token fits'}")
        return mask

    def follow(self, answer: Sequence[int]) -> None:
        """Reads an answer, back from and forth to where it differs from the last one."""
        same = len(self.read)
        if list(answer[:same]) != self.read:
            pairs = zip(self.read, answer, strict=False)
            same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(same, len(answer)))
            self.matcher.rollback(len(self.read) - same)
        self.read = list(answer)
        if not self.matcher.consume_tokens(self.read[same:]):
            raise UserError(f"the structure cannot go on: {brief(self.matcher.get_error())}")


def brief(error: str) -> str:
    """A message of the library in one line, without the grammar that it shows."""
    kept = [line for line in error.splitlines() if not line.lstrip()[:1].isdigit() and set(line.strip()) - {"^"}]
    return re.sub(r"^at \d+\(\d+\): ", "", " ".join(" ".join(kept).split()))[:300]
