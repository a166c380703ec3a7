"""A tokenizer over the `tokenizers` library: text ↔ ids, conversations with their loss mask, training of a BPE."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from finetune.errors import UserError
from finetune.lm.chat_template import ChatTemplate, chatml
from finetune.lm.rendering import Message, Renderer, Written, overlap

if TYPE_CHECKING:
    from finetune.lm.gpt import GPT
    from finetune.lm.llama import Llama

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # pad (and unknown), begin, end
ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")  # of a turn, whatever else a model's files say
PIECE = 1 << 16  # characters that are encoded at once where a text may be cut


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

        UserError if that cannot be told, if the template omits part of a message, or if it takes several texts to hold
        all answers (`documents`).
        """
        if add_generation_prompt:
            ids, mask, _ = self.tokens(Written(*self.render_text(messages, True), len(messages)))
            return ids, mask
        if lost := self.renderer.losses(messages):
            raise UserError(f"the chat template does not write {lost[0][1]}")
        found = self.documents(messages)
        if len(found) != 1:
            raise UserError("the chat template writes an answer otherwise once others follow: render each by itself")
        return found[0][:2]

    def documents(self, messages: Sequence[Message]) -> list[tuple[list[int], list[int], int]]:
        """(ids, mask, number of messages) of each text in which answers of a conversation are learned: one, or several
        where the template writes an earlier answer otherwise once others follow (Qwen 3 omits its reasoning)."""
        return [self.tokens(written) for written in self.renderer.documents(messages)]

    def tokens(self, written: Written) -> tuple[list[int], list[int], int]:
        """(ids, mask, number of messages) of a rendered text; a token is learned if one of its characters is."""
        encoding = self.backend.encode(written.text, add_special_tokens=False)
        mask = [0] * len(encoding.ids)
        for i, span in enumerate(encoding.offsets):
            mask[i] = int(any(overlap(span, other) for other in written.spans))
            self.renderer.straddled += any(span[0] < start < span[1] for start, _ in written.spans)
        return encoding.ids, mask, written.messages

    def render_text(
        self, messages: Sequence[Message], add_generation_prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text, and the character spans between generation markers."""
        return self.renderer.text(messages, add_generation_prompt)

    @property
    def chat_template(self) -> str | None:
        return self._chat_template

    @chat_template.setter
    def chat_template(self, source: str | None) -> None:
        self._chat_template = source
        self.__dict__.pop("renderer", None)

    @cached_property
    def renderer(self) -> Renderer:
        """What the chat template writes. UserError if there is none, or if it does not compile."""
        if self._chat_template is None:
            raise UserError("the model has no chat template: give one (--template chatml), or use its instruct version")
        added = tuple(token.content for token in self.backend.get_added_tokens_decoder().values())
        return Renderer(ChatTemplate(self._chat_template), self.special_tokens, added)

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


def stop_ids(model: Llama | GPT, tokenizer: Tokenizer) -> set[int]:
    """The tokens that end an answer: those that config.json and generation_config.json list (a GGUF: its ends of text,
    turn and message), the tokenizer's end token, and the usual ends of a turn."""
    found = {tokenizer.eos_id} | {tokenizer.backend.token_to_id(name) for name in ENDS}
    for ids in (model.token_ids, model.generation_ids):
        listed = ids.get("eos_token_id")
        found |= set(listed) if isinstance(listed, list) else {listed}
    return {i for i in found if i is not None}


def answer_text(tokenizer: Tokenizer, ids: Sequence[int], stops: Iterable[int]) -> str:
    """The text of an answer, without the token that ended it."""
    ended = bool(ids) and ids[-1] in set(stops)
    return tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True)
