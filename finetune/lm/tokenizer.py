"""A tokenizer over the `tokenizers` library: text ↔ ids, conversations with their loss mask, training of a BPE."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from finetune.errors import UserError
from finetune.lm.chat_template import ChatTemplate, chatml

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # pad (and unknown), begin, end
CONTEXT = ("tools", "documents", "chat_template_kwargs")  # of a whole conversation: its first message holds them
REASONING = ("reasoning_content", "thinking", "reasoning")  # three names for the same
# What is to be learned, or what it is learned from: a template that does not write it would teach something else.
MEANT = ("tool_calls", *REASONING)
PIECE = 1 << 16  # characters that are encoded at once where a text may be cut
Message = dict[str, Any]
Span = tuple[int, int]


class Tokenizer:
    """Text ↔ ids. `bos_id`, `eos_id`, `pad_id` are None where the model has no such token.

    `backend` is the `tokenizers.Tokenizer`; `chat_template` a Jinja template, or None; `others` further special tokens
    that templates name (`unk_token`, …). `cut`: an expression after whose matches a text may be cut without changing
    its ids (`CUT` for GPT-2's pre-tokenizer), so that a long text is encoded in pieces, with a tenth of the memory.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos: str | None = None,
        eos: str | None = None,
        pad: str | None = None,
        chat_template: str | None = None,
        others: Mapping[str, str] | None = None,
        cut: re.Pattern[str] | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend, self.bos, self.eos, self.pad = backend, bos, eos, pad
        self.chat_template, self.others, self.cut = chat_template, dict(others or {}), cut
        self.bos_id, self.eos_id, self.pad_id = (
            backend.token_to_id(name) if name else None for name in (bos, eos, pad)
        )
        self.unwritten: set[str] = set()  # keys of rendered messages that the template does not write
        self._checked: set[tuple[str, str]] = set()

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    @property
    def special_tokens(self) -> dict[str, str]:
        """By the names that templates and tokenizer_config.json use."""
        found = {"bos_token": self.bos, "eos_token": self.eos, "pad_token": self.pad, **self.others}
        return {key: value for key, value in found.items() if value is not None}

    def token_ids(self) -> dict[str, int]:
        """The special ids under the names that config.json uses."""
        found = {"bos_token_id": self.bos_id, "eos_token_id": self.eos_id, "pad_token_id": self.pad_id}
        return {key: value for key, value in found.items() if value is not None}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text; special tokens written out in it become their ids. `add_special_tokens` adds what the model
        wants around a text (Llama 2 and 3: the begin token; SmolLM2 and GPT-2: nothing)."""
        if self.cut and len(text) > PIECE:
            return [i for piece in pieces([text], self.cut) for i in self.backend.encode(piece).ids]
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of ids. One without a token (a model's table often has more rows than there are tokens) writes
        nothing; UserError for a number that is not an id."""
        for token in ids:
            if not 0 <= token < 1 << 32:
                raise UserError(f"{token} is not a token id: ids are 0 or more")
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> tuple[list[int], list[int]]:
        """(ids, mask) of a conversation [{"role": …, "content": …}, …]; mask[i] is 1 for the tokens that the assistant
        has to produce: its answers and the end token of each, except those whose message has the weight 0.

        The template's generation markers tell which they are. Without markers an answer is what the text with it has in
        addition to the text that prompts for it. UserError if that does not hold, or if the template omits part of a
        message.
        """
        text, spans = self.render_text(messages, add_generation_prompt)
        if not add_generation_prompt:
            self.check_written(messages, text)
            if (
                self.template.marked
                and not spans
                and any(m["role"] == "assistant" and m.get("content") for m in messages)
            ):
                raise UserError("nothing of the answers stands between the chat template's {% generation %} markers")
            if not self.template.marked or any(message.get("weight") == 0 for message in messages):
                turns = self.turns(messages, text)
                kept = [span for i, span in turns.items() if messages[i].get("weight") != 0]
                spans = [s for s in spans if any(overlap(s, turn) for turn in kept)] if self.template.marked else kept
        encoding = self.backend.encode(text, add_special_tokens=False)
        mask = [0] * len(encoding.ids)
        for i, span in enumerate(encoding.offsets):
            mask[i] = int(any(overlap(span, other) for other in spans))
        return encoding.ids, mask

    def render_text(
        self, messages: Sequence[Message], add_generation_prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text, and the character spans between generation markers."""
        return self._render(*parted(messages), add_generation_prompt)

    def _render(self, messages: list[Message], context: dict[str, Any], prompt: bool) -> tuple[str, list[Span]]:
        if self.template is None:
            raise UserError("the model has no chat template: set tokenizer.chat_template, or use its instruct version")
        for i, message in enumerate(messages):
            content = message.get("content")
            fine = isinstance(content, str) or (content is None and message.get("tool_calls"))
            if not isinstance(message.get("role"), str) or not fine:
                raise UserError(f"message {i} needs a text for 'role' and for 'content', found {message!r}")
        values = {"tools": None, "documents": None} | context
        return self.template.render(
            messages=[named(message) for message in messages],
            add_generation_prompt=prompt,
            **self.special_tokens | values.pop("chat_template_kwargs", {}) | values,
        )

    def turns(self, messages: Sequence[Message], text: str) -> dict[int, Span]:
        """For each message of the assistant the characters that it adds to the text that prompts for it."""
        plain, context = parted(messages)
        ends = tuple(token.content for token in self.backend.get_added_tokens_decoder().values())
        found = {}
        for i, message in enumerate(plain):
            if message["role"] != "assistant":
                continue
            before = self._render(plain[:i], context, True)[0]
            after = text if i + 1 == len(plain) else self._render(plain[: i + 1], context, False)[0]
            fix = "give a template with {% generation %} markers"
            if not after.startswith(before):
                same = next(i for i, letter in enumerate(before) if after[i : i + 1] != letter)
                raise UserError(
                    f"which tokens of message {i} are the assistant's cannot be told: the chat template asks for an "
                    f"answer with {before[same:][:40]!r}, but writes {after[same:][:40]!r} where there is one; {fix}"
                )
            if not text.startswith(after):
                raise UserError(
                    f"which tokens of message {i} are the assistant's cannot be told: the chat template writes it "
                    f"otherwise once other messages follow; {fix}, or rows that end with their first answer"
                )
            trimmed = after.rstrip()
            found[i] = len(before), len(trimmed) if trimmed.endswith(ends) else len(after)
        return found

    def check_written(self, messages: Sequence[Message], text: str) -> None:
        """UserError if the template omits what is to be learned, or what that is learned from; other keys that it does
        not write are added to `unwritten`."""
        plain, context = parted(messages)

        def writes(changed: list[Message], values: dict[str, Any]) -> bool:
            try:
                return self._render(changed, values, False)[0] != text
            except UserError:  # it cannot do without
                return True

        for key in ("tools", "documents"):
            if context.get(key) and not writes(plain, {k: v for k, v in context.items() if k != key}):
                raise UserError(f"the chat template does not write the row's {key!r}: use another, or remove them")
        for i, message in enumerate(plain):
            role = message["role"]
            for key in message:
                gone = {k: v for k, v in message.items() if k != key and not (key in REASONING and k in REASONING)}
                if key in MEANT:
                    if message[key] and not writes([*plain[:i], gone, *plain[i + 1 :]], context):
                        raise UserError(f"the chat template does not write {key!r} of message {i} ({role})")
                elif key not in ("role", "content", "weight") and (role, key) not in self._checked:
                    self._checked.add((role, key))
                    if not writes([*plain[:i], gone, *plain[i + 1 :]], context):
                        self.unwritten.add(key)
            if role not in ("user", "assistant") and (role, "content") not in self._checked:
                self._checked.add((role, "content"))
                if not writes(
                    [*plain[:i], message | {"content": f"{message.get('content')}."}, *plain[i + 1 :]], context
                ):
                    raise UserError(f"the chat template does not write message {i}, whose role is {role!r}")

    @property
    def chat_template(self) -> str | None:
        return self._chat_template

    @chat_template.setter
    def chat_template(self, source: str | None) -> None:
        self._chat_template = source
        self._checked = set()
        self.__dict__.pop("template", None)

    @cached_property
    def template(self) -> Any:
        return None if self._chat_template is None else ChatTemplate(self._chat_template)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = 512) -> Tokenizer:
        """A byte-level BPE with the ChatML tokens, trained on `texts` (Sennrich et al. 2016, arXiv:1508.07909).

        vocab_size ≥ 259: 256 bytes, 3 special tokens, the rest merges. No text is unknown to it.
        """
        if vocab_size < 256 + len(SPECIALS):
            raise UserError(
                f"vocab_size {vocab_size} is too small: 256 bytes and {len(SPECIALS)} special tokens need 259"
            )
        backend = byte_level(models.BPE(), GPT2)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIALS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        pad, bos, eos = SPECIALS
        return cls(backend, bos=bos, eos=eos, pad=pad, chat_template=chatml())


def parted(messages: Sequence[Message]) -> tuple[list[Message], dict[str, Any]]:
    """The messages without what the first one holds for the whole conversation, and that."""
    context = {key: messages[0][key] for key in CONTEXT if messages and key in messages[0]}
    return [{k: v for k, v in message.items() if k not in context} for message in messages], context


def named(message: Message) -> Message:
    """A message as transformers shows it to a template: without empty keys, its reasoning under the usual names."""
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[key] for key in REASONING if key in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def overlap(one: Span, other: Span) -> bool:
    """Whether two spans share a character."""
    return one[0] < other[1] and other[0] < one[1]


def pieces(texts: Iterable[str], cut: re.Pattern[str]) -> Iterator[str]:
    """The same text in parts of about PIECE characters, each of which ends with a match of `cut`."""
    rest = ""
    for text in texts:
        rest, begin = rest + text, 0
        while len(rest) - begin > PIECE and (found := cut.search(rest, begin + PIECE)):
            yield rest[begin : found.end()]
            begin = found.end()
        rest = rest[begin:]
    if rest:
        yield rest


CUT = re.compile(r"\S(?=\s)")  # in front of white space behind something else, GPT-2's expression cuts too
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def byte_level(model: models.Model, pre_tokenizer: pre_tokenizers.PreTokenizer) -> tokenizers.Tokenizer:
    """A tokenizer whose alphabet is the 256 bytes, so that no text is unknown to it."""
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoders.ByteLevel()
    return backend
