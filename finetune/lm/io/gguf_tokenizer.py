"""The tokenizer that a GGUF file describes: a byte-level BPE (`gpt2`) or SentencePiece's (`llama`)."""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec

from finetune.errors import UserError
from finetune.lm.chat_template import with_markers
from finetune.lm.io.gguf import GGUFModel
from finetune.lm.io.vocabulary import (
    NORMAL,
    PRE_TOKENIZERS,
    byte_level_bpe,
    sentencepiece_bpe,
    surround,
)
from finetune.lm.tokenizer import Tokenizer
from finetune.runs import reading

# GGUF's tokenizer.ggml.model → what it is.
MODELS = {
    "gpt2": "byte-level BPE of Llama 3, Qwen, SmolLM, Mistral Nemo",
    "llama": "SentencePiece's BPE of Llama 1 and 2, Mistral, Gemma",
}


class Vocabulary(msgspec.Struct, rename=lambda name: f"tokenizer.ggml.{name}"):
    """What is read of a GGUF's metadata."""

    tokens: list[str]
    merges: list[str] = []
    scores: list[float] | None = None
    token_type: list[int] | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool = False
    add_space_prefix: bool = True
    remove_extra_whitespaces: bool = False


def read(file: GGUFModel) -> Tokenizer:
    """The tokenizer in the metadata of a GGUF; UserError for a kind that is not supported."""
    kind, pre = file.get("tokenizer.ggml.model"), file.get("tokenizer.ggml.pre", "default")
    if not isinstance(kind, str) or kind not in MODELS:
        raise UserError(f"{file.path}: tokenizer {kind!r} is not supported (only {', '.join(MODELS)})")
    if kind == "gpt2" and (not isinstance(pre, str) or pre not in PRE_TOKENIZERS):
        raise UserError(f"{file.path}: pre-tokenizer {pre!r} is not supported (only {', '.join(PRE_TOKENIZERS)})")
    given = file.struct(Vocabulary)
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(given.tokens)]  # as llama.cpp calls them
    if len(set(tokens)) < len(tokens):
        raise UserError(f"{file.path}: two tokens are {Counter(tokens).most_common(1)[0][0]!r}")
    types = [NORMAL] * len(tokens) if given.token_type is None else given.token_type
    if len(types) != len(tokens):
        raise UserError(f"{file.path}: tokenizer.ggml.token_type names {len(types)} of {len(tokens)} tokens")
    ids = file.token_ids()
    names = {key: tokens[i] for key in ("bos", "eos", "pad", "unk") if (i := ids.get(f"{key}_token_id")) is not None}
    add_bos = True
    if kind == "gpt2":
        add_bos = PRE_TOKENIZERS[pre].add_bos
        merges = [(merge[: (at := merge.find(" ", 1))], merge[at + 1 :]) for merge in given.merges]
        try:
            backend = byte_level_bpe(tokens, merges, types, PRE_TOKENIZERS[pre])
        except Exception as error:
            why = " ".join(str(error).split())[:200]
            raise UserError(f"{file.path}: tokenizer.ggml.merges is not of this vocabulary ({why})") from None
    else:
        backend = spm(file, given, tokens, types, ids.get("unk_token_id"))
    add_bos = add_bos if given.add_bos_token is None else given.add_bos_token
    around = names.get("bos") if add_bos else None, names.get("eos") if given.add_eos_token else None
    if any(around):
        surround(backend, *around)
    eos, pad = names.get("eos"), names.get("pad")
    if pad is None and kind == "gpt2" and "<|endoftext|>" in tokens and eos != "<|endoftext|>":
        pad = "<|endoftext|>"
    where = f"{file.path}: tokenizer.chat_template"
    template: Any = reading.convert(file.get("tokenizer.chat_template"), str | None, where)  # type: ignore[arg-type]
    others = {"unk_token": names["unk"]} if "unk" in names else {}
    return Tokenizer(
        backend, bos=names.get("bos"), eos=eos, pad=pad, chat_template=with_markers(template), others=others
    )


def spm(file: GGUFModel, given: Vocabulary, tokens: list[str], types: list[int], unknown: int | None) -> Any:
    """The backend of a SentencePiece vocabulary."""
    if given.scores is None or len(given.scores) != len(tokens):
        count = "no" if given.scores is None else len(given.scores)
        raise UserError(f"{file.path}: tokenizer.ggml.scores has {count} scores for {len(tokens)} tokens")
    if given.remove_extra_whitespaces:
        raise UserError(f"{file.path}: tokenizer.ggml.remove_extra_whitespaces is not supported")
    try:
        return sentencepiece_bpe(tokens, given.scores, types, prefix=given.add_space_prefix, unknown=unknown)
    except UserError as error:
        raise UserError(f"{file.path}: {error}") from None
