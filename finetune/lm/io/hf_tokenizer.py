"""Tokenizers of Hugging Face folders: tokenizer.json or tokenizer.model, and tokenizer_config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import tokenizers
from tokenizers import AddedToken

from finetune.errors import UserError
from finetune.lm.chat_template import with_markers
from finetune.lm.io import sentencepiece
from finetune.lm.io.vocabulary import surround
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


class Added(msgspec.Struct):
    """A token of `added_tokens_decoder`."""

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    special: bool = False


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
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    added_tokens_decoder: dict[str, Added] | None = None

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
    """The tokenizer of a folder: tokenizer.json, or SentencePiece's tokenizer.model where there is none. UserError if
    there is neither, or if its files are damaged."""
    settings = Settings()
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).exists():
            settings = settings.updated(reading.json_file(folder / name, Settings, "save the tokenizer again"))
    own = folder / "chat_template.jinja"
    template = reading.text_file(own, limit=4 << 20) if own.exists() else settings.template()
    found = settings.tokens()
    if (folder / "tokenizer.json").exists():
        backend = read_json(folder / "tokenizer.json")
    elif (folder / "tokenizer.model").exists():
        model = sentencepiece.read(folder / "tokenizer.model")
        backend, found = model.backend(), model.names() | found
        around = [
            settings.add_bos_token is not False,
            settings.add_eos_token is True,
        ]  # a tokenizer.json says it itself
        surround(backend, *(found.get(name) if put else None for name, put in zip(NAMES, around, strict=False)))
    else:
        other = next((name for name in OTHERS if (folder / name).exists()), None)
        holds = f"only {other}, which is not read" if other else "no tokenizer.json"
        raise UserError(f"{folder} holds {holds}: save the tokenizer in its fast form (transformers: "
                        "AutoTokenizer.from_pretrained(…).save_pretrained(…))")  # fmt: skip
    add_named(backend, settings, found, folder)
    bos, eos, pad = (found.pop(key, None) for key in NAMES[:3])
    return Tokenizer(backend, bos=bos, eos=eos, pad=pad, chat_template=with_markers(template), others=found)


OTHERS = ("tekken.json", "vocab.json", "vocab.txt", "spiece.model")  # what a tokenizer can be made of, too


def read_json(file: Path) -> tokenizers.Tokenizer:
    """The tokenizer in a tokenizer.json."""
    text = reading.text_file(file)
    check_prefix(text, file)
    try:
        return tokenizers.Tokenizer.from_str(text)
    except UserError:
        raise
    except BaseException as error:  # the library raises plain Exception; panics of Rust are not even that
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{file} is damaged ({why}): fetch or save the tokenizer again") from None


def add_named(backend: tokenizers.Tokenizer, settings: Settings, found: dict[str, str], folder: Path) -> None:
    """Tokens that only tokenizer_config.json names are found in texts as a whole, as transformers has it: those of
    added_tokens_decoder, and the special ones that are in the vocabulary."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    given = {i: token for i, token in (settings.added_tokens_decoder or {}).items() if token.content not in known}
    for i, token in sorted(given.items(), key=lambda pair: (len(pair[0]), pair[0])):
        added = AddedToken(**msgspec.structs.asdict(token))
        (backend.add_special_tokens if token.special else backend.add_tokens)([added])
        if (there := backend.token_to_id(token.content)) != (int(i) if i.isdecimal() else None):
            raise UserError(f"{folder / 'tokenizer_config.json'}: added_tokens_decoder gives {token.content!r} the id "
                            f"{i}, in the vocabulary it has {there}: save the tokenizer again")  # fmt: skip
        known.add(token.content)
    special = [token for token in found.values() if token not in known and backend.token_to_id(token) is not None]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])


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
