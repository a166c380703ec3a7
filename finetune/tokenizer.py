"""Tokenizers over the `tokenizers` library: Hugging Face folders, GGUF metadata, training, and chat templates."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from finetune.errors import UserError
from finetune.weights import read_json, write_json

if TYPE_CHECKING:
    from finetune.gguf import GGUFModel

SMOLLM_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # pad (and unknown), begin, end


def chatml(default_system: str = "") -> str:
    """The project's ChatML template (Jinja), with generation markers around what the assistant has to learn: each
    answer and the `<|im_end|>` behind it. `default_system` is put first where the messages begin with no system one."""
    first = ""
    if default_system:
        turn = json.dumps(f"<|im_start|>system\n{default_system}<|im_end|>\n", ensure_ascii=False)
        first = "{% if loop.first and messages[0]['role'] != 'system' %}{{ " + turn + " }}{% endif %}"
    return (
        "{% for message in messages %}" + first + "{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )


class Tokenizer:
    """Text ↔ ids. `bos_id`, `eos_id`, `pad_id` are None where the model has no such token.

    `backend` is the `tokenizers.Tokenizer`; `chat_template` a Jinja template, or None.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos: str | None = None,
        eos: str | None = None,
        pad: str | None = None,
        chat_template: str | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend, self.bos, self.eos, self.pad = backend, bos, eos, pad
        self.chat_template = chat_template
        self.bos_id, self.eos_id, self.pad_id = (
            backend.token_to_id(name) if name else None for name in (bos, eos, pad)
        )

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    def token_ids(self) -> dict[str, int]:
        """The special ids under the names that config.json uses."""
        found = {"bos_token_id": self.bos_id, "eos_token_id": self.eos_id, "pad_token_id": self.pad_id}
        return {key: value for key, value in found.items() if value is not None}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text; special tokens written out in it become their ids. `add_special_tokens` adds what the model
        wants around a text (Llama 2 and 3: the begin token; SmolLM2 and GPT-2: nothing)."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of ids; UserError for an id outside the vocabulary."""
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise UserError(f"token {token} is not in the vocabulary of {self.vocab_size}")
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def render(
        self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = False
    ) -> tuple[list[int], list[int]]:
        """(ids, mask) of a conversation [{"role": …, "content": …}, …]; mask[i] is 1 for the tokens that the assistant
        has to produce: its answers and the end token of each. UserError if the template has no generation markers."""
        if self.template is not None and not self.template.marked:
            raise UserError(
                "the model's chat template has no {% generation %} markers, so the assistant's tokens are not known: "
                "set tokenizer.chat_template, for instance to finetune.tokenizer.chatml()"
            )
        text, spans = self.render_text(messages, add_generation_prompt)
        encoding = self.backend.encode(text, add_special_tokens=False)
        mask = [0] * len(encoding.ids)
        for i, (start, stop) in enumerate(encoding.offsets):
            mask[i] = int(any(start < last and stop > first for first, last in spans))
        return encoding.ids, mask

    def render_text(
        self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text, and the character spans between generation markers."""
        if self.template is None:
            raise UserError("the model has no chat template: set tokenizer.chat_template, or use its instruct version")
        for i, message in enumerate(messages):
            if not all(isinstance(message.get(key), str) for key in ("role", "content")):
                raise UserError(f"message {i} needs a text for 'role' and for 'content', found {message!r}")
        specials = {"bos_token": self.bos, "eos_token": self.eos, "pad_token": self.pad}
        return self.template.render(
            messages=list(messages),
            add_generation_prompt=add_generation_prompt,
            **{key: value for key, value in specials.items() if value is not None},
        )

    @property
    def chat_template(self) -> str | None:
        return self._chat_template

    @chat_template.setter
    def chat_template(self, source: str | None) -> None:
        self._chat_template = source
        self.__dict__.pop("template", None)

    @cached_property
    def template(self) -> Any:
        from finetune.template import ChatTemplate

        return None if self._chat_template is None else ChatTemplate(self._chat_template)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Tokenizer:
        """The tokenizer of a Hugging Face folder (tokenizer.json), of a .gguf file, of `smollm2`, or of a hub id.

        UserError if there is none. SmolLM's own chat template is replaced by ours, which renders the same text and has
        the generation markers.
        """
        from finetune import hub

        source = hub.resolve(path)
        if source.suffix == ".gguf":
            from finetune.gguf import GGUFModel

            return from_gguf(GGUFModel(source))
        file = source / "tokenizer.json"
        if not file.exists():
            raise UserError(f"{source} holds no tokenizer.json: save the tokenizer in its fast form")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"{file} is damaged ({error}): fetch or save the tokenizer again") from None
        settings: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (source / name).exists():
                settings |= read_json(source / name)
        own = source / "chat_template.jinja"
        template = own.read_text(encoding="utf-8") if own.exists() else settings.get("chat_template")
        if isinstance(template, list):  # several, by name
            template = next((entry["template"] for entry in template if entry["name"] == "default"), None)
        bos, eos, pad = (special(settings.get(f"{key}_token")) for key in ("bos", "eos", "pad"))
        return cls(backend, bos=bos, eos=eos, pad=pad, chat_template=with_markers(template))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json (with the chat template), which transformers opens too."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "tokenizer.json", json.loads(self.backend.to_str()))
        specials = {"bos_token": self.bos, "eos_token": self.eos, "pad_token": self.pad}
        settings: dict[str, Any] = {key: value for key, value in specials.items() if value is not None}
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        if self.chat_template is not None:
            settings["chat_template"] = self.chat_template
        write_json(folder / "tokenizer_config.json", settings)

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


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2])


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


LLAMA3 = split(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How a text is cut before the merges, by GGUF's tokenizer.ggml.pre. `smollm` sets every digit apart first, as the model
# was trained and as llama.cpp does (transformers' GGUF reader leaves that step out and splits "\n\n1." otherwise).
PRE_TOKENIZERS = {
    "smollm": DIGITS,
    "starcoder": DIGITS,
    "refact": DIGITS,
    "command-r": DIGITS,
    "default": GPT2,
    "gpt-2": GPT2,
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
}
CONTROL, USER_DEFINED = 3, 4  # llama.cpp's token types


def byte_level(model: models.Model, pre_tokenizer: pre_tokenizers.PreTokenizer) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoders.ByteLevel()
    return backend


def from_gguf(file: GGUFModel) -> Tokenizer:
    """Byte-level BPE from the metadata of a GGUF; UserError for any other kind of tokenizer."""
    kind, pre = file.get("tokenizer.ggml.model"), file.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        raise UserError(f"{file.path}: tokenizer {kind!r} with pre-tokenizer {pre!r} is not supported")
    tokens: list[str] = file.need("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in file.need("tokenizer.ggml.merges")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = byte_level(models.BPE(vocab=vocabulary, merges=merges), PRE_TOKENIZERS[pre])
    types = file.get("tokenizer.ggml.token_type", [])
    for token, kind in zip(tokens, types, strict=False):
        if kind == CONTROL:
            backend.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == USER_DEFINED:
            backend.add_tokens([AddedToken(token, normalized=False, special=False)])
    ids = file.token_ids()
    bos, eos, pad = (
        tokens[ids[key]] if key in ids else None for key in ("bos_token_id", "eos_token_id", "pad_token_id")
    )
    if pad is None and "<|endoftext|>" in vocabulary and eos != "<|endoftext|>":
        pad = "<|endoftext|>"
    return Tokenizer(
        backend, bos=bos, eos=eos, pad=pad, chat_template=with_markers(file.get("tokenizer.chat_template"))
    )


def with_markers(template: str | None) -> str | None:
    """Our template in place of SmolLM's own, which is recognised by its default system message and its ChatML."""
    ours = chatml(SMOLLM_SYSTEM)
    if template is None or "generation %}" in template or SMOLLM_SYSTEM not in template:
        return template
    from finetune.template import same_text

    return ours if same_text(template, ours) else template


def special(entry: Any) -> str | None:
    """A special token as tokenizer_config.json writes it: a string, or an object with `content`."""
    return entry.get("content") if isinstance(entry, dict) else entry
