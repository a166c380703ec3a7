"""Tokens to text while they are made: characters that span tokens, and stop strings that cross their borders."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from finetune.errors import UserError
from finetune.lm.tokenizer import Tokenizer

UNFINISHED = "\ufffd"  # what `decode` writes for bytes that are not a whole character yet


class TextStream:
    """The text of one answer, token by token. What `push` and `finish` return, joined, is the text of all tokens up to
    the first stop string, whose end comes first of all (of two that end together, the longer).

    A token's text is what it adds to the text of the tokens before it: tokenizers write a token differently at the
    start. Special tokens write nothing, except those of `keep`. Only the tokens since the last whole character are
    decoded again, so the cost of a token does not grow.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), keep: Iterable[int] = ()) -> None:
        if not all(stops):
            raise UserError("a stop string is empty: it would end every answer before it begins")
        self.tokenizer, self.stops = tokenizer, tuple(stops)
        self.hidden: frozenset[int] | None = None  # tokens that write nothing; None: the special ones
        if kept := {*keep}:
            added = tokenizer.backend.get_added_tokens_decoder()
            self.hidden = frozenset(i for i, token in added.items() if token.special) - kept
        self.ids: list[int] = []
        self.start = self.read = 0  # ids[start:read] is the context of ids[read:], whose text is not released yet
        self.pending = ""  # released by the tokens, held back as the possible beginning of a stop string
        self.stopped = False
        self.text = ""  # all that was released

    def push(self, token: int) -> str:
        """The text that is certain now; empty within a character or a possible stop string, and after a stop string."""
        self.ids.append(token)
        new = self.unread()
        if not new or new.endswith(UNFINISHED):
            return ""
        self.start, self.read = self.read, len(self.ids)
        return self.release(new)

    def finish(self) -> str:
        """What was held back, if no stop string came."""
        text = self.release(self.unread()) + self.pending
        self.text += self.pending
        self.pending, self.start, self.read = "", self.read, len(self.ids)
        return text

    def unread(self) -> str:
        before, now = map(self.decode, (self.ids[self.start : self.read], self.ids[self.start :]))
        return now[len(before) :]

    def decode(self, ids: list[int]) -> str:
        if self.hidden is None:
            return self.tokenizer.decode(ids, skip_special_tokens=True)
        return self.tokenizer.decode([i for i in ids if i not in self.hidden])

    def release(self, text: str) -> str:
        if self.stopped:
            return ""
        self.pending += text
        found = [(at + len(stop), at) for stop in self.stops if (at := self.pending.find(stop)) >= 0]
        if found:
            self.stopped = True
            _, keep = min(found)
        else:
            keep = len(self.pending) - max((begun(self.pending, stop) for stop in self.stops), default=0)
        text, self.pending = self.pending[:keep], "" if self.stopped else self.pending[keep:]
        self.text += text
        return text


def begun(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
