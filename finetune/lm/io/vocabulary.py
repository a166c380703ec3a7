"""Tokenizers from vocabularies: byte-level BPE by its pre-tokenizer's name, and SentencePiece's BPE from scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from finetune.errors import UserError
from finetune.lm.tokenizer import GPT2, byte_level

# Types of tokens, in GGUF and in SentencePiece's files alike.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "▁"  # how SentencePiece writes a space


@dataclass(frozen=True)
class PreTokenizer:
    """How a text is cut before the merges of a byte-level BPE, and what goes with it in llama.cpp."""

    about: str
    cut: pre_tokenizers.PreTokenizer
    ignore_merges: bool = False  # a piece that is a token itself is that token
    add_bos: bool = False  # unless the file says otherwise
    normalizer: normalizers.Normalizer | None = None


def split(*patterns: str) -> pre_tokenizers.PreTokenizer:
    """Bytes, cut first by regular expressions, one after the other."""
    cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2])
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CASES = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
OLD = split(
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)

# GGUF's tokenizer.ggml.pre → how a text is cut. The first name of each is the one that is written.
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "gpt-2": PreTokenizer("GPT-2: words, numbers, signs", GPT2),
    "smollm": PreTokenizer("SmolLM 1 and 2: every digit alone, then as GPT-2", DIGITS),
    "llama-bpe": PreTokenizer("Llama 3, SmolLM3: up to three digits", split(WORDS % "{1,3}"), True, True),
    "qwen2": PreTokenizer("Qwen2 to Qwen3: every digit alone", split(WORDS % ""), normalizer=normalizers.NFC()),
    "tekken": PreTokenizer("Mistral Nemo and later: words cut before capitals", split(CASES), True, True),
    "default": PreTokenizer("files without a name: llama.cpp's oldest rule", OLD),
}
# The cuts of Llama 3 and Qwen2 without what else goes with these names.
PRE_TOKENIZERS["smaug-bpe"] = PreTokenizer("up to three digits, merges always", PRE_TOKENIZERS["llama-bpe"].cut)
PRE_TOKENIZERS["stablelm2"] = PreTokenizer("every digit alone, text not normalized", PRE_TOKENIZERS["qwen2"].cut)
PRE_TOKENIZERS |= dict.fromkeys(("starcoder", "refact", "command-r"), PRE_TOKENIZERS["smollm"])
PRE_TOKENIZERS |= dict.fromkeys(("llama3", "llama-v3", "pixtral"), PRE_TOKENIZERS["llama-bpe"])
PRE_TOKENIZERS["deepseek-r1-qwen"] = PRE_TOKENIZERS["qwen2"]
PRE_TOKENIZERS["dbrx"] = PRE_TOKENIZERS["smaug-bpe"]


def byte_level_bpe(
    tokens: Sequence[str], merges: Sequence[tuple[str, str]], types: Sequence[int], pre: PreTokenizer
) -> tokenizers.Tokenizer:
    """A byte-level BPE. Raises what the library raises if a merge is not of the vocabulary."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = byte_level(models.BPE(vocab=vocabulary, merges=list(merges), ignore_merges=pre.ignore_merges), pre.cut)
    if pre.normalizer is not None:
        backend.normalizer = pre.normalizer
    add_tokens(backend, tokens, types)
    return backend


def sentencepiece_bpe(
    tokens: Sequence[str], scores: Sequence[float], types: Sequence[int], *, prefix: bool, unknown: int | None
) -> tokenizers.Tokenizer:
    """SentencePiece's BPE: characters merged to the token of the highest score first; what no token spells becomes the
    tokens of its UTF-8 bytes. `prefix`: a space is put in front of every part of a text between special tokens.

    The merges are recovered from the scores. Tokens that the user defined come whole, whatever their score.
    """
    if BYTE not in types and unknown is None:
        raise UserError("the vocabulary has no tokens of single bytes and no unknown token")
    spelled = [
        token.replace(" ", SPACE) if kind == USER_DEFINED else token for token, kind in zip(tokens, types, strict=True)
    ]
    vocabulary = {token: i for i, token in enumerate(spelled)}
    model = models.BPE(
        vocab=vocabulary,
        merges=merges_of(spelled, scores, types),
        unk_token=None if unknown is None else spelled[unknown],
        fuse_unk=True,
        byte_fallback=BYTE in types,
    )
    backend = tokenizers.Tokenizer(model)
    spaces = normalizers.Replace(" ", SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    decoder = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*decoder, decoders.Strip(" ", 1, 0)] if prefix else decoder)
    add_tokens(backend, spelled, types)
    return backend


def merges_of(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    """All pairs of tokens that make a third, in the order of its score, the highest first; at equal scores (some
    converters write none) in the order of the vocabulary. Tokens that the user defined come before all others."""
    whole = {
        token: (kind != USER_DEFINED, -score, i)
        for i, (token, score, kind) in enumerate(zip(tokens, scores, types, strict=True))
        if kind in (NORMAL, USER_DEFINED)
    }
    found = []
    for token, rank in whole.items():
        for at in range(1, len(token)):
            first, second = token[:at], token[at:]
            if first in whole and second in whole:
                found.append((rank, -at, first, second))
    return [(first, second) for *_, first, second in sorted(found)]


def add_tokens(backend: tokenizers.Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Makes control tokens special, and those that the user defined found as a whole in any text."""
    pairs = list(zip(tokens, types, strict=True))
    special = [token for token, kind in pairs if kind in (CONTROL, UNKNOWN)]
    plain = [token for token, kind in pairs if kind == USER_DEFINED]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in plain])


def surround(backend: tokenizers.Tokenizer, bos: str | None, eos: str | None) -> None:
    """Puts the tokens `bos` and `eos`, None for no such one, around every text."""
    known = [token for token in (bos, eos) if token is not None]
    single = f"{bos}:0 $A:0" if bos is not None else "$A:0"
    backend.post_processor = processors.TemplateProcessing(
        single=single if eos is None else f"{single} {eos}:0",
        special_tokens=[(token, backend.token_to_id(token)) for token in dict.fromkeys(known)],
    )
