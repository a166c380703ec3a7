"""The byte-level BPE tokenizer that a GGUF file describes."""

from __future__ import annotations

import msgspec
from tokenizers import AddedToken, Regex, models, pre_tokenizers, processors

from finetune.errors import UserError
from finetune.lm.chat_template import with_markers
from finetune.lm.io.gguf import GGUFModel
from finetune.lm.tokenizer import GPT2, Tokenizer, byte_level
from finetune.runs import reading

DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2])


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Bytes, cut first by a regular expression."""
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
# was trained and as llama.cpp does (transformers' GGUF reader omits that step and splits "\n\n1." otherwise).
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


class Vocabulary(msgspec.Struct, rename=lambda name: f"tokenizer.ggml.{name}"):
    """What is read of a GGUF's metadata."""

    tokens: list[str]
    merges: list[str]
    token_type: list[int] = []
    add_bos_token: bool | None = None
    add_eos_token: bool = False


LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")


def read(file: GGUFModel) -> Tokenizer:
    """Byte-level BPE from the metadata of a GGUF; UserError for any other kind of tokenizer."""
    kind, pre = file.get("tokenizer.ggml.model"), file.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
        raise UserError(f"{file.path}: tokenizer {kind!r} with pre-tokenizer {pre!r} is not supported")
    given = file.struct(Vocabulary)
    tokens, vocabulary = given.tokens, {token: i for i, token in enumerate(given.tokens)}
    llama3 = pre in LLAMA3_NAMES  # as in llama.cpp: a word of the vocabulary is one token, and bos precedes the text
    merges = [(first, second) for first, _, second in (merge.partition(" ") for merge in given.merges)]
    try:
        model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=llama3)
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{file.path}: tokenizer.ggml.merges is not of this vocabulary ({why})") from None
    backend = byte_level(model, PRE_TOKENIZERS[pre])
    for token, kind in zip(tokens, given.token_type, strict=False):
        if kind == CONTROL:
            backend.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == USER_DEFINED:
            backend.add_tokens([AddedToken(token, normalized=False, special=False)])
    ids = file.token_ids()
    bos, eos, pad, unk = (name_of(tokens, ids.get(f"{key}_token_id")) for key in ("bos", "eos", "pad", "unk"))
    if pad is None and "<|endoftext|>" in vocabulary and eos != "<|endoftext|>":
        pad = "<|endoftext|>"
    around = [bos if (llama3 if given.add_bos_token is None else given.add_bos_token) else None]
    around += [eos if given.add_eos_token else None]
    if any(around):
        known = [token for token in dict.fromkeys(around) if token is not None]
        backend.post_processor = processors.TemplateProcessing(
            single=" ".join(
                [f"{around[0]}:0" if around[0] else "", "$A:0", f"{around[1]}:0" if around[1] else ""]
            ).strip(),
            special_tokens=[(token, vocabulary[token]) for token in known],
        )
    others = {} if unk is None else {"unk_token": unk}
    template = reading.convert(file.get("tokenizer.chat_template"), str | None, f"{file.path}: tokenizer.chat_template")  # type: ignore[arg-type]
    return Tokenizer(backend, bos=bos, eos=eos, pad=pad, chat_template=with_markers(template), others=others)


def name_of(tokens: list[str], at: int | None) -> str | None:
    """The token of an id."""
    return None if at is None else tokens[at]
