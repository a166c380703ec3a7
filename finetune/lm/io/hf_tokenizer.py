"""Tokenizers of Hugging Face folders: tokenizer.json and tokenizer_config.json, in and out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import tokenizers

from finetune.errors import UserError
from finetune.lm.chat_template import with_markers
from finetune.lm.tokenizer import Tokenizer
from finetune.runs import reading
from finetune.runs.checkpoint import write_json

NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


class TokenText(msgspec.Struct):
    """A special token that is written as an object."""

    content: str


class NamedTemplate(msgspec.Struct):
    """One of several chat templates of a model."""

    name: str
    template: str


Special = str | TokenText | None


class Settings(msgspec.Struct):
    """The keys of tokenizer_config.json and special_tokens_map.json that are read."""

    bos_token: Special = None
    eos_token: Special = None
    pad_token: Special = None
    unk_token: Special = None
    sep_token: Special = None
    cls_token: Special = None
    mask_token: Special = None
    chat_template: str | list[NamedTemplate] | None = None

    def updated(self, other: Settings) -> Settings:
        """These settings, replaced by those that `other` has."""
        found = {key: value for key in self.__struct_fields__ if (value := getattr(other, key)) is not None}
        return msgspec.structs.replace(self, **found)

    def tokens(self) -> dict[str, str]:
        """The special tokens by name."""
        found = {name: getattr(self, name) for name in NAMES}
        return {k: v.content if isinstance(v, TokenText) else v for k, v in found.items() if v is not None}

    def template(self) -> str | None:
        """The chat template; of several the one named `default`."""
        if isinstance(self.chat_template, list):
            return next((entry.template for entry in self.chat_template if entry.name == "default"), None)
        return self.chat_template


def read(folder: Path) -> Tokenizer:
    """The tokenizer of a folder. UserError if there is none, or if its files are damaged."""
    file = folder / "tokenizer.json"
    if not file.exists():
        raise UserError(f"{folder} holds no tokenizer.json: save the tokenizer in its fast form")
    text = reading.text_file(file)
    check_prefix(text, file)
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except UserError:
        raise
    except BaseException as error:  # the library raises plain Exception; panics of Rust are not even that
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{file} is damaged ({why}): fetch or save the tokenizer again") from None
    settings = Settings()
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).exists():
            settings = settings.updated(reading.json_file(folder / name, Settings, "save the tokenizer again"))
    own = folder / "chat_template.jinja"
    template = reading.text_file(own, limit=4 << 20) if own.exists() else settings.template()
    found = settings.tokens()
    bos, eos, pad = (found.pop(key, None) for key in NAMES[:3])
    return Tokenizer(backend, bos=bos, eos=eos, pad=pad, chat_template=with_markers(template), others=found)


def write(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, with the chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "tokenizer.json", json.loads(tokenizer.backend.to_str()))
    settings: dict[str, Any] = dict(tokenizer.special_tokens)
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if tokenizer.chat_template is not None:
        settings["chat_template"] = tokenizer.chat_template
    write_json(folder / "tokenizer_config.json", settings)


class Subwords(msgspec.Struct):
    """What `check_prefix` reads of a tokenizer.json's model."""

    continuing_subword_prefix: str | None = None
    merges: list[Any] | None = None


class HasModel(msgspec.Struct):
    model: Subwords


def check_prefix(text: str, file: Path) -> None:
    """UserError for merges that lack their model's prefix: the library removes it unchecked, which can end the whole
    process."""
    if '"continuing_subword_prefix":null' in text.replace(" ", ""):
        return
    model = reading.json_value(text.encode(), HasModel, file, "fetch or save the tokenizer again").model
    prefix = model.continuing_subword_prefix or ""
    for merge in model.merges or []:
        second = merge.partition(" ")[2] if isinstance(merge, str) else str(merge[-1]) if merge else ""
        if not second.startswith(prefix):
            raise UserError(f"{file} is damaged: the merge {merge!r} lacks the prefix {prefix!r} of its model")
